"""The notebooks: run as they are, at a small size, in a kernel of their own; and at theirs, by the TPU compiler."""

import os
import re
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import nbformat
import pytest
from chat_checkpoint import checkpoint, tokenizer_of_bytes
from flaxzoo import configs, zoo
from flaxzoo.configs import Run
from flaxzoo.train.plan.chips import chip_of
from flaxzoo.train.plan.plan import devices_of, plan
from flaxzoo.train.runs import metrics
from flaxzoo.zoo import Decoder
from flaxzoo.zoo.families import registry
from flaxzoo.zoo.formats.source import TensorInfo
from flaxzoo.zoo.generation import session
from flaxzoo.zoo.parameters import FlatModel, describe
from jax.sharding import NamedSharding, PartitionSpec
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ["train", "generate", "finetune"]
V5E, V6E = "v5e:1x1", "v6e:1x1"
slow = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64 alone")


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", 4)


def tagged(book: NotebookNode, tag: str) -> NotebookNode:
    (cell,) = [cell for cell in book.cells if tag in cell.metadata.get("tags", ())]
    return cell


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_as_it_should_be(name: str) -> None:
    """Valid, without outputs, with installation first, and no place of one machine."""
    book = read(name)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert cells[0] is tagged(book, "install")
    assert "%pip install" in cells[0].source
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    text = "\n".join(cell.source for cell in book.cells)
    assert not re.search(r"/(home|root|tmp|work|Users|mnt|opt)/|[A-Z]:\\", text)
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    assert all(cell.source.count("\n") < 25 for cell in book.cells)
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("source", "requirement"),
    [
        ("git+https://host/owner/flaxzoo", r"flaxzoo\[[a-z,]+\] @ git\+https://host/owner/flaxzoo"),
        ("flaxzoo", r"flaxzoo\[[a-z,]+\]"),
        ("here.whl", r"here\.whl\[[a-z,]+\]"),
        (".", r"\.\[[a-z,]+\]"),
        ("gone.whl", FileNotFoundError),
        ("drive/clone", FileNotFoundError),
    ],
)
def test_installs_from_any_source(
    name: str, source: str, requirement: str | type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.metadata.packages_distributions", dict)  # takes seconds
    (tmp_path / "here.whl").touch()
    cell = tagged(read(name), "install").source
    cell = re.sub(r"^SOURCE = .*", f"SOURCE = {source!r}", cell, flags=re.M)
    cell = cell.replace('%pip install -q "{package}"', "installed.append(package)")
    installed: list[str] = []
    if isinstance(requirement, str):
        exec(cell, {"installed": installed})
        (package,) = installed
        assert re.fullmatch(requirement, package)
    else:
        with pytest.raises(requirement, match=f"{source}.*does not exist here.*set SOURCE to a repository"):
            exec(cell, {"installed": installed})
        assert not installed


# On CPU.


@dataclass
class Done:
    """A notebook that was run in a folder: what its cells printed, by their ids, and its pictures."""

    folder: Path
    printed: dict[str, str]
    pictures: int


def executed(name: str, folder: Path, **parameters: Any) -> Done:
    """Runs a notebook with other parameters; all that is left out is the installation itself."""
    book = read(name)
    install = tagged(book, "install")
    assert install.source.count("%pip install") == 1
    install.source = install.source.replace("%pip install", "pass  # %pip install")
    values = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    known = tagged(book, "parameters")
    assert all(f"\n{name} = " in f"\n{known.source}" for name in parameters)
    book.cells.insert(book.cells.index(known) + 1, nbformat.v4.new_code_cell(values))
    environment = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    client = NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    outputs = {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}
    said = [(cell, output) for cell, found in outputs.items() for output in found]
    assert [output["text"] for _, output in said if output.get("name") == "stderr"] == []
    printed = dict.fromkeys(outputs, "")
    for cell, output in said:
        printed[cell] += output.get("text", "") or output.get("data", {}).get("text/plain", "")
    print(printed)
    return Done(folder, printed, sum("image/png" in output.get("data", {}) for _, output in said))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, and the dog ran to the house\n" * 200)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "tiny", tokenizer_of_bytes("<|endoftext|>", "<|im_end|>"))


SMALL = {"steps": 30, "batch": 4, "length": 32, "eval_every": 15, "sample_every": 0, "save_every": 15}


def test_run_train(tmp_path: Path, text: Path) -> None:
    sizes = {"model.vocab": 300, "model.dim": 32, "model.layers": 1}
    done = executed("train", tmp_path, TEXT=str(text), PROMPT="the cat", CHANGES=SMALL | sizes)
    records = [record["loss"] for record in metrics.read(tmp_path / "runs" / "shakespeare") if "loss" in record]
    assert len(records) == 30
    assert records[-1] < 0.8 * records[0]
    assert "held-out" in done.printed["train"]
    assert done.pictures == 1
    assert len(done.printed["write"]) > 20


def test_run_generate(tmp_path: Path, source: Path) -> None:
    done = executed("generate", tmp_path, MODEL=str(source), TOKENS=8)
    count = sum(known.size for known in describe(registry.read(zoo.open_source(source).config).abstract()).values())
    assert done.printed["load"] == f"{count:,} parameters, 0.00 GiB\non cpu\n"
    assert "The three largest cities of Italy are" in done.printed["generate"]
    assert done.printed["stream"]
    assert done.printed["chat"].count("tokens/s") == 2


def test_run_finetune(tmp_path: Path, text: Path, source: Path) -> None:
    changes = SMALL | {"optimizer.learning_rate": 3e-3, "remat": "none"}
    done = executed("finetune", tmp_path, MODEL=str(source), TEXT=str(text), PROMPT="the cat", CHANGES=changes)
    scores = [float(bits) for bits in re.findall(r"held-out ([\d.]+) bits", done.printed["after"])]
    assert len(scores) == 3
    assert scores[-1] < 0.8 * scores[0]
    assert "the cat" in done.printed["before"]
    assert done.pictures == 1
    trained, _ = zoo.load(tmp_path / "exported")
    assert trained.spec == zoo.load(source)[0].spec
    assert zoo.open_source(tmp_path / "exported.gguf").config["eos_token_id"] == [257, 258]


# For TPUs.


def model_of(name: str) -> Decoder:
    """The named model whose docstring has this name of the hub."""
    (found,) = [
        made for made in configs.MODELS.values() if f"{name.removesuffix('-Instruct')})" in (made.__doc__ or "")
    ]
    return found()


def run_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run that a notebook makes on a TPU, with its own parameters; of the hub, configs are asked for alone."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(configs.runs, "open_source", partial(config_of, dtype=jnp.bfloat16))
    book, names = read(name), {}
    for tag in ("parameters", "imports", "run"):
        exec(compile(tagged(book, tag).source, name, "exec"), names)
    return names["run"]


def config_of(name: str, dtype: Any) -> Any:
    """What there is to know of a repository before its weights."""
    fields = registry.write(model_of(name))[1] | {"max_position_embeddings": 8192}
    return SimpleNamespace(config=fields, tensors={"weight": TensorInfo((), jnp.dtype(dtype))})


def told(name: str, topology: str) -> list[float]:
    """What the notebook's row of a chip says: GiB, milliseconds of a step, seconds of all."""
    (row,) = re.findall(rf"^\| {topology[:3]} chip \|.*$", tagged(read(name), "title").source, re.MULTILINE)
    return [float(number) for number in re.findall(r"\| ([\d.]+)", row)][-3:]


@needs_libtpu
@pytest.mark.parametrize("topology", [V5E, V6E])
@pytest.mark.parametrize("name", ["train", pytest.param("finetune", marks=slow)])
def test_training_fits_the_chip_and_takes_as_long_as_is_told(
    name: str, topology: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(name, monkeypatch)
    monkeypatch.undo()
    found = plan(run, topology)
    assert found.fits
    assert found.time is not None
    assert not found.time.unknown
    memory, step, whole = told(name, topology)
    print(name, topology, found.memory.used / 2**30, found.time.seconds * 1e3)
    assert found.memory.used / 2**30 == pytest.approx(memory, rel=0.1)
    assert found.time.seconds * 1e3 == pytest.approx(step, rel=0.15)
    assert found.time.seconds * run.steps == pytest.approx(whole, rel=0.15)


@needs_libtpu
@slow
@pytest.mark.parametrize("topology", [V5E, V6E])
def test_reading_and_writing_compile_for_the_chip(topology: str) -> None:
    """The two programs of generation, with the caches of a chat, beside the weights."""
    names: dict[str, Any] = {}
    exec(tagged(read("generate"), "parameters").source, names)
    spec = model_of(names["MODEL"]).unstacked()  # as `optimize_for_decoding` makes it
    mesh = jax.make_mesh((1,), ("fsdp",), devices=devices_of(topology), axis_types=(jax.sharding.AxisType.Explicit,))
    place = NamedSharding(mesh, PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    length, dtype = session.rounded(4 * names["TOKENS"]), jnp.bfloat16
    model = FlatModel.of(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), spec.abstract()))
    with jax.set_mesh(mesh):
        caches = placed(jax.eval_shape(lambda: spec.cache(1, length, dtype)))
        state = placed(jax.eval_shape(lambda: session.start(jax.random.key(0), 1, None, None)))
        filters = placed(jax.eval_shape(lambda: zoo.Sampling(temperature=0.7, top_p=0.9).traced(spec.vocab)))
        numbers = [placed(jax.ShapeDtypeStruct(shape, jnp.int32)) for shape in ((1, 256), (1,), (1,), (2,), ())]
        tokens, counts, starts, ends, limit = numbers
        logits = placed(jax.ShapeDtypeStruct((1, spec.vocab), jnp.float32))
        reading = session._prefill.trace(model, caches, state, tokens, counts, starts, logits, dtype=dtype)
        writing = session.advance("tpu").trace(model, caches, state, filters, ends, limit, log_probs=False, dtype=dtype)
        for program in (reading, writing):
            memory = program.lower().compile().memory_analysis()
            weights = 2 * sum(known.size for known in describe(spec.abstract()).values())
            print(topology, memory)
            assert memory is not None
            assert memory.argument_size_in_bytes >= weights
            assert memory.peak_memory_in_bytes < chip_of(topology)[0].hbm

"""Runs that start from pretrained weights: the numbers, the tokenizer and what belongs to them go in and come out."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_checkpoint import TEMPLATE, checkpoint, tokenizer_of_bytes
from flaxzoo import configs, zoo
from flaxzoo.configs import Run, models
from flaxzoo.train import data
from flaxzoo.train.commands import cli
from flaxzoo.train.data.tokenizer import ends
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.distributed import signals
from flaxzoo.train.plan import report as plan_report
from flaxzoo.train.runs import folder, loop, metrics
from flaxzoo.train.runs.pretrained import open_pretrained
from flaxzoo.train.step import initial_state
from flaxzoo.zoo.evaluation.score import Scorer
from flaxzoo.zoo.evaluation.windows import Window
from flaxzoo.zoo.parameters import describe, partitions, split
from rich.console import Console
from safetensors.numpy import load_file
from tokenizers.processors import TemplateProcessing

QUIET = Console(quiet=True)
pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("hub") / "tiny", tokenizer_of_bytes("<|endoftext|>", "<|im_end|>"))


def small(run: Run, text: Path, **changes: Any) -> Run:
    base: dict[str, Any] = {
        "data.source": (str(text),),
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 2,
        "steps": 12,
        "batch": 4,
        "length": 64,
        "mesh": "fsdp=1",
        "eval_every": 0,
        "sample_every": 0,
        "save_every": 6,
        "remat": "none",
    }
    return run.replace(**base | changes)


@pytest.fixture(scope="module")
def run(source: Path, text: Path) -> Run:
    return small(configs.get_run(str(source)), text)


@pytest.fixture(scope="module")
def done(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "mine"
    loop.train(run, place, console=QUIET)
    return place


def values(place: Path, name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in metrics.read(place) if name in record}


def test_a_checkpoint_is_a_run_with_its_model(source: Path) -> None:
    run = configs.get_run(str(source))
    assert run.weights == str(source)
    assert run.model == models.small(vocab=272, dim=32, layers=2, heads=4, kv_heads=4, hidden=64, tied=True)
    assert (run.length, run.dtype) == (96, "float32")
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


@pytest.mark.parametrize("mesh", ["fsdp=1", "fsdp=4", "fsdp=2,tensor=2"])
def test_the_first_parameters_are_those_of_the_checkpoint(run: Run, source: Path, mesh: str) -> None:
    wanted = split(zoo.load(source)[0])
    made, _ = meshes.make(run.replace(mesh=mesh))
    with jax.set_mesh(made):
        found = initial_state(run, made, open_pretrained(run).parameters(made))["params"]
    places = partitions(describe(run.model.abstract()), made)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name])
        assert array.sharding.is_equivalent_to(jax.NamedSharding(made, places[name]), array.ndim), name


def test_stored_in_bfloat16_trained_in_float32(tmp_path: Path, text: Path) -> None:
    stored = checkpoint(tmp_path / "half", tokenizer_of_bytes("<|endoftext|>"), jnp.bfloat16)
    run = configs.get_run(str(stored))
    assert run.dtype == "bfloat16"
    made, _ = meshes.make(run.replace(mesh="fsdp=1"))
    found = open_pretrained(run).parameters(made)
    assert {array.dtype for array in found.values()} == {jnp.dtype(jnp.float32)}
    for name, array in split(zoo.load(stored)[0]).items():
        np.testing.assert_array_equal(found[name], array.astype(jnp.float32))


def test_before_the_first_step_the_score_is_that_of_the_checkpoint(run: Run, source: Path, done: Path) -> None:
    """By the scorer of `zoo eval`, on the same windows."""
    model, tokenizer = zoo.load(source)
    assert tokenizer is not None
    texts = run.data.replace(tokenizer=str(source / "tokenizer.json"))
    batches = data.load(texts, vocab=272, length=64, batch=4, seed=0)
    scorer, nats = Scorer(model, length=64), 0.0
    for texts in batches.heldout_texts:
        end = tokenizer.token_to_id("<|endoftext|>")
        stream = [end, *tokenizer.encode("".join(texts), add_special_tokens=False).ids, end]
        rows = [stream[start : start + 65] for start in range(0, len(stream) - 1, 64)]
        nats -= sum(found.log_prob for found in scorer.likelihoods([Window(tuple(ids), len(ids) - 1) for ids in rows]))
    scores = values(done, "heldout_bits_per_byte")
    assert scores[0] == pytest.approx(nats / math.log(2) / batches.heldout_bytes, rel=1e-5)
    assert scores[12] < 0.8 * scores[0]
    assert scores.keys() == {0, 12}


def test_it_learns_and_goes_on_without_the_checkpoint_bit_by_bit(
    run: Run, source: Path, done: Path, tmp_path: Path
) -> None:
    losses = values(done, "loss")
    assert losses[12] < 0.8 * losses[1]
    moved = Path(shutil.copytree(source, tmp_path / "away"))
    there = run.replace(weights=str(moved))
    with pytest.raises(signals.Interrupted):
        interrupted(there, tmp_path / "mine", at=6)
    shutil.rmtree(moved)  # what is needed of it is in the run's folder
    loop.train(there, tmp_path / "mine", console=QUIET)
    assert values(tmp_path / "mine", "loss") == losses
    assert values(tmp_path / "mine", "heldout_bits_per_byte") == values(done, "heldout_bits_per_byte")


def interrupted(run: Run, place: Path, at: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        record = loop.Job._record

        def caught(job: loop.Job, step: int, *rest: Any) -> None:
            record(job, step, *rest)
            if step == at:
                job._save(step)
                job.checkpoints.wait()
                raise signals.Interrupted("SIGTERM", step, place)

        patch.setattr(loop.Job, "_record", caught)
        loop.train(run, place, console=QUIET)


def test_what_belongs_to_the_weights_comes_out_again(source: Path, done: Path, tmp_path: Path) -> None:
    """Names, config, tokenizer, template, special tokens and licence."""
    zoo.convert(done, tmp_path / "exported")
    before, after = (load_file(place / "model.safetensors") for place in (source, tmp_path / "exported"))
    assert {n: x.shape for n, x in before.items()} == {n: x.shape for n, x in after.items()}
    for file in ("tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "exported" / file).read_text() == (source / file).read_text(), file
    for file in ("config.json", "generation_config.json"):
        before, after = (json.loads((place / file).read_text()) for place in (source, tmp_path / "exported"))
        assert after == before | {"eos_token_id": [257, 258]}, file  # and what training puts after a text
    model, tokenizer = zoo.load(tmp_path / "exported")
    trained, theirs = folder.load(done)
    assert tokenizer is not None
    assert tokenizer.to_str() == theirs.to_str()
    for name, array in split(model).items():
        np.testing.assert_array_equal(array, split(trained)[name])
        assert not np.array_equal(array, split(zoo.load(source)[0])[name])


def test_a_run_that_started_from_a_chat_model_chats(source: Path, done: Path) -> None:
    ours, theirs = zoo.open(done), zoo.open(source)
    assert ours.template is not None
    assert theirs.template is not None
    assert ours.template.source == theirs.template.source == TEMPLATE
    assert ours.template.special_tokens == theirs.template.special_tokens
    assert theirs.stop == ("<|im_end|>",)
    assert ours.stop == ("<|endoftext|>", "<|im_end|>")  # the first is what training puts after a text


def test_from_a_gguf_file_and_into_one(source: Path, text: Path, tmp_path: Path) -> None:
    zoo.convert(source, tmp_path / "tiny.gguf")
    run = small(configs.get_run(str(tmp_path / "tiny.gguf")), text)
    loop.train(run, tmp_path / "mine", console=QUIET)
    writer = zoo.open(tmp_path / "mine")
    assert writer.template is not None
    assert writer.template.source == TEMPLATE
    assert "<|im_end|>" in writer.stop
    zoo.convert(tmp_path / "mine", tmp_path / "mine.gguf")
    again = zoo.open_source(tmp_path / "mine.gguf")
    assert again.chat_template == TEMPLATE  # pyright: ignore[reportAttributeAccessIssue]
    assert set(again.config["eos_token_id"]) == {257, 258}


def test_from_another_run(run: Run, done: Path, tmp_path: Path) -> None:
    """Its parameters, and what belonged to the weights that it started from."""
    loop.train(run.replace(weights=str(done)), tmp_path / "more", console=QUIET)
    assert values(tmp_path / "more", "heldout_bits_per_byte")[0] == values(done, "heldout_bits_per_byte")[12]
    template = zoo.open(tmp_path / "more").template
    assert template is not None
    assert template.source == TEMPLATE


def test_a_token_that_begins_a_text_stands_before_each_and_each_row(text: Path, tmp_path: Path) -> None:
    """As the model knows it from its first training; that it comes after an end is not to be learned."""
    tokenizer = tokenizer_of_bytes("<s>", "</s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in ("ab", "cde"):
        (tmp_path / f"{name}.txt").write_text(name)
    texts = configs.Data(source=(str(tmp_path / "*.txt"),), heldout=0.0, tokenizer=str(tmp_path / "tokenizer.json"))
    batches = data.load(texts, vocab=259, length=10, batch=1, seed=0)
    assert batches.ends == ends(tokenizer) == (257, 258)
    row = next(batches.train())
    a = tokenizer.encode("a", add_special_tokens=False).ids[0]
    assert row["tokens"][0].tolist() == [257, 258, 257, a, a + 1, 258, 257, a + 2, a + 3, a + 4]
    assert row["targets"][0].tolist() == [258, 257, a, a + 1, 258, 257, a + 2, a + 3, a + 4, 258]
    assert row["weights"][0].tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    assert row["segments"][0].tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert row["positions"][0].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]


def test_the_command(source: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, the run that started from it, and a mistyped one."""
    asked: list[tuple[Run, Path]] = []
    monkeypatch.setattr(loop, "train", lambda run, place, **_: asked.append((run, place)))
    cli.dispatch(["train", str(source), "--steps", "7"])
    cli.dispatch(["train", str(done)])
    assert asked == [
        (configs.get_run(str(source)).replace(steps=7), Path("runs/tiny")),
        (folder.Folder(done).run(), done),
    ]
    monkeypatch.setattr(plan_report, "command", lambda run, topology, **_: asked.append((run, Path(topology))))
    cli.dispatch(["plan", str(source), "--topology", "colab-v5e"])
    assert asked[2:] == [(configs.get_run(str(source)), Path("colab-v5e"))]
    with pytest.raises(ValueError, match=r"unknown run in .* 'mime'; did you mean 'mine'"):
        cli.dispatch(["train", str(done.with_name("mime"))])


def test_mistakes(run: Run, source: Path, tmp_path: Path) -> None:
    def error_of(run: Run) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            loop.train(run, tmp_path / "mine", console=QUIET)
        return str(error.value)

    said = error_of(run.replace(**{"model.layers": 3, "model.block.0.ffn.hidden": 32}))
    assert "\n  model.layers: 2 there, 3 here\n  model.block.0.ffn.hidden: 64 there, 32 here\n" in said
    assert f"zoo train {source}" in said
    with pytest.raises(ValueError, match=r"the tokenizer is that of the weights, got .*; leave out one of them"):
        run.replace(**{"data.tokenizer": "other.json"})
    bare = Path(shutil.copytree(source, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer: put its tokenizer.json beside the weights" in error_of(run.replace(weights=str(bare)))
    large = tokenizer_of_bytes("<|endoftext|>", *(f"<{i}>" for i in range(15)))
    large.save(str(bare / "tokenizer.json"))
    assert "has 272, which is not enough for '<14>' with the id 272" in error_of(run.replace(weights=str(bare)))
    assert "does not exist" in error_of(run.replace(weights="nowhere"))
    loop.train(run, tmp_path / "mine", console=QUIET)  # the last one counts

"""The training loop: what a run leaves in its folder, and how it ends when it can't go on."""

import importlib.util
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo import zoo
from flaxzoo.configs import Run
from flaxzoo.train import optimizer
from flaxzoo.train.checkpoints.checkpoints import Checkpoints
from flaxzoo.train.data import load as load_data
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.runs import changes, loop, metrics, report
from flaxzoo.train.runs.compilation_cache import use_compilation_cache
from flaxzoo.train.runs.folder import Folder, load
from flaxzoo.train.step import abstract_state, initial_state, make_evaluation
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

pytestmark = pytest.mark.usefixtures("quick_compiler")


def train(run: Run, folder: Path, **options: Any) -> tuple[loop.Result, str]:
    """What came of a run, and what was shown."""
    shown = io.StringIO()
    return loop.train(run, folder, console=Console(file=shown, width=200), **options), shown.getvalue()


def parameters(run: Run, folder: Path, step: int | None = None, part: str = "params") -> dict[str, np.ndarray]:
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        target: Any = abstract_state(run, mesh)
        return jax.device_get(checkpoints.restore_subtree(part, target[part], step))


@pytest.fixture(scope="module")
def done(tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, loop.Result, str]:
    """A run with everything in it, at its end."""
    run = tiny.replace(steps=12, ema=0.5, eval_every=4, sample_every=6, save_every=4, profile="7:8")
    folder = tmp_path_factory.mktemp("runs") / "done"
    return run, folder, *train(run, folder)


def test_what_the_folder_holds(done: tuple[Run, Path, loop.Result, str]) -> None:
    run, folder, result, _ = done
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "profile", "report.md", "tensorboard",
        "tokenizer.json",
    ]  # fmt: skip
    assert Run.from_dict(json.loads((folder / "config.json").read_text())) == Folder(folder).run() == run
    assert Checkpoints(folder / "checkpoints", read_only=True).steps()[-2:] == [8, 12]
    assert (result.folder, result.step) == (folder, 12)
    picture = (folder / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 5_000


def test_every_step_is_recorded_once(done: tuple[Run, Path, loop.Result, str]) -> None:
    run, folder, result, _ = done
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert set(steps[0]) == {
        "step", "loss", "nll", "gradient_norm", "learning_rate", "bad_steps", "skipped", "seconds"
    }  # fmt: skip
    assert steps[-1]["loss"] == result.loss < steps[0]["loss"] - 0.3
    assert steps[0]["learning_rate"] == pytest.approx(run.optimizer.learning_rate / 2)
    assert [record["step"] for record in records if "heldout_bits_per_byte" in record] == [4, 8, 12]
    assert [record["step"] for record in records if "sample" in record] == [6, 12]
    assert records == metrics.read(folder)


def test_what_is_shown(done: tuple[Run, Path, loop.Result, str]) -> None:
    _, folder, result, shown = done
    for pattern in (
        r"^model   28\.2k parameters, 181 kFLOP a trained token$",
        r"^data    \S+words\.txt: 1 document, 0\.02 MB, [\d,]+ tokens of 300 \(\d\.\d\d bytes each\); held out ",
        r"^devices fsdp=1 on 1 x cpu \(7 more left idle\)$",
        r"^step 1/12  loss 5\.\d+  tokens/s \S+  memory \S+ [MG]iB$",
        r"^step 4: held-out \d\.\d{4} bits per byte$",
        r"^--- sample at step 6\nthe cat",
        rf"^held-out {result.heldout_bits_per_byte:.4f} bits per byte after 12 steps; report in {folder}/report.md$",
    ):
        assert re.search(pattern, shown, re.MULTILINE), (pattern, shown)


def test_the_score_is_that_of_the_moving_average_on_the_text_held_out(
    done: tuple[Run, Path, loop.Result, str],
) -> None:
    """By an independent computation: document by document, all logits at once, from what `load` gives."""
    run, folder, result, _ = done
    batches = load_data(run.data, vocab=300, length=run.length, batch=run.batch, seed=0)
    text = "".join(text for texts in batches.heldout_texts for text in texts)
    assert 500 < len(text.encode()) == batches.heldout_bytes
    model, tokenizer = load(folder)
    end = batches.separator
    stream = jnp.asarray([end, *tokenizer.encode(text, add_special_tokens=False).ids, end])
    assert tokenizer.decode(stream[1:-1].tolist(), skip_special_tokens=False) == text

    def score(model: Any) -> float:
        nats = 0.0
        for start in range(0, len(stream) - 1, run.length):
            window = stream[start : start + run.length + 1]
            logits, _ = model(window[None, :-1])
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[0]), window[1:, None], axis=1)
            nats -= float(jnp.sum(chosen))
        return nats / math.log(2) / len(text.encode())

    with jax.set_mesh(meshes.for_parameters(run.model, "fsdp=1")):
        averaged = score(model)
        assert result.heldout_bits_per_byte == pytest.approx(averaged, rel=1e-5)
        jax.tree.map(np.testing.assert_array_equal, _arrays(model), parameters(run, folder, part="ema"))
        plain = _with(model, parameters(run, folder))
        assert score(plain) != pytest.approx(averaged, rel=1e-3)
    page = (folder / "report.md").read_text()
    assert f"| held-out | **{averaged:.4f} bits per byte** on " in page


def _arrays(model: Any) -> dict[str, np.ndarray]:
    from flaxzoo.zoo.parameters import split

    return jax.device_get(split(model))


def _with(model: Any, arrays: dict[str, np.ndarray]) -> Any:
    from flaxzoo.zoo.parameters import merge

    return merge(model, {name: jnp.asarray(array) for name, array in arrays.items()})


def test_the_report(done: tuple[Run, Path, loop.Result, str]) -> None:
    _, folder, result, _ = done
    page = (folder / "report.md").read_text()
    for line in (
        "# done",
        f"| final training loss | {result.loss:.4f} nats per token |",
        "| parameters | 28,192 |",
        "| steps | 12 of 8 x 32 tokens (3.07k tokens) |",
        "| skipped steps | 0 |",
        "| devices | fsdp=1 on 1 x cpu (7 more left idle) |",
        "![Training and held-out loss in bits per byte, by step](loss.png)",
        "After 6 steps:",
        "After 12 steps:",
    ):
        assert f"\n{line}\n" in f"\n{page}", page
    assert page.count("~~~text\nthe cat") == 2


def test_profile(done: tuple[Run, Path, loop.Result, str]) -> None:
    _, folder, _, _ = done
    (trace,) = (folder / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    names = {event.name for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
             for line in plane.lines for event in line.events}  # fmt: skip
    assert any("step" in name for name in names)


def test_a_finished_run_says_so_again(done: tuple[Run, Path, loop.Result, str]) -> None:
    run, folder, result, _ = done
    lines = (folder / "metrics.jsonl").read_bytes()
    again, shown = train(run, folder)
    assert again == result
    assert "resumed from the checkpoint of step 12" in shown
    assert (folder / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize("damage", [None, b"", b'{"step": 1, "lo', b"\xff\xfe\n[]\n3\nnull\n{}\n"])
def test_damaged_metrics_end_nothing(
    done: tuple[Run, Path, loop.Result, str], tmp_path: Path, damage: bytes | None
) -> None:
    run, folder, result, _ = done
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    if damage is not None:
        (tmp_path / "run" / "metrics.jsonl").write_bytes(damage)
    again, _ = train(run, tmp_path / "run")
    assert again.step == result.step
    assert math.isnan(again.loss)


def test_without_matplotlib(
    done: tuple[Run, Path, loop.Result, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder, _, _ = done
    facts = report.summary(folder, run.steps) | {"heldout_bytes": 1, "parameters": 1, "devices": "", "data": ""}
    facts["bytes_per_token"] = 3.0
    (tmp_path / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = report.write(tmp_path, run, facts | {"tokens_per_second": 1.0}).read_text()
    assert "matplotlib is not installed (`pip install 'flaxzoo[viz]'`)." in page
    assert not (tmp_path / "loss.png").exists()


def test_nothing_held_out(tiny: Run, tmp_path: Path) -> None:
    run = tiny.replace(steps=3, eval_every=1, **{"data.heldout": 0.0})
    result, shown = train(run, tmp_path / "all")
    assert result.heldout_bits_per_byte is None
    assert "no text was held out after 3 steps" in shown
    assert "bits per byte" not in shown
    assert "| held-out | no text was held out |" in (tmp_path / "all" / "report.md").read_text()
    assert (tmp_path / "all" / "loss.png").stat().st_size > 5_000


# A run that can't go on.


def test_divergence_stops_the_run(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = meshes.place
    poisoned = iter([False, False, True, False, True, True, True, True])

    def poison(batch: dict[str, np.ndarray], *rest: Any) -> Any:
        weights = np.where(next(poisoned), np.inf, batch["weights"]).astype(np.float32)
        return place(batch | {"weights": weights}, *rest)

    monkeypatch.setattr(meshes, "place", poison)
    run = tiny.replace(steps=50, save_every=1, max_bad_steps=3, keep_last=8, **{"data.heldout": 0.0})
    with pytest.raises(loop.Diverged) as caught:
        train(run, tmp_path / "bad")
    assert str(caught.value) == (
        "loss, gradient or parameters were not finite in 3 steps in a row, up to step 7 (loss nan, gradient "
        "norm nan); none of them changed the model; try a lower learning rate than 0.01, a longer warmup than 2 "
        "steps, under another --name"
    )
    records = metrics.read(tmp_path / "bad")
    assert [record["bad_steps"] for record in records] == [0, 0, 1, 0, 1, 2, 3]
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 2, 3, 4]
    before, after = (parameters(run, tmp_path / "bad", step) for step in (4, 6))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert all(np.isfinite(array).all() for array in after.values())


@pytest.mark.parametrize(
    ("rate", "what"),
    [
        (1e25, "loss, gradient or parameters were not finite in 5 steps in a row, up to step 6"),
        (3e38, "loss, gradient or parameters were not finite in 5 steps in a row, up to step 5"),
    ],
)
def test_parameters_that_are_not_finite_are_never_saved(tiny: Run, tmp_path: Path, rate: float, what: str) -> None:
    hot = {"learning_rate": rate, "warmup_steps": 0, "schedule": "constant", "weight_decay": 10.0 * (rate > 1e38)}
    run = tiny.replace(
        steps=50, save_every=1, keep_last=9, **{"data.heldout": 0.0, "optimizer": tiny.optimizer.replace(**hot)}
    )
    with pytest.raises(loop.Diverged) as caught:
        train(run, tmp_path / "hot")
    assert what in str(caught.value)
    assert f"a lower learning rate than {rate}, a longer warmup than 0 steps, under another" in str(caught.value)
    steps = Checkpoints(tmp_path / "hot" / "checkpoints", read_only=True).steps()
    assert len(steps) == (5 if rate == 1e25 else 4)
    for step in steps:
        assert all(np.isfinite(array).all() for array in parameters(run, tmp_path / "hot", step).values())


@pytest.mark.parametrize("profile", ["10", "3:2", "a:b", "0:3", "1:2:3"])
def test_what_is_no_profile(tiny: Run, profile: str) -> None:
    with pytest.raises(ValueError, match=f"first and the last step to trace, like '10:13'.* got '{profile}'"):
        tiny.replace(profile=profile)


@pytest.mark.parametrize(
    ("field", "value"),
    [("accumulate", 3), ("steps", 0), ("batch", 0), ("keep_last", 0), ("eval_every", -1), ("save_every", -5),
     ("ema", 1.0), ("max_bad_steps", 0)],
)  # fmt: skip
def test_settings_that_make_no_sense(tiny: Run, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field}\b.*{value}"):
        tiny.replace(**{field: value})


# The folder.


def test_a_mistake_in_the_first_command_is_corrected_by_the_second(tiny: Run, tmp_path: Path) -> None:
    wrong = tiny.replace(**{"data.source": ("wordz.txt",)})
    with pytest.raises(ValueError, match=r"no file, folder or glob matches 'wordz\.txt'"):
        train(wrong, tmp_path / "run")
    result, shown = train(tiny.replace(steps=2), tmp_path / "run")
    assert result.step == 2
    assert "resumed" not in shown


def test_another_run_is_refused(tiny: Run, tmp_path: Path) -> None:
    run = tiny.replace(steps=2)
    first, _ = train(run, tmp_path / "run")
    other = run.replace(batch=16, **{"optimizer.learning_rate": 0.5, "model.block.0.mixer.window": 8})
    with pytest.raises(ValueError) as caught:
        train(other, tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path}/run holds a run with settings that cannot change:\n"
        "  model.block.0.mixer.window: None -> 8 (the parameters of a checkpoint belong to one model)\n"
        f"choose another --name; --weights {tmp_path}/run starts a new run from the parameters of this one"
    )
    with pytest.raises(ValueError) as caught:
        train(run.replace(batch=16), tmp_path / "run")
    assert f"{tmp_path}/run was started with other settings:\n  batch: 8 -> 16\n--allow-changes" in str(caught.value)
    assert Folder(tmp_path / "run").run() == run
    with pytest.raises(ValueError, match=r"has checkpoints up to step 2, which --fresh deletes; confirm it with"):
        train(run, tmp_path / "run", fresh=True)
    again, shown = train(run, tmp_path / "run", fresh=True, yes=True)
    assert again.loss == first.loss  # from the same seed
    assert "resumed" not in shown
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def files(folder: Path) -> dict[str, bytes]:
    """What a folder holds, without the lock."""
    return {f"{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_fresh_start_brings_the_earlier_run_back(tiny: Run, tmp_path: Path) -> None:
    """The folder is a link, which stays one."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    run = tiny.replace(steps=2)
    train(run, tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match="no file, folder or glob"):
        train(run.replace(**{"data.source": ("wordz.txt",)}), tmp_path / "run", fresh=True, yes=True)
    assert files(tmp_path / "run") == before
    train(run.replace(seed=1), tmp_path / "run", fresh=True, yes=True)
    assert (tmp_path / "run").is_symlink()
    assert Folder(tmp_path / "run").run().seed == 1
    assert not (tmp_path / "run" / ".replaced").exists()


@pytest.mark.parametrize("failing", ["data", "compilation"])
def test_a_failed_start_leaves_nothing(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def exhausted(run: Run) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    run, expected = tiny.replace(**{"data.source": ("wordz.txt",)}), "no file"
    with monkeypatch.context() as patch:
        if failing == "compilation":
            patch.setattr(loop, "make_step", exhausted)
            run, expected = tiny, "RESOURCE_EXHAUSTED"
        with pytest.raises((ValueError, RuntimeError), match=expected):
            train(run, tmp_path / "runs" / "run")
        assert list(tmp_path.iterdir()) == []
        train_two = tiny.replace(steps=2)
        patch.undo()
        train(train_two, tmp_path / "runs" / "run")
        before = files(tmp_path / "runs" / "run")
        if failing == "compilation":
            patch.setattr(loop, "make_step", exhausted)
        with pytest.raises((ValueError, RuntimeError), match=expected):
            train(run.replace(steps=4), tmp_path / "runs" / "run", allow_changes=True)
        assert files(tmp_path / "runs" / "run") == before


def test_a_finished_run_is_extended(tiny: Run, tmp_path: Path) -> None:
    """Metrics, report and picture continue, and the learning rate is that of the longer schedule."""
    run = tiny.replace(steps=4)
    train(run, tmp_path / "run")
    result, shown = train(run.replace(steps=6), tmp_path / "run")
    assert result.step == 6
    assert "changed from step 5 on:\n  steps: 4 -> 6\nthe learning rate follows the cosine schedule of 6 steps" in shown
    records = [record for record in metrics.read(tmp_path / "run") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    schedule = optimizer.schedule(run.optimizer, 6)
    assert records[4]["learning_rate"] == pytest.approx(float(np.asarray(schedule(4))))
    assert "| steps | 6 of 8 x 32 tokens" in (tmp_path / "run" / "report.md").read_text()
    assert Folder(tmp_path / "run").run().steps == 6
    again, shown = train(run.replace(steps=6), tmp_path / "run")
    assert again.step == 6
    assert "changed" not in shown
    with pytest.raises(ValueError, match=r"the run is at step 6 already, got steps=5"):
        train(run.replace(steps=5), tmp_path / "run")


def test_settings_that_change_are_recorded(tiny: Run, tmp_path: Path, text: Path) -> None:
    """Learning rate, batch and text change at step 2, and the resumed run is resumed again without a flag."""
    folder = tmp_path / "run"
    run = tiny.replace(steps=2)
    train(run, folder)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "more.txt").write_text("the dog sat on a green hill\n" * 200)
    source = (str(text), str(tmp_path / "more.txt"))
    other = run.replace(steps=4, batch=4, save_every=3, **{"optimizer.learning_rate": 1e-3, "data.source": source})
    _, shown = train(other, folder, allow_changes=True)
    assert "  optimizer.learning_rate: 0.01 -> 0.001\n" in shown
    assert "the data starts at its beginning: settings of the data changed" in shown
    (record,) = changes.History(folder).read()
    assert record["step"] == 2
    assert record["changes"]["batch"] == [8, 4]
    assert (folder / "tokenizer.json").read_bytes() == tokenizer
    assert changes.History(folder).tokens(other, 4) == 2 * 8 * 32 + 2 * 4 * 32
    result, shown = train(other.replace(steps=5), folder)
    assert result.step == 5
    assert "the data starts" not in shown
    with pytest.raises(ValueError, match="one optimizer"):
        train(other.replace(**{"optimizer.name": "sgd", "optimizer.b2": 0.95}), folder, allow_changes=True)


def test_later_checkpoints_are_deleted_only_if_that_is_confirmed(tiny: Run, tmp_path: Path) -> None:
    run = tiny.replace(steps=4, save_every=2)
    train(run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"--step 2 deletes the later checkpoints of .* \(step 4\); confirm it with"):
        train(run, tmp_path / "run", step=2)
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [2, 4]


def test_a_step_that_is_not_there(tiny: Run, tmp_path: Path) -> None:
    run = tiny.replace(steps=2)
    with pytest.raises(ValueError, match=r"run has no checkpoint of step 1, nor any other; leave out --step to start"):
        train(run, tmp_path / "run", step=1)
    train(run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"checkpoints of the steps \[2\], but none of step 1"):
        train(run, tmp_path / "run", step=1)


def test_a_folder_of_something_else(tiny: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ValueError, match="holds other files than a run's; choose another --name"):
            train(tiny, tmp_path, fresh=fresh)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_goes_on_elsewhere_is_left_alone(tiny: Run, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    with folder.open(tiny):  # as the job that runs has it
        folder.write(tiny)
        for options in ({"fresh": True}, {}):
            with pytest.raises(OSError, match="is being written to by another job"):
                train(tiny.replace(seed=1), folder.path, **options)
    assert folder.run() == tiny


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "Run"}', '{"kind": "Rum"}'])
def test_a_config_that_is_not_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json can't be read: "):
        Folder(tmp_path).run()


# Compiled programs.


@pytest.mark.parametrize("chosen", [True, False])
def test_compiled_programs_are_kept_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path / "cache"))
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine") if chosen else None)
        use_compilation_cache()
        expected = tmp_path / "mine" if chosen else tmp_path / "cache" / "jax"
        assert jax.config.jax_compilation_cache_dir == str(expected)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_a_refused_resume_leaves_the_tokenizer_alone(tiny: Run, tmp_path: Path):
    source = tmp_path / "book.txt"
    source.write_text("a small book of few words\n" * 300)
    run = tiny.replace(steps=2, **{"data.source": (str(source),)})
    loop.train(run, tmp_path / "run", console=Console(file=io.StringIO()))
    before = (tmp_path / "run/tokenizer.json").read_bytes()
    source.write_text("quite another text, that makes another tokenizer\n" * 300)
    with pytest.raises(ValueError, match="must be as they were|changed"):
        loop.train(run, tmp_path / "run", console=Console(file=io.StringIO()))
    assert (tmp_path / "run/tokenizer.json").read_bytes() == before


def test_fresh_and_step_exclude_each_other(tiny: Run, tmp_path: Path):
    loop.train(tiny.replace(steps=2), tmp_path / "run", console=Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="leave out one of them"):
        loop.train(tiny.replace(steps=2), tmp_path / "run", fresh=True, step=2)
    assert Checkpoints(tmp_path / "run/checkpoints", read_only=True).steps() == [2]


def test_a_loaded_model_generates_on_its_mesh(tiny: Run, tmp_path: Path):
    loop.train(tiny.replace(steps=2), tmp_path / "run", console=Console(file=io.StringIO()))
    texts = []
    for mesh in ("", "fsdp=2,tensor=2"):
        model, tokenizer = load(tmp_path / "run", mesh=mesh)
        texts.append(zoo.generate(model, tokenizer, ["the cat"], max_tokens=8, sampling=zoo.GREEDY))
    assert texts[0] == texts[1]


def test_evaluation_goes_by_micro_batches(tiny: Run):
    mesh, _ = meshes.make(tiny)
    with jax.set_mesh(mesh):
        state = initial_state(tiny, mesh)
        tokens = np.arange(tiny.batch * tiny.length, dtype=np.int32).reshape(tiny.batch, -1) % 300
        batch = dict.fromkeys(("tokens", "targets"), tokens) | {
            "segments": np.ones_like(tokens),
            "positions": np.tile(np.arange(tiny.length, dtype=np.int32), (tiny.batch, 1)),
            "weights": np.ones(tokens.shape, np.float32),
        }
        placed = meshes.place(batch, mesh)
        whole = make_evaluation(tiny)(state["params"], placed)
        parts = make_evaluation(tiny.replace(accumulate=4))(state["params"], placed)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)

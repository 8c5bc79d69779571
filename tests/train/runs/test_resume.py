"""A run that was interrupted, however it was, ends as one that was not: bitwise, by real processes and real signals."""

import contextlib
import json
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flaxzoo.configs import Run
from flaxzoo.train.checkpoints.checkpoints import Checkpoints, DamagedCheckpoint
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.runs import loop, metrics
from flaxzoo.train.runs.folder import Folder, load
from flaxzoo.train.step import abstract_state
from rich.console import Console

Zoo = Callable[..., subprocess.Popen[str]]


def quiet() -> Console:
    return Console(quiet=True)


def state(run: Run, folder: Path) -> dict[str, np.ndarray]:
    """All that a run's latest checkpoint holds, by path."""
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        restored, _ = checkpoints.restore(abstract_state(run, mesh))
    restored["rng"] = jax.random.key_data(restored["rng"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(restored)}


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of metrics.jsonl, which must all be whole."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def assert_as_one(run: Run, interrupted: Path, whole: Path) -> None:
    """Bitwise the same losses, each step once, the same scores, and the same state at the end."""
    assert [step for step, _ in losses(interrupted)] == list(range(1, run.steps + 1))
    assert losses(interrupted) == losses(whole)
    scores = [[r for r in metrics.read(folder) if "heldout_bits_per_byte" in r] for folder in (interrupted, whole)]
    assert scores[0] == scores[1]
    found, expected = state(run, interrupted), state(run, whole)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


# In one process.


class Stop(Exception):
    pass


def stopped(run: Run, folder: Path, after: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Trains until `after` batches were taken; the batches."""
    taken: list[Any] = []
    place = meshes.place

    def take(batch: Any, *rest: Any) -> Any:
        if len(taken) == after:
            raise Stop
        taken.append(batch)
        return place(batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(meshes, "place", take)
        try:
            loop.train(run, folder, console=quiet(), **options)
        except Stop:
            assert after < run.steps
    return taken


OTHER = {"ema": 0.9, "optimizer.name": "muon", "dtype": "bfloat16", "accumulate": 2}


@pytest.mark.parametrize("changes", [{}, pytest.param(OTHER, marks=pytest.mark.slow)])
def test_resumed_is_uninterrupted(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    run = tiny.replace(save_every=3, **{"data.heldout": 0.0}, **changes)
    batches = stopped(run, tmp_path / "whole", 10, monkeypatch)
    assert len(batches) == 10
    first = stopped(run, tmp_path / "run", 5, monkeypatch)
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [3]
    second = stopped(run, tmp_path / "run", 10, monkeypatch)
    assert (len(first), len(second)) == (5, 7)
    for taken, wanted in ((first, batches[:5]), (second, batches[3:])):
        for left, right in zip(taken, wanted, strict=True):
            jax.tree.map(np.testing.assert_array_equal, left, right)
    assert_as_one(run, tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("mesh", ["pipeline=2,tensor=2", pytest.param("fsdp=2,tensor=2", marks=pytest.mark.slow)])
def test_layout_may_change(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: str) -> None:
    """Onto another mesh with micro-batches, the losses go on within 1e-5; what it saves goes onto the first again."""
    run = tiny.replace(save_every=5, **{"data.heldout": 0.0})
    loop.train(run, tmp_path / "whole", console=quiet())
    stopped(run, tmp_path / "run", 7, monkeypatch)
    other = run.replace(mesh=mesh, accumulate=2, save_every=2, keep_last=3)
    result = loop.train(other, tmp_path / "run", console=quiet())
    assert Folder(tmp_path / "run").run() == other
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert [step for step, _ in found] == list(range(1, 11))
    assert found[:5] == expected[:5]
    assert found[5:] != expected[5:]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert result.step == 10
    ended, wanted = state(run, tmp_path / "run"), state(run, tmp_path / "whole")
    for name, array in wanted.items():
        np.testing.assert_allclose(ended[name], array, rtol=2e-3, atol=2e-4, err_msg=name)


def test_going_on_from_an_earlier_step(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.replace(save_every=2, keep_last=9, **{"data.heldout": 0.0})
    loop.train(run, tmp_path / "whole", console=quiet())
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    stopped(run, tmp_path / "run", 1, monkeypatch, step=4, yes=True)
    # Killed before it saved: later checkpoints went along with their metrics, so nothing is missing in the end.
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [2, 4]
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]
    loop.train(run, tmp_path / "run", console=quiet())
    assert_as_one(run, tmp_path / "run", tmp_path / "whole")


def test_other_text_is_refused(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are the same, but not what the file holds."""
    file = tmp_path / "own.txt"
    file.write_text("some words and more of them\n" * 200)
    run = tiny.replace(save_every=2, **{"data.source": (str(file),)})
    stopped(run, tmp_path / "run", 4, monkeypatch)
    file.write_text("other words or fewer of them\n" * 200)
    with pytest.raises(
        ValueError, match=r"the order \(text, tokenizer, .*must be as they were, but order is '\w+' and"
    ):
        loop.train(run, tmp_path / "run", console=quiet())


def test_a_profile_ends_and_begins_with_a_run(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and resumed in the middle of the traced steps: what was run is traced, and each trace is whole."""
    run = tiny.replace(save_every=4, profile="4:6", **{"data.heldout": 0.0})
    stopped(run, tmp_path / "run", 5, monkeypatch)
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    time.sleep(1.1)  # traces are named by the second
    loop.train(run, tmp_path / "run", console=quiet())
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 2


# By real processes and real kills.


@pytest.fixture(scope="module")
def killable(tiny: Run) -> Run:
    return tiny.replace(steps=120, save_every=10, eval_every=20, ema=0.9)


@pytest.fixture(scope="module")
def whole(killable: Run, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run without an interruption."""
    folder = made(killable, tmp_path_factory.mktemp("runs") / "whole")
    command = [sys.executable, "-c", "from flaxzoo.train.commands.cli import main; main()", "train", str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=240, capture_output=True)
    return folder


def outcome(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    shown, errors = process.communicate(timeout=timeout)
    return process.returncode, shown, errors


def made(run: Run, folder: Path) -> Path:
    """A folder with the run's config alone, as a command leaves that was killed at once."""
    Folder(folder).open(run).close()
    Folder(folder).write(run)
    return folder


def whole_steps(folder: Path) -> list[int]:
    return Checkpoints(folder / "checkpoints", read_only=True).steps()


def until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Waits for a condition, or for the end of the process."""
    while process.poll() is None and not condition():
        time.sleep(0.0005)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(moment: str, process: subprocess.Popen[str], folder: Path, source: random.Random) -> None:
    """Kills a run while it starts, between two steps, or in the middle of a save."""
    partials = folder / "checkpoints"
    at_start = partials.stat().st_mtime_ns if partials.exists() else 0
    if moment == "start":
        time.sleep(source.uniform(0.0, 4.0))
    else:
        # It trains again once the folder of checkpoints changes.
        until(lambda: partials.exists() and partials.stat().st_mtime_ns != at_start, process)
        wanted = lines(folder) + source.randint(8, 20)
        until(lambda: lines(folder) > wanted, process)
        if moment == "save":
            until(lambda: any(partials.glob("*.partial")), process)
            time.sleep(source.uniform(0, 0.03))
        else:
            time.sleep(source.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)


def kill_often(run: Run, folder: Path, zoo: Zoo, moments: list[str], seed: int) -> None:
    """Trains to the end with a kill at each of the moments; every restart must go on from the last whole checkpoint."""
    source = random.Random(seed)
    halves = resumed = kills = 0
    made(run, folder)
    for moment in [*moments, ""]:
        before = whole_steps(folder)
        process = zoo("train", folder)
        if moment:
            kill_at(moment, process, folder, source)
        code, shown, errors = outcome(process)
        assert errors == "", (seed, moment)
        kills += code == -signal.SIGKILL
        assert code == (-signal.SIGKILL if moment else 0), (seed, moment, shown)
        found = re.findall(r"^resumed from the checkpoint of step (\d+)$", shown, re.MULTILINE)
        if found or moment != "start":
            assert found == [str(step) for step in before[-1:]], (seed, moment, shown)
        resumed += len(found)
        halves += any((folder / "checkpoints").glob("*.partial"))
    assert kills == len(moments)
    assert resumed >= len(moments) // 2, "hardly any restart had a checkpoint to go on from"
    assert halves, "no kill fell into a save"


def test_kills(killable: Run, whole: Path, tmp_path: Path, zoo: Zoo) -> None:
    kill_often(killable, tmp_path / "killed", zoo, ["step", "save", "save"], seed=int(time.time()))
    assert_as_one(killable, tmp_path / "killed", whole)


@pytest.mark.slow
def test_many_kills(killable: Run, tmp_path: Path, zoo: Zoo) -> None:
    run = killable.replace(steps=1200, save_every=4, eval_every=50)
    moments = [*["start", "step", "save", "save"] * 6, "step"]
    kill_often(run, tmp_path / "killed", zoo, moments, seed=int(time.time()))
    assert outcome(zoo("train", made(run.replace(save_every=0), tmp_path / "whole")))[0] == 0
    assert_as_one(run, tmp_path / "killed", tmp_path / "whole")


# Signals that ask.


def test_signals_save_and_stop(killable: Run, whole: Path, tmp_path: Path, zoo: Zoo) -> None:
    """Ctrl-C, then SIGTERM, then the command of the message: as if nothing had been."""
    run = killable.replace(save_every=0)
    folder = made(run, tmp_path / "run")
    command = ["train", str(folder)]
    before = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = zoo(*command)
        until(lambda before=before: lines(folder) > before + 5, process)
        process.send_signal(number)
        status, shown, errors = outcome(process)
        step = whole_steps(folder)[-1]
        assert before < step < run.steps
        assert status == code
        assert errors == f"{number.name}: stopped and saved at step {step}; `zoo train {folder}` goes on from there\n"
        assert (f"resumed from the checkpoint of step {before}\n" in shown) == bool(before)
        assert [step for step, _ in losses(folder)] == list(range(1, step + 1))
        command = re.findall("`zoo (.*)`", errors)[0].split()
        before = step
    status, shown, errors = outcome(zoo(*command))
    assert (status, errors) == (0, "")
    assert f"resumed from the checkpoint of step {before}\n" in shown
    assert_as_one(run, folder, whole)


# Damage and full disks.


def test_a_damaged_checkpoint(tiny: Run, tmp_path: Path, zoo: Zoo) -> None:
    run = tiny.replace(save_every=4, keep_last=3)
    folder = tmp_path / "my run"
    loop.train(run, folder, console=quiet())
    before = losses(folder)
    assert whole_steps(folder) == [4, 8, 10]
    files = [path for path in (folder / "checkpoints" / "10" / "state" / "params").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    named = file.relative_to(folder / "checkpoints" / "10")
    status, _, errors = outcome(zoo("train", folder))
    assert status == 1
    assert errors.startswith(f"error: the checkpoint of step 10 in {folder}/checkpoints is damaged: {named}: ")
    offer = f"`zoo train '{folder}' --step 8 --yes`"
    assert errors.endswith(f"; the last whole one is step 8: {offer} deletes later ones and continues\n"), errors
    with pytest.raises(DamagedCheckpoint, match="step 10 .* is damaged"):
        load(folder)
    status, shown, errors = outcome(zoo(*shlex.split(offer.strip("`"))[1:]))
    assert (status, errors) == (0, "")
    assert "resumed from the checkpoint of step 8\n" in shown
    assert whole_steps(folder) == [4, 8, 10]
    np.testing.assert_allclose(losses(folder), before, rtol=1e-5)
    load(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted only by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Fills a disk but for some bytes."""
    free = shutil.disk_usage(folder).free
    with contextlib.suppress(OSError):  # a job that writes meanwhile may take the last of it first
        (folder / "filler").write_bytes(bytes(max(0, free - leave)))


def test_a_disk_that_is_too_small_is_seen_before_training(tiny: Run, small_disk: Path, zoo: Zoo) -> None:
    fill(small_disk, 600_000)
    folder = made(tiny, small_disk / "run")
    status, _, errors = outcome(zoo("train", folder))
    assert status == 1
    assert errors.startswith(f"error: cannot hold checkpoints in {folder}/checkpoints: 4 copies of the state need ")
    assert whole_steps(folder) == []


@pytest.mark.parametrize("leave", [400_000, 0], ids=["for metrics", "for nothing"])
def test_a_disk_that_fills_up(tiny: Run, small_disk: Path, zoo: Zoo, leave: int) -> None:
    """In the middle of a run: one clear error, no hang, and the earlier checkpoint still loads."""
    run = tiny.replace(steps=5000, save_every=40, eval_every=0)
    folder = made(run, small_disk / "run")
    process = zoo("train", folder)
    until(lambda: whole_steps(folder), process)
    fill(small_disk, leave)
    status, _, errors = outcome(process)
    assert status == 1
    assert errors.count("\n") == 1, errors
    kept = whole_steps(folder)[-1]
    if leave:
        assert re.match(
            rf"error: cannot save the checkpoint of step \d+ in {folder}/checkpoints: no space left", errors
        )
        assert f"the last whole checkpoint is step {kept}, still intact" in errors
    else:
        assert re.match(rf"error: cannot (write|save) .*{folder}.*: no space left on the device; ", errors), errors
    assert f"`zoo train {folder}` continues" in errors
    assert int(state(run, folder)["['step']"]) == kept
    if leave:
        return
    (small_disk / "filler").unlink()
    process = zoo("train", folder)
    until(lambda: lines(folder) > kept + 60, process)
    process.send_signal(signal.SIGTERM)
    status, shown, errors = outcome(process)
    assert (status, errors[:7]) == (143, "SIGTERM")
    assert f"resumed from the checkpoint of step {kept}\n" in shown
    steps = [step for step, _ in losses(folder)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_folder_that_cannot_be_written(tiny: Run, small_disk: Path, zoo: Zoo) -> None:
    folder = made(tiny, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for arguments in (("train", folder), ("train", "shakespeare", "--runs", small_disk)):
        status, _, errors = outcome(zoo(*arguments))
        assert status == 1
        assert errors.count("\n") == 1, errors
        assert "Read-only file system" in errors
        assert "make it writable, or choose another" in errors

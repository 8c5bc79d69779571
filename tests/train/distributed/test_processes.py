"""Several processes train one run: real ones, over loopback, killed, stopped, and resumed by another number."""

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flaxzoo.configs import Run
from flaxzoo.train.distributed import cluster, processes
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.distributed import watchdog as roll
from flaxzoo.train.runs import loop, metrics
from flaxzoo.train.runs.folder import Folder
from rich.console import Console

LIMIT = 300
"""Seconds after which a job is taken to hang."""

WORKER = """
import json, os, signal, sys, time, zlib
from pathlib import Path
from flaxzoo.train.checkpoints import manifest
from flaxzoo.train.commands.cli import main
from flaxzoo.train.distributed import cluster, mesh
from flaxzoo.train.runs import folder, loop

place, taken = mesh.place, []

def noted(batch, *rest):
    placed = place(batch, *rest)
    taken.append(0)
    before(len(taken))
    seen = {}
    for shard in placed["tokens"].addressable_shards:
        rows = range(placed["tokens"].shape[0])[shard.index[0]]
        columns = shard.index[1].indices(placed["tokens"].shape[1])[0]
        seen |= {f"{row},{columns}": zlib.crc32(tokens) for row, tokens in zip(rows, shard.data.__array__())}
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps(seen) + "\\n")
    return placed

def before(count):
    pass

def end():
    os.kill(os.getpid(), signal.SIGKILL)

mesh.place = noted
exec(os.environ.get("BEFORE", ""))
main()
"""


class Workers:
    """A job of several `zoo` processes on this machine."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment = environment
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        self.jobs = 0

    def start(
        self, count: int, *arguments: object, devices: int = 2, before: dict[int, str] | None = None, **changes: Any
    ) -> list[subprocess.Popen[str]]:
        """Starts `zoo ARGUMENTS` in `count` processes; `before` holds code that a process runs first."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.jobs += 1
        found = []
        for index in range(count):  # of more, if `only` some are started
            given = {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(changes.get("only", count)),
                "JAX_PROCESS_ID": str(index),
                "SEEN": str(self.folder / f"seen.{self.jobs}.{index}"),
                "BEFORE": (before or {}).get(index, ""),
            }
            arguments_of = changes.get("arguments_of", {}).get(index, ())
            process = subprocess.Popen(
                [sys.executable, "-c", WORKER, *map(str, arguments), *map(str, arguments_of)],
                cwd=changes.get("cwd", {}).get(index, self.folder),
                env=self.environment | given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            found.append(process)
        self.started += found
        return found

    def run(self, count: int, *arguments: object, **options: Any) -> list[tuple[int, str, str]]:
        """The same to the end: exit code, standard output and standard error of each."""
        return [outcome(process) for process in self.start(count, *arguments, **options)]

    def seen(self) -> list[dict[str, int]]:
        """What tokens the latest job put on its devices, batch by batch: a checksum by row and first column."""
        files = sorted(self.folder.glob(f"seen.{self.jobs}.*"))
        every = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        joined = []
        for parts in zip(*every, strict=False):
            batch: dict[str, int] = {}
            for part in parts:
                assert all(batch.get(name, value) == value for name, value in part.items())
                batch |= part
            joined.append(batch)
        return joined


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors, without what Gloo says of its connections."""
    shown, errors = process.communicate(timeout=LIMIT)
    plain = [re.sub(r"\[Gloo\] .*\n", "", text) for text in (shown, errors)]
    return process.returncode, plain[0], plain[1]


@pytest.fixture
def workers(environment: dict[str, str], tmp_path: Path) -> Iterator[Workers]:
    started = Workers(environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}, tmp_path)
    yield started
    for process in started.started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def run(tiny: Run) -> Run:
    return tiny.replace(mesh="fsdp=4", save_every=4, eval_every=4, **{"data.heldout": 0.05})


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory, quick_compiler: None) -> tuple[Path, list[Any]]:
    """The run in one process without interruption, and the tokens of its batches."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, trained(run, folder)


def trained(run: Run, folder: Path) -> list[dict[str, int]]:
    """Trains in this process; a checksum of each row of each batch."""
    found = []
    place = meshes.place

    def noted(batch: Any, *rest: Any) -> Any:
        found.append(
            {f"{row},0": zlib.crc32(tokens) for row, tokens in enumerate(np.ascontiguousarray(batch["tokens"]))}
        )
        return place(batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "place", noted)
        loop.train(run, folder, console=Console(quiet=True))
    return found


def made(run: Run, folder: Path) -> Path:
    folder.mkdir(parents=True)
    Folder(folder).write(run)
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in metrics.read(folder) if "loss" in record]


def scores(folder: Path) -> list[float]:
    return [r["heldout_bits_per_byte"] for r in metrics.read(folder) if "heldout_bits_per_byte" in r]


def assert_close(found: Path, expected: Path) -> None:
    """Each step once, with losses and scores within float tolerance."""
    assert [step for step, _ in losses(found)] == [step for step, _ in losses(expected)]
    np.testing.assert_allclose(losses(found), losses(expected), rtol=1e-5)
    np.testing.assert_allclose(scores(found), scores(expected), rtol=1e-5)


KILLED = """
def before(count):
    if count == BATCH:
        while not Path("run/checkpoints/4/manifest.json").exists():
            time.sleep(0.05)
        end()
"""


def test_two_processes_lose_one_and_one_goes_on(
    run: Run, whole: tuple[Path, list[Any]], workers: Workers, tmp_path: Path
) -> None:
    """Killed after the checkpoint of step 4; the other stops at once and says how to go on; one process does."""
    alone, batches = whole
    folder = made(run, tmp_path / "run")
    evaluated = len(batches) - run.steps
    of_each = evaluated // 3  # after steps 4, 8 and 10
    killed_at = 4 + of_each + 2
    first, second = workers.start(2, "train", "run", before={1: KILLED.replace("BATCH", f"{killed_at}")})
    assert outcome(second)[0] == -signal.SIGKILL
    dead = time.monotonic()
    code, shown, errors = outcome(first)
    assert time.monotonic() - dead < 20
    assert code == 1
    assert errors == (
        f"error: process 1 of 2 (on {socket.gethostname()}) was lost: it was killed, or its machine went down; the "
        "last whole checkpoint is that of step 4: `zoo train run` goes on from there\n"
    )
    assert "devices fsdp=4 on 4 x cpu" in shown
    assert workers.seen()[: 4 + of_each] == batches[: 4 + of_each]
    np.testing.assert_allclose(losses(folder)[:4], losses(alone)[:4], rtol=1e-5)
    np.testing.assert_allclose(scores(folder)[:1], scores(alone)[:1], rtol=1e-5)
    other = run.replace(mesh="fsdp=2,tensor=2", accumulate=2)
    assert trained(other, folder) == batches[4 + of_each :]
    assert_close(folder, alone)


# More of them, and every way to stop.


def assert_seen(workers: Workers, batches: list[dict[str, int]], columns: int) -> None:
    """The rows on the devices were those of one process, whole or cut into columns."""
    seen = workers.seen()
    assert len(seen) == len(batches)
    for found, expected in zip(seen, batches, strict=True):
        assert {name.split(",")[0] for name in found} == {name.split(",")[0] for name in expected}
        assert len(found) == columns * len(expected)
        if columns == 1:
            assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "devices", "columns"),
    [("fsdp=4", 1, 1), ("fsdp=2,tensor=2", 1, 1), ("context=4", 1, 4), ("dcn=4,fsdp=2", 2, 1)],
)
def test_four_processes(
    run: Run, whole: tuple[Path, list[Any]], workers: Workers, tmp_path: Path, mesh: str, devices: int, columns: int
) -> None:
    """Also where several processes hold the same rows, or parts of them: each reads what its devices hold."""
    folder = made(run.replace(mesh=mesh), tmp_path / "run")
    found = workers.run(4, "train", "run", devices=devices)
    assert [(code, errors) for code, _, errors in found] == [(0, "")] * 4, found
    assert [shown for _, shown, _ in found[1:]] == [""] * 3
    assert_close(folder, whole[0])
    assert_seen(workers, whole[1], columns)
    assert (folder / "report.md").is_file()


@pytest.mark.slow
def test_the_same_layout_is_bitwise(run: Run, workers: Workers, tmp_path: Path) -> None:
    run = run.replace(sample_every=10)
    whole = made(run, tmp_path / "whole")
    assert [code for code, *_ in workers.run(2, "train", whole)] == [0, 0]
    folder = made(run, tmp_path / "run")
    codes = [code for code, *_ in workers.run(2, "train", "run", before={0: KILLED.replace("BATCH", "9")})]
    assert codes == [-signal.SIGKILL, 1]
    assert [code for code, *_ in workers.run(2, "train", folder)] == [0, 0]
    assert losses(folder) == losses(whole)
    assert scores(folder) == scores(whole)
    texts = [[record["sample"] for record in metrics.read(each) if "sample" in record] for each in (folder, whole)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 1


@pytest.mark.slow
def test_the_first_is_lost(run: Run, workers: Workers, tmp_path: Path) -> None:
    """Every other one says so. The runtime notices too, and may end a process before we do."""
    made(run, tmp_path / "run")
    found = workers.run(4, "train", "run", devices=1, before={0: KILLED.replace("BATCH", "9")})
    assert found[0][0] == -signal.SIGKILL
    assert all(code in (1, -signal.SIGABRT) for code, *_ in found[1:])
    told = f"error: process 0 of 4 (on {socket.gethostname()}) was lost: "
    assert any(told in errors and "`zoo train run` goes on from there" in errors for _, _, errors in found[1:])


@pytest.mark.slow
def test_killed_in_a_save(run: Run, whole: tuple[Path, list[Any]], workers: Workers, tmp_path: Path) -> None:
    """No half checkpoint has a whole one's name, and another number of processes goes on."""
    folder = made(run, tmp_path / "run")
    seal = """
seal = manifest.seal
manifest.seal = lambda folder, facts: end() if facts["step"] == 8 else seal(folder, facts)
"""
    found = workers.run(2, "train", "run", before={0: seal})
    assert found[0][0] == -signal.SIGKILL
    assert found[1][0] != 0
    assert (folder / "checkpoints" / "8.partial").is_dir()
    assert not (folder / "checkpoints" / "8").exists()
    found = workers.run(4, "train", "run", devices=1)
    assert "resumed from the checkpoint of step 4\n" in found[0][1]
    assert [(code, errors) for code, _, errors in found] == [(0, "")] * 4
    assert_close(folder, whole[0])


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(
    run: Run, whole: tuple[Path, list[Any]], workers: Workers, tmp_path: Path
) -> None:
    folder = made(run.replace(save_every=0, eval_every=0), tmp_path / "run")
    sent = """
def before(count):
    if count == 5:
        os.kill(os.getpid(), signal.SIGTERM)
"""
    found = workers.run(2, "train", "run", before={1: sent})
    assert [code for code, *_ in found] == [143, 143]
    (step,) = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()]
    assert 5 <= step <= 7
    assert found[0][2] == f"SIGTERM: stopped and saved at step {step}; `zoo train run` goes on from there\n"
    assert found[1][2] == ""
    assert len(workers.seen()) == step
    loop.train(run.replace(save_every=0, eval_every=0, mesh="fsdp=1"), folder, console=Console(quiet=True))
    np.testing.assert_allclose(losses(folder), losses(whole[0]), rtol=1e-5)


@pytest.mark.slow
def test_an_error_of_one_ends_all(run: Run, workers: Workers, tmp_path: Path) -> None:
    """Its text reaches the user through the first process, which stays until the others are gone."""
    made(run, tmp_path / "run")
    failing = """
from flaxzoo.train import roll
stop = roll.stop
roll.stop = lambda *rest, **options: time.sleep(0.5) or stop(*rest, **options)
def before(count):
    if count == 6:
        raise OSError("the disk of this machine is full")
"""
    found = workers.run(2, "train", "run", before={1: failing})
    assert [code for code, *_ in found] == [1, 1]
    assert found[0][2] == f"process 1 of 2 (on {socket.gethostname()}): error: the disk of this machine is full\n"
    assert found[1][2] == ""


@pytest.mark.slow
def test_a_full_disk_ends_all(run: Run, workers: Workers, tmp_path: Path) -> None:
    made(run, tmp_path / "run")
    full = """
def fail(folder, facts):
    raise OSError(28, "No space left on device")
manifest.seal = fail
"""
    found = workers.run(2, "train", "run", before={0: full})
    assert [code for code, *_ in found] == [1, 1]
    assert "cannot save the checkpoint of step 4 in run/checkpoints: no space left on the device" in found[0][2]
    assert found[0][2].count("\n") == 1
    assert found[1][2] == ""


@pytest.mark.slow
def test_all_must_be_told_the_same(run: Run, workers: Workers, tmp_path: Path) -> None:
    made(run, tmp_path / "run")
    found = workers.run(2, "train", "run", arguments_of={1: ["--batch", "16"]})
    assert [code for code, *_ in found] == [1, 1]
    assert found[0][2].startswith(
        "error: all processes must have the same batch, but process 0 has 8 and process 1 16 "
    )
    assert found[1][2] == ""


@pytest.mark.slow
def test_a_folder_that_is_not_shared(run: Run, workers: Workers, tmp_path: Path) -> None:
    other = tmp_path / "other machine"
    for place in (tmp_path, other):
        made(run, place / "run")
    soon = "folder.VISIBLE = 1.0"
    found = workers.run(2, "train", "run", cwd={1: other}, before={0: soon, 1: soon})
    assert [code for code, *_ in found] == [1, 1]
    assert "process 1 does not see what process 0 wrote to " in found[0][2]


@pytest.mark.slow
def test_generation_and_evaluation(run: Run, whole: tuple[Path, list[Any]], workers: Workers, tmp_path: Path) -> None:
    """What several processes write and score is what one does, and one prints it."""
    folder, text = whole[0], run.data.source[0]
    write = ("generate", folder, "--prompt", "the cat", "--max-tokens", 20, "--temperature", 0)
    score = ("eval", folder, "--text", text, "--length", 64, "--json")
    for command in (write, score):
        (code, alone, errors), *_ = workers.run(1, *command)
        assert (code, errors.strip()) == (0, "")
        found = workers.run(2, *command)
        assert [(code, errors.strip()) for code, _, errors in found] == [(0, "")] * 2
        assert found[1][1] == ""
        if command is write:
            assert found[0][1] == alone
        else:
            numbers = [json.loads(shown)["all"]["bits_per_byte"] for shown in (alone, found[0][1])]
            np.testing.assert_allclose(*numbers, rtol=1e-5)


@pytest.mark.slow
def test_nobody_there(workers: Workers) -> None:
    """A process that waits in vain says for whom."""
    (process,) = workers.start(1, "train", "run", before={0: "cluster.START = 3"}, only=2)
    code, _, errors = outcome(process)
    assert code == 1
    assert errors.startswith(
        "error: the processes of this job (told of by variables, JAX_COORDINATOR_ADDRESS=127.0.0.1:"
    )
    assert "did not find each other in 3 seconds; start all of them" in errors


@pytest.mark.slow
def test_from_weights(run: Run, whole: tuple[Path, list[Any]], workers: Workers, tmp_path: Path) -> None:
    run = run.replace(weights=str(whole[0]), steps=4)
    trained(run, tmp_path / "alone")
    folder = made(run, tmp_path / "run")
    assert [(code, errors) for code, _, errors in workers.run(2, "train", "run")] == [(0, "")] * 2
    assert_close(folder, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_wrong_flag_of_one_ends_all(run: Run, workers: Workers, tmp_path: Path, index: int) -> None:
    """It says itself what is wrong; the first one says which it is, and none waits for it."""
    made(run, tmp_path / "run")
    began = time.monotonic()
    found = workers.run(2, "train", "run", arguments_of={index: ["--stepz", "4"]})
    assert time.monotonic() - began < 60
    assert [code for code, *_ in found] == [2, 2]
    assert "--stepz" in found[index][2]
    of_another = f"process 1 of 2 (on {socket.gethostname()}): it ended with code 2; its own output says more\n"
    assert found[1 - index][2] == (of_another if index else "")


@pytest.mark.slow
def test_nobody_reads(run: Run, workers: Workers, tmp_path: Path) -> None:
    """What the first one shows: all end without a word, as one alone does."""
    made(run, tmp_path / "run")
    broken = """
def before(count):
    raise BrokenPipeError
"""
    found = workers.run(2, "train", "run", before={0: broken})
    assert [(code, errors) for code, _, errors in found] == [(141, "")] * 2


@pytest.mark.slow
def test_one_cannot_reach_the_first(workers: Workers) -> None:
    """All say so; so they do where one of them has fewer devices."""
    far = """
from flaxzoo.train import roll
def refused(*_, **__):
    raise OSError
roll.socket.create_connection = refused
"""
    found = workers.run(2, "train", "shakespeare", before={1: far})
    assert [code for code, *_ in found] == [1, 1]
    assert all(errors.startswith("error: this process, on ") for _, _, errors in found)
    fewer = "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=1'"
    found = workers.run(2, "train", "shakespeare", before={1: fewer})
    assert [code for code, *_ in found] == [1, 1]
    assert all(errors.startswith("error: every process must have as many devices, got [2, 1]") for *_, errors in found)


# What one process can show.


def test_the_first_asks_no_others() -> None:
    for ask in (lambda: processes.first(str), lambda: processes.gather(1)):
        with pytest.raises(AssertionError, match="may not ask the others"):
            processes.first(ask)
    assert processes.first(lambda: 1) == 1


def test_one_process_reads_its_number_late() -> None:
    """A signal counts for the step that it came in."""
    caught = [0]
    number = processes.largest(lambda: caught[-1], jax.make_mesh((1,), ("fsdp",)))
    caught.append(15)
    assert number() == 15


def test_strangers_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they send ends nothing."""
    made, create = [], socket.create_server
    monkeypatch.setattr(socket, "create_server", lambda *a, **k: made.append(create(*a, **k)) or made[-1])
    monkeypatch.setattr(roll, "stop", lambda text: pytest.fail(text))
    watch = roll.Watchdog()
    for said in (b"GET / HTTP/1.1\n", b'{"process": 1}\n', b"[" * 100_000 + b"\n", b"x" * (roll.LONGEST + 1)):
        with socket.create_connection(("127.0.0.1", made[0].getsockname()[1]), timeout=20) as stranger:
            with contextlib.suppress(OSError):
                stranger.sendall(said)
            with contextlib.suppress(ConnectionResetError):  # closed with some of it unread
                assert stranger.recv(1) == b""
    watch.end()


def test_no_watch_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in the thread that watches, the process does not go on without it."""
    told: list[str] = []
    monkeypatch.setattr(roll, "stop", told.append)
    monkeypatch.setattr(selectors, "DefaultSelector", lambda: {}["none left"])
    roll.Watchdog().end()
    assert told == ["error: the processes of this job cannot watch each other: KeyError('none left')"]


def test_the_end_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody is there any more to read why."""

    def broken(*_: object) -> None:
        raise BrokenPipeError

    ends: list[Any] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(os, "write", broken)
    monkeypatch.setattr(threading.Timer, "start", lambda timer: ends.append(timer.interval))
    roll.stop("error", 3, last=lambda: ends.append("last"))
    assert ends == [5, "last", 3]


# What the environment says.

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
GIVEN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        (GIVEN, ()),
        (GIVEN | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, (2, 3)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (1,)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (2, 3)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, ()),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "CUDA_VISIBLE_DEVICES": "0,1"}, ()),
        (OPEN_MPI, ()),
        (SLURM | OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
    ],
    ids=[
        "given",
        "given devices",
        "SLURM",
        "SLURM shares",
        "SLURM gave one",
        "SLURM one a node",
        "Open MPI",
        "Open MPI in SLURM",
    ],
)
def test_a_job_is_found(environment: dict[str, str], devices: tuple[int, ...]) -> None:
    """And a process gets its share of the machine's GPUs, never fewer than there are for it."""
    group = cluster.find(environment)
    assert group is not None
    assert group.devices == devices


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"},
        SLURM | {"JAX_NUM_PROCESSES": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        SLURM | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
    ids=[
        "none",
        "told so",
        "told so in SLURM",
        "a shell in SLURM",
        "a batch script",
        "Open MPI",
        "Open MPI in SLURM",
        "one TPU host",
    ],
)
def test_alone(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.hardware, "has_tpu", lambda: True)
    monkeypatch.setattr(cluster, "_metadata", lambda key: "0:0:10.0.0.1")
    assert cluster.find(environment) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "told together, but JAX_PROCESS_ID is missing"),
        ({"JAX_PROCESS_ID": "2"}, "numbered from 0, got JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=2"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "HOST:PORT where process 0 will listen, got '10.0.0.1'"),
    ],
)
def test_what_is_told_must_be_whole(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster.find(GIVEN | changes)


def test_hosts_of_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By variables or by the server of the VM, which is asked only where there is a TPU."""
    asked: list[str] = []
    monkeypatch.setattr(cluster.hardware, "has_tpu", lambda: True)
    monkeypatch.setattr(cluster, "_metadata", lambda key: asked.append(key) or "a,b")
    assert cluster.find({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}) == cluster.Group("GKE", devices=None)
    assert cluster.find({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) is not None
    assert asked == []
    assert cluster.find({}) == cluster.Group("the TPU VM", devices=None)
    assert cluster.find({"JAX_PLATFORMS": "cpu"}) is None
    assert asked == ["worker-network-endpoints"]

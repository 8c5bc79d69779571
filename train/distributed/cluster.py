"""How the processes of a job find each other: told by three variables, or by the cluster they run on."""

import contextlib
import importlib.util
import os
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from . import hardware
from .signals import Interrupted
from .watchdog import Watchdog, stop

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Where process 0 listens (HOST:PORT), how many processes there are, and which of them this is."""
START = 300
"""Seconds that processes wait for each other at the start."""


@dataclass(frozen=True)
class Group:
    """The processes this one belongs to. What is None, JAX finds out from the cluster."""

    told_by: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = ()
    """Of this machine, those that are this process's own: all that it sees if empty."""


def find(environment: Mapping[str, str] = os.environ) -> Group | None:
    """The job that the environment tells of, or None where this process is alone. Nothing is waited for.

    Raises ValueError where what is told is incomplete or no number.
    """
    for told in (_given, _open_mpi, _slurm, _tpu):  # mpirun in an allocation passes on variables of a step of SLURM
        group = told(environment)
        if group is not None:
            return group if group.processes != 1 else None
    return None


@contextlib.contextmanager
def joined(told: Callable[[BaseException], tuple[str, int]] | None = None) -> Iterator[None]:
    """Makes this process one of its job's, if there is a job; call it before anything of JAX is computed.

    Inside, `jax.devices()` are those of all processes. An error in one of them ends them all, with one message; `told`
    gives the text and exit code of an error, and no text if it is said already. What ends all of them at the same place
    (the end, `Interrupted`, an exit without a code) may leave. Where the others are not there in time, the process ends
    with a message.

    Raises ValueError where what is told of the job is incomplete or its processes have unequal numbers of devices;
    ConnectionError where they cannot reach each other.
    """
    group = find()
    if group is None:
        yield
        return
    _connect(group)
    try:
        _check_devices()
        roll = Watchdog()
    except (ValueError, ConnectionError):  # in all of them
        jax.distributed.shutdown()
        raise
    try:
        yield
    except Interrupted:
        _leave(roll)
        raise
    except SystemExit as end:
        if end.code:  # of this one alone, for all we know
            roll.fail(*(("", end.code) if isinstance(end.code, int) else (f"{end.code}", 1)))
        _leave(roll)
        raise
    except BaseException as error:
        roll.fail(*(told or _told)(error))
        raise
    _leave(roll)


def _leave(roll: Watchdog) -> None:
    jax.distributed.shutdown()  # waits for all of them
    roll.end()


def _told(error: BaseException) -> tuple[str, int]:
    return f"{type(error).__name__}: {error}", 1


def _connect(group: Group) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    told = "".join(f", {name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    text = (
        f"error: the processes of this job (told of by {group.told_by}{told}) did not find each other in {START} "
        "seconds; start all of them, and let them reach the port of the first one. JAX_NUM_PROCESSES=1 runs this one "
        "alone"
    )
    late = threading.Timer(START, stop, [text])  # the runtime's own limit aborts, with a stack trace
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            group.coordinator,
            group.processes,
            group.process,
            local_device_ids=group.devices,
            initialization_timeout=2 * START,
        )
    finally:
        late.cancel()
    if jax.default_backend() == "cpu":
        # A program out of the cache in one process may order its collectives unlike one compiled in another: they hang.
        jax.config.update("jax_enable_compilation_cache", False)


def _check_devices() -> None:
    """Every process sees those of all, so all raise."""
    count = Counter(device.process_index for device in jax.devices())
    if len(set(count.values())) > 1:
        raise ValueError(
            f"every process must have as many devices, got {[count[index] for index in sorted(count)]}; "
            "JAX_LOCAL_DEVICE_IDS chooses those of a process"
        )


def _given(environment: Mapping[str, str]) -> Group | None:
    """What the three variables say."""
    address, count, index = (environment.get(name) for name in VARIABLES)
    if count == "1" or (count is None and index is None):
        return Group("JAX_NUM_PROCESSES", processes=1) if count else None
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        raise ValueError(f"{', '.join(VARIABLES)} are told together, but {', '.join(missing)} is missing")
    assert address
    assert count
    assert index
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"processes are counted, and numbered from 0, got JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={index}"
        )
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is the HOST:PORT where process 0 will listen, got {address!r}")
    own = environment.get("JAX_LOCAL_DEVICE_IDS", "")
    return Group("variables", address, int(count), int(index), tuple(int(each) for each in own.split(",") if each))


def _slurm(environment: Mapping[str, str]) -> Group | None:
    """A step of several tasks. An allocation, or a shell in it, has one task or is no step: it is no job of ours."""
    there = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"} <= set(environment)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    if not there or tasks == 1:
        return None
    here = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # like 8(x4), or 8(x3),4
    most = max((int(each.partition("(")[0]) for each in here.split(",") if each), default=1)
    return Group("SLURM", processes=tasks, devices=_share(int(environment["SLURM_LOCALID"]), most, environment))


def _open_mpi(environment: Mapping[str, str]) -> Group | None:
    size, rank, of_machine = (
        environment.get(f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    )
    if size is None:
        return None
    return Group("Open MPI", processes=int(size), devices=_share(int(rank or 0), int(of_machine or 1), environment))


def _share(index: int, count: int, environment: Mapping[str, str]) -> tuple[int, ...]:
    """The GPUs of process `index` of the `count` on this machine: all it sees if it is alone or sees just one.

    A launcher may show each process all of a machine's GPUs, or its own ones alone.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    seen = len(listed.split(",")) if listed else len([*Path("/dev").glob("nvidia[0-9]*")])
    each = seen // count
    return () if count == 1 or each == 0 else tuple(range(index * each, (index + 1) * each))


def _tpu(environment: Mapping[str, str]) -> Group | None:
    """Hosts of a TPU slice, or slices: GKE and others name them in variables, a TPU VM's own server knows them."""
    wanted = "tpu" in (environment.get("JAX_PLATFORMS") or "tpu")
    if not (wanted and hardware.has_tpu() and importlib.util.find_spec("libtpu")):
        return None
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    named = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if named is not None:
        return Group("GKE", devices=None) if len(named.split(",")) > 1 or slices != "1" else None
    if "TPU_SKIP_MDS_QUERY" in environment:
        return None
    hosts = _metadata("worker-network-endpoints")
    return Group("the TPU VM", devices=None) if len(hosts.split(",")) > 1 or slices != "1" else None


def _metadata(key: str) -> str:
    """What the metadata server of a Google Cloud VM says; nothing where there is none."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2) as answer:
        return answer.read().decode()
    return ""

"""Memory and time of a training step on TPUs or GPUs, from the program that their compiler emits."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies

from ...configs.run import Run
from ...layers.sharding import stages
from ...layers.spec import missing_package
from ..distributed import mesh as meshes
from ..step import abstract_batch, abstract_state, make_step
from .chips import Chip, Gpu, chip_of, slice_of
from .hlo import Program
from .kernels import Kernels
from .time import Time, time_of


@dataclass
class Memory:
    """Bytes of a chip's HBM."""

    capacity: float
    parameters: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0
    """The moving average of the parameters."""
    batch: float = 0.0
    cache: float = 0.0
    """Keys and values of earlier tokens, in decoding."""
    tiles: float = 0.0
    """What arrays take beyond their numbers: they lie in tiles, of which not all are full."""
    gradients: float = 0.0
    """In float32, split as the parameters are."""
    temporary: float = 0.0
    """Activations and everything else that is there for a while: what the compiler allocates, less the gradients."""
    code: float = 0.0
    missing: float = 0.0
    """How much more the program needs than there is."""

    @property
    def used(self) -> float:
        """All of it."""
        parts = asdict(self)
        return sum(parts[name] for name in parts if name not in ("capacity", "missing"))


@dataclass(kw_only=True)
class SlicePlan:
    """What a compiled program needs and takes on a slice."""

    topology: str
    chip: Chip
    mesh: dict[str, int]
    memory: Memory
    time: Time | None
    """None if the program does not fit."""

    @property
    def fits(self) -> bool:
        """Whether the program fits into the memory of a device."""
        return not self.memory.missing

    @property
    def devices(self) -> int:
        """JAX devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def program_seconds(self) -> float:
        """Time of one call of the program. Raises ValueError if a part of it has no model."""
        assert self.time is not None, "a program that does not fit has no time"
        if self.time.unknown:
            raise ValueError(f"there is no model of the time of {', '.join(self.time.unknown)}")
        return self.time.seconds


@dataclass
class Plan(SlicePlan):
    """A training step on a slice."""

    run: Run

    @property
    def bubble(self) -> float:
        """The share of the step in which a pipeline stage waits for other stages; the time includes it."""
        return stages.bubble(self.mesh.get(stages.AXIS, 1), self.run.accumulate)

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s of a device. Raises ValueError if a part of the program has no model."""
        return self.run.batch * self.run.length / self.program_seconds / self.devices

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak of a device. Attention between pairs that the mask hides does not count."""
        return 3 * self.run.model.flops(self.run.length) * self.tokens_per_second / (self.chip.tflops * 1e12)


def plan(run: Run, topology: str) -> Plan:
    """Compiles the training step of a run for a slice, e.g. "v6e:2x4" or "h100:8", and reads what it needs and takes.

    Raises:
        ValueError: on a topology that does not exist, or a mesh that does not fit it or the run.
    """
    topology = slice_of(topology)
    chip, devices = chip_of(topology)[0], devices_of(topology)
    mesh, _ = meshes.make(run, devices)
    sizes = dict(mesh.shape)
    with jax.set_mesh(mesh):
        state = abstract_state(run, mesh)
        batch = abstract_batch(run, mesh)
        lowered = make_step(run).trace(state, batch).lower()
        memory = Memory(
            capacity=chip.hbm,
            parameters=bytes_held(state["params"]),
            optimizer=bytes_held(state["optimizer"]),
            average=bytes_held(state["ema"]),
            batch=bytes_held(batch),
        )
        program = compiled(lowered, memory, chip)
    memory.gradients = min(memory.parameters, memory.temporary)
    memory.temporary -= memory.gradients
    if program is None:
        return Plan(run, topology=topology, chip=chip, mesh=sizes, memory=memory, time=None)
    kernels = Kernels(run.model, chip, sizes, run.batch // run.accumulate * run.length)
    loops = kernels.loops(run.length) if isinstance(chip, Gpu) else None  # a TPU has kernels for what is known of
    time = time_of(program, chip, sizes, kernels.training(run.length), loops)
    return Plan(run, topology=topology, chip=chip, mesh=sizes, memory=memory, time=time)


def compiled(lowered: Any, memory: Memory, chip: Chip) -> Program | None:
    """What the compiler makes of a program, of whose memory the arguments are known; the rest is filled in.

    None where it does not fit. Raises ValueError where it is refused for another reason.
    """
    try:
        program = lowered.compile(chip.plan_options)
    except jax.errors.JaxRuntimeError as error:
        memory.missing = _missing(str(error), chip)
        memory.temporary = memory.capacity + memory.missing - memory.used
        return None
    found, text = program.memory_analysis(), program.as_text()
    assert found is not None
    assert text is not None
    known = memory.used
    # At its peak: all that is temporary need not be there at once.
    memory.temporary = max(0, found.peak_memory_in_bytes - found.argument_size_in_bytes)
    memory.code = found.generated_code_size_in_bytes
    memory.tiles = max(0.0, found.argument_size_in_bytes - known)
    if isinstance(chip, Gpu):  # whose compiler does not refuse what is too large
        memory.missing = max(0.0, memory.used - memory.capacity)
    return None if memory.missing else Program(text)


def devices_of(topology: str) -> list[Any]:
    """The devices of a slice. Raises ValueError where the compiler has none of this name, or is not installed."""
    chip, count = chip_of(topology)
    if isinstance(chip, Gpu) and not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise missing_package("plans for GPUs take", "'jax[cuda13]'")
    if not isinstance(chip, Gpu) and find_spec("libtpu") is None:
        raise missing_package("plans for TPUs take", "'jax[tpu]'")
    try:
        found = _gpus(chip, count) if isinstance(chip, Gpu) else _tpus(topology)
    except Exception as error:  # whatever libtpu raises
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the {chip.compiler} has no topology {topology!r}: {first}") from error
    return list(found.devices)


def _tpus(topology: str) -> topologies.TopologyDescription:
    one = all(side == "1" for side in topology.partition(":")[2].split("x"))
    sides = {"chips_per_host_bounds": (1, 1, 1)} if one else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **sides)


def _gpus(chip: Gpu, count: int) -> topologies.TopologyDescription:
    # The plugin looks for a driver and for libraries that run programs when JAX loads it, but for this.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    shape = f"1x{count}x1"  # one group, so many hosts, a GPU each
    return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=chip.description())


def bytes_held(tree: Any) -> float:
    """What a device holds of it."""
    leaves = jax.tree.leaves(tree)
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in leaves
            if x.dtype != jax.dtypes.prng_key
        )
    )


class Refused(ValueError):
    """The compiler does not take a program, and not for its memory."""


def _missing(message: str, chip: Chip) -> float:
    """How much a program needs beyond what there is, by the compiler's error. Raises `Refused` where it is another."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    if not found:
        raise Refused(f"the {chip.compiler} refuses the program: {message.strip().splitlines()[0]}")
    return float(found[1]) * 2.0 ** (10 * (1 + "KMGT".index(found[2]))) - chip.hbm


def remedies(run: Run) -> list[Run]:
    """The run in layouts that save memory and change no result, the mildest first."""
    more = {"none": ("dots", "full"), "dots": ("full",), "dots_no_batch": ("full",), "dots_offload": ("full_offload",)}
    kinds = more.get(run.remat, ())
    least = kinds[-1] if kinds else run.remat
    parts = [n for n in range(run.accumulate + 1, run.batch + 1) if run.batch % n == 0 and n & (n - 1) == 0]
    return [run.replace(remat=kind) for kind in kinds] + [run.replace(remat=least, accumulate=n) for n in parts]


def first_that_fits(run: Run, topology: str, say: Callable[[Run], None]) -> Plan | None:
    """The plan of the mildest remedy that makes a run fit; None if none does. `say` is told what is tried."""
    for other in remedies(run):
        say(other)
        try:
            found = plan(other, topology)
        except Refused:
            raise
        except ValueError:  # the mesh splits more ways than a part of the batch has rows
            return None
        if found.fits:
            return found
    return None

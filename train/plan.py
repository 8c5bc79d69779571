"""What a training job needs and takes on a TPU, from the program that the TPU compiler makes of it."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from ..configs.run import Run
from ..layers import stages
from . import mesh as meshes
from .chips import Chip, chips, slice_of
from .hlo import Operation, Program
from .step import abstract_batch, abstract_state, make_step

HOP = 1e-6
"""Seconds that a step of a ring takes beside its bytes."""
FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "call",
    "partition-id",
)
"""Operations that take no time of their own."""


@dataclass
class Memory:
    """Bytes of a chip's HBM."""

    capacity: float
    parameters: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0
    """The moving average of the parameters."""
    batch: float = 0.0
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


@dataclass
class Traffic:
    """What one kind of collective moves over an axis in a step."""

    bytes: float = 0.0
    """That a chip sends."""
    seconds: float = 0.0
    exposed: float = 0.0
    """Seconds in which nothing is computed."""
    count: int = 0

    def add(self, times: int, sent: float, seconds: float) -> None:
        """Counts a collective that runs so often."""
        self.bytes, self.seconds, self.count = (
            self.bytes + times * sent,
            self.seconds + times * seconds,
            self.count + times,
        )


@dataclass
class Time:
    """A step, predicted."""

    compute: float = 0.0
    """Seconds of what XLA makes itself, by the cycles of the schedules that its compiler chose."""
    attention: float = 0.0
    """Seconds of attention kernels: their FLOPs by the share of the peak that they reach in benchmarks/."""
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    """By kind of collective and mesh axis."""
    unknown: list[str] = field(default_factory=list)
    """What there is no model for; where there is any, no time is told."""

    @property
    def busy(self) -> float:
        """Seconds in which a chip computes."""
        return self.compute + self.attention

    @property
    def communication(self) -> float:
        """Seconds in which a chip waits for others."""
        return sum(part.exposed for part in self.traffic.values())

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.busy + self.communication

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        parts = {"computation": self.compute, "attention": self.attention, "communication": self.communication}
        name = max(parts, key=lambda part: parts[part])
        return f"{name} ({parts[name] / self.seconds:.0%})"


@dataclass
class Plan:
    """A run on a slice."""

    run: Run
    topology: str
    chip: Chip
    mesh: dict[str, int]
    memory: Memory
    time: Time | None
    """None where the program does not fit, for then there is none."""

    @property
    def fits(self) -> bool:
        """Whether it fits into the memory."""
        return not self.memory.missing

    @property
    def bubble(self) -> float:
        """The share of the time in which a stage of a pipeline waits for others, which the time has in it."""
        return stages.bubble(self.mesh.get(stages.AXIS, 1), self.run.accumulate)

    @property
    def tokens_per_second(self) -> float:
        """Of a chip. Raises ValueError where there is no model of the program's time."""
        assert self.time is not None
        if self.time.unknown:
            raise ValueError(f"there is no model of the time of {', '.join(self.time.unknown)}")
        return self.run.batch * self.run.length / self.time.seconds / math.prod(self.mesh.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs of a token by the peak; the products of pairs that are not visible do not count."""
        return 3 * self.run.model.flops(self.run.length) * self.tokens_per_second / (self.chip.tflops * 1e12)


def plan(run: Run, topology: str) -> Plan:
    """Compiles the training step of a run for a slice, e.g. "v6e:2x4", and reads what it needs and takes.

    Raises:
        ValueError: on a topology that does not exist, or a mesh that does not fit it or the run.
    """
    topology = slice_of(topology)
    devices = _devices(topology)
    chip = chips()[devices[0].device_kind]
    mesh, _ = meshes.make(run, devices)
    sizes = dict(mesh.shape)
    with jax.set_mesh(mesh):
        state = abstract_state(run, mesh)
        batch = abstract_batch(run, mesh)
        step: Any = make_step(run)
        lowered = step.trace(state, batch).lower()
        memory = Memory(
            capacity=chip.hbm,
            parameters=_bytes(state["params"]),
            optimizer=_bytes(state["optimizer"]),
            average=_bytes(state["ema"]),
            batch=_bytes(batch),
        )
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            memory.missing = _missing(str(error), chip)
            memory.temporary = memory.capacity + memory.missing - memory.used
            return Plan(run, topology, chip, sizes, memory, None)
    found, text = program.memory_analysis(), program.as_text()
    assert found is not None
    assert text is not None
    # At its peak: all that is temporary need not be there at once.
    temporary = max(0, found.peak_memory_in_bytes - found.argument_size_in_bytes)
    memory.gradients = min(memory.parameters, temporary)
    memory.temporary = temporary - memory.gradients
    memory.code = found.generated_code_size_in_bytes
    # Arrays lie in tiles, which may not be full: what is more than the sum of the parts belongs to the state.
    memory.optimizer += max(
        0.0, found.argument_size_in_bytes - memory.parameters - memory.optimizer - memory.average - memory.batch
    )
    return Plan(run, topology, chip, sizes, memory, time_of(Program(text), run, chip, sizes))


def time_of(program: Program, run: Run, chip: Chip, mesh: dict[str, int]) -> Time:
    """The time of a compiled step."""
    time, unknown = Time(), Counter[str]()
    under_way: dict[Any, list[tuple[float, float, Traffic]]] = {}
    """Of collectives that began: how much was computed before, the seconds they take, and where they are counted."""
    for op, times in program.walk():
        if times is None:
            unknown["a loop of unknown length"] += 1
            continue
        if op.code == "conditional":
            unknown["a conditional"] += 1
        if op.kernel and not op.kernel.startswith("attention_"):
            unknown[op.kernel] += 1
        moved = program.collective(op)
        # A fusion may hold the beginning, some of the way or the end of a collective, known by its kind and size.
        key: Any = op.operands[0] if op.code.endswith("-done") and op.operands else op.name
        key = (moved.code, moved.largest) if moved is not None and op.code == "fusion" else key
        begins = moved is not None and (op.phase == "start" or (not op.phase and not under_way.get(key)))
        if moved is not None and begins:
            kind, axis, sent, seconds = _cost(moved, op, chip, mesh)
            traffic = time.traffic.setdefault((kind, axis), Traffic())
            traffic.add(times, sent, seconds)
            under_way.setdefault(key, []).append((time.busy, times * seconds, traffic))
        busy = times * _busy(op, run, chip, mesh)
        if op.kernel:
            time.attention += busy
        else:
            time.compute += busy
        if under_way.get(key) and (op.phase == "done" or (begins and not op.phase)):
            before, seconds, traffic = under_way[key].pop(0)
            traffic.exposed += max(0.0, seconds - (time.busy - before))
    time.unknown = list(unknown)
    return time


def _busy(op: Operation, run: Run, chip: Chip, mesh: dict[str, int]) -> float:
    """Seconds that an operation keeps the chip busy."""
    if op.kernel in ("attention_forward", "attention_backward"):
        model, backward = run.model, op.kernel == "attention_backward"
        # What grows with the length are the products with keys and values: two forward, five backward.
        ends = [sum(block.mixer.flops(model.dim, length) for block in model.all_blocks) for length in (1, run.length)]
        devices = math.prod(size for axis, size in mesh.items() if axis != stages.AXIS)  # that share a layer
        tokens = run.batch // run.accumulate * run.length / devices
        flops = (ends[1] - ends[0]) / len(model.all_blocks) * tokens * (2.5 if backward else 1)
        return flops / (chip.attention[backward] * chip.derate * chip.tflops * 1e12)
    return 0.0 if op.cycles is None or op.code in FREE else op.cycles / chip.clock_ghz / 1e9


def _cost(op: Operation, whole: Operation, chip: Chip, mesh: dict[str, int]) -> tuple[str, str, float, float]:
    """Of a collective: its kind, its axis, the bytes that a chip sends, and its seconds.

    It goes round a ring in both directions where the devices lie on one, else along a line: a lower bound.
    """
    kind = op.code.removesuffix("-start")
    axis, count = op.group(mesh)
    others = (count - 1) / count
    sent = op.largest * others
    if kind == "all-reduce" and whole is not op and whole.largest * count <= 1.1 * op.largest:
        kind = "reduce-scatter"  # each device cuts its part out of the sum
    elif kind == "all-reduce":
        sent *= 2
    elif kind == "reduce-scatter":
        sent *= count
    elif kind == "collective-permute":
        sent = op.largest
    ring = count >= 4 and (count == math.prod(mesh.values()) or count % chip.wrap == 0)
    links = 2 if ring and kind != "collective-permute" else 1
    return kind, axis, sent, sent / (links * chip.ici_gbps * 1e9) + max(count - 1, 1) * HOP


def _devices(topology: str) -> list[Any]:
    one = all(side == "1" for side in topology.partition(":")[2].split("x"))
    sides = {"chips_per_host_bounds": (1, 1, 1)} if one else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **sides).devices)
    except Exception as error:  # whatever libtpu raises
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the TPU compiler has no topology {topology!r}: {first}") from error


def _bytes(tree: Any) -> float:
    """What a device holds of it."""
    leaves = jax.tree.leaves(tree)
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in leaves
            if x.dtype != jax.dtypes.prng_key
        )
    )


def _missing(message: str, chip: Chip) -> float:
    """How much a program needs beyond what there is, by the compiler's error. Raises ValueError where it is another."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    if not found:
        raise ValueError(f"the TPU compiler refuses the program: {message.strip().splitlines()[0]}")
    return float(found[1]) * 2.0 ** (10 * (1 + "KMGT".index(found[2]))) - chip.hbm


def remedies(run: Run) -> list[Run]:
    """The run in layouts that save memory and change no result, the mildest first."""
    kinds = {"none": ("dots", "full"), "dots": ("full",), "dots_no_batch": ("full",), "full": ()}[run.remat]
    parts = [n for n in range(run.accumulate + 1, run.batch + 1) if run.batch % n == 0 and n & (n - 1) == 0]
    return [run.replace(remat=kind) for kind in kinds] + [run.replace(remat="full", accumulate=n) for n in parts]


def first_that_fits(run: Run, topology: str, say: Callable[[Run], None]) -> Plan | None:
    """The plan of the mildest remedy that makes a run fit; None if none does. `say` is told what is tried."""
    for other in remedies(run):
        say(other)
        try:
            found = plan(other, topology)
        except ValueError:  # the mesh splits more ways than a part of the batch has rows
            return None
        if found.fits:
            return found
    return None

"""How long a compiled TPU program takes, told from its operations."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from .chips import Chip
from .hlo import Operation, Program

HOP = 1e-6
"""Seconds that a step of a ring takes beside its bytes."""
HOST = "S(5)"
"""What arrays in the memory of the host have in their types."""
FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "call",
    "conditional",
    "partition-id",
    "after-all",
)
"""Operations that take no time of their own."""
PARTS = {
    "compute": ("computation", "cycles of the schedules that the compiler chose"),
    "untold": ("others", "no cycles by the compiler: results, read and written at the speed of the HBM"),
    "attention": ("attention", "by the shares of the peak, or of the HBM's speed, in benchmarks/results"),
    "experts": ("experts", "grouped rows by their tiles, as in the schedules in benchmarks/results, at even loads"),
}
"""What a chip is busy with: how it is called, and how it is told."""
Kernel = Callable[[Operation, Program], float | None]
"""Seconds of a Pallas kernel; None where there is no model of it."""


@dataclass
class Traffic:
    """What one kind of collective, or of copies, moves over an axis or the HBM."""

    bytes: float = 0.0
    """That a chip sends, or copies."""
    seconds: float = 0.0
    exposed: float = 0.0
    """Seconds in which nothing is computed."""
    count: int = 0

    def add(self, times: int, sent: float, seconds: float) -> None:
        """Counts one that runs so often."""
        self.bytes += times * sent
        self.seconds += times * seconds
        self.count += times


@dataclass
class Time:
    """A program, predicted."""

    compute: float = 0.0
    """Seconds of what XLA makes itself, by the cycles of the schedules that its compiler chose."""
    untold: float = 0.0
    """Seconds of what XLA makes and the compiler gives no cycles for: results, read and written once in HBM."""
    attention: float = 0.0
    """Seconds of attention kernels, by the share of the peak, or of the HBM's speed, that they reach in benchmarks/."""
    experts: float = 0.0
    """Seconds of XLA's products of grouped rows, by their tiles."""
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    """By kind of collective and mesh axis; copies go over "HBM"."""
    unknown: list[str] = field(default_factory=list)
    """What there is no model for; where there is any, no time is told."""

    @property
    def busy(self) -> float:
        """Seconds in which a chip computes."""
        return sum(getattr(self, name) for name in PARTS)

    @property
    def copies(self) -> float:
        """Seconds in which a chip waits for its own HBM."""
        return sum(part.exposed for (_, axis), part in self.traffic.items() if axis == "HBM")

    @property
    def communication(self) -> float:
        """Seconds in which a chip waits for others."""
        return sum(part.exposed for (_, axis), part in self.traffic.items() if axis != "HBM")

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.busy + self.copies + self.communication

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        parts = {shown: getattr(self, name) for name, (shown, _) in PARTS.items()}
        parts |= {"communication": self.communication, "copies": self.copies}
        name = max(parts, key=lambda part: parts[part])
        return f"{name} ({parts[name] / self.seconds:.0%})"

    def as_json(self) -> dict[str, Any]:
        """All of it, for JSON."""
        traffic = [{"kind": kind, "axis": axis, **asdict(part)} for (kind, axis), part in self.traffic.items()]
        parts = {name: getattr(self, name) for name in (*PARTS, "copies", "communication")}
        return {**parts, "traffic": traffic, "unknown": self.unknown}


def time_of(program: Program, chip: Chip, mesh: dict[str, int], kernel: Kernel, rounds: int | None = None) -> Time:
    """The time of a compiled program.

    Args:
        program: as compiled.
        chip: what it runs on.
        mesh: axes and sizes.
        kernel: tells the time of Pallas kernels.
        rounds: how often a loop of the entry runs whose length is not in the program; None: there is no model of it.
    """
    time, unknown = Time(), Counter[str]()
    under_way: dict[Any, list[tuple[float, Traffic]]] = {}
    """Of what began: when it ends, by the clock of what is computed (and of waits for copies), and where it counts."""
    copies = Traffic()
    free = 0.0
    """When the last of the copies ends, which go one after the other."""
    for op, times in program.walk(rounds):
        if times is None:
            unknown["a loop of unknown length"] += 1
            continue
        if op.code == "conditional" and program.branch(op) is None:
            unknown["a conditional"] += 1
        first = program.named.get(program.start(op), op)
        moved = program.collective(first)
        # A fusion may hold the beginning, some of the way or the end of a collective, known by its kind and size.
        key: Any = (moved.code, moved.largest) if moved is not None and op.code == "fusion" else first.name
        # What is begun without operands, for the SparseCore, gets them by an update.
        update = op.code.endswith("-update")
        starts = (op.phase == "start" and bool(op.operands)) or (update and not first.operands)
        at_once = not op.phase and not update
        begins = starts or (moved is not None and at_once and not under_way.get(key))
        if begins and moved is not None:
            kind, axis, sent, seconds = _cost(program, moved, op, chip, mesh)
            traffic = time.traffic.setdefault((kind, axis), Traffic())
            traffic.add(times, sent, seconds)
            under_way.setdefault(key, []).append((time.busy + times * seconds, traffic))
        elif begins and HOST in op.type:
            unknown["copies to and from the host"] += 1
        elif begins:
            size = program.copied(first)
            time.traffic["copies", "HBM"] = copies
            copies.add(times, size, size / chip.hbm_speed)
            free = max(free, time.busy + copies.exposed) + times * size / chip.hbm_speed
            under_way.setdefault(key, []).append((free, copies))
        if op.kernel:
            known = kernel(op, program)
            if known is None:
                unknown[op.kernel] += 1
            elif op.kernel.startswith("attention_"):
                time.attention += times * known
            else:
                time.experts += times * known
        elif op.cycles is not None and op.code not in FREE:
            time.compute += times * op.cycles / chip.clock_ghz / 1e9
        elif moved is None and at_once and op.code not in FREE:
            time.untold += times * 2 * program.written(op) / chip.hbm_speed
        if under_way.get(key) and (op.phase == "done" or (begins and at_once)):
            end, traffic = under_way[key].pop(0)
            traffic.exposed += max(0.0, end - time.busy - (copies.exposed if traffic is copies else 0.0))
    time.unknown = list(unknown)
    return time


def _cost(
    program: Program, op: Operation, whole: Operation, chip: Chip, mesh: dict[str, int]
) -> tuple[str, str, float, float]:
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
    elif kind == "ragged-all-to-all":
        # One side has room for the worst case; what is sent at an even load is what the other one holds.
        sent = min(op.largest, program.named[op.operands[0]].size) * others
    ring = count >= 4 and (count == math.prod(mesh.values()) or count % chip.wrap == 0)
    links = 2 if ring and kind != "collective-permute" else 1
    return kind, axis, sent, sent / (links * chip.ici_gbps * 1e9) + max(count - 1, 1) * HOP

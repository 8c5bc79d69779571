"""Time of a compiled program, from its operations."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from .chips import Chip
from .hlo import Operation, Program, TripCounts

HOP = 1e-6
"""Latency of a step of a ring, in seconds."""
HOST = "S(5)"
"""Mark of arrays in host memory, in their types."""
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
    "replica-id",
    "after-all",
)
"""Operations that take no time of their own."""
PARTS = {"compute": "computation", "untold": "others", "attention": "attention", "experts": "experts"}
"""Parts of the time in which a device computes, with their headings."""
Kernel = Callable[[Operation, Program], float | None]
"""Seconds of a kernel that is not part of XLA; None if it has no model."""


@dataclass
class Traffic:
    """Traffic of one kind of collective or copy over a mesh axis or HBM."""

    bytes: float = 0.0
    """Bytes that a device sends or copies."""
    seconds: float = 0.0
    exposed: float = 0.0
    """Seconds that no computation overlaps."""
    count: int = 0

    def add(self, times: float, sent: float, seconds: float) -> None:
        """Adds an operation that runs `times` times."""
        self.bytes += times * sent
        self.seconds += times * seconds
        self.count += round(times)


@dataclass
class Time:
    """Predicted time of a program, by part."""

    compute: float = 0.0
    """Seconds of XLA's own operations, by the compiler's estimates."""
    untold: float = 0.0
    """Seconds of XLA's own operations without an estimate: their results, read and written once in HBM."""
    attention: float = 0.0
    """Seconds of attention kernels, or of XLA's operations under the name of attention."""
    experts: float = 0.0
    """Seconds of XLA's grouped matmuls, by their tiles."""
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    """By kind of collective and mesh axis; copies go over "HBM"."""
    unknown: list[str] = field(default_factory=list)
    """Operations without a model. If there are any, no time is reported."""

    @property
    def busy(self) -> float:
        """Seconds in which a device computes."""
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
        parts = {shown: getattr(self, name) for name, shown in PARTS.items()}
        parts |= {"communication": self.communication, "copies": self.copies}
        name = max(parts, key=lambda part: parts[part])
        return f"{name} ({parts[name] / self.seconds:.0%})"

    def as_json(self) -> dict[str, Any]:
        """All of it, for JSON."""
        traffic = [{"kind": kind, "axis": axis, **asdict(part)} for (kind, axis), part in self.traffic.items()]
        parts = {name: getattr(self, name) for name in (*PARTS, "copies", "communication")}
        return {**parts, "traffic": traffic, "unknown": self.unknown}


def time_of(program: Program, chip: Chip, mesh: dict[str, int], kernel: Kernel, told: TripCounts | None = None) -> Time:
    """The time of a compiled program.

    Args:
        program: as compiled.
        chip: what it runs on.
        mesh: axes and sizes.
        kernel: tells the time of kernels.
        told: how often loops run, and which branches are taken, where that is not in the program.
    """
    time, unknown = Time(), Counter[str]()
    under_way: dict[Any, list[tuple[float, Traffic]]] = {}
    """Of what began: when it ends, by the clock of what is computed (and of waits for copies), and where it counts."""
    copies = Traffic()
    free = 0.0
    """When the last of the copies ends, which go one after the other."""
    for op, times in program.walk(told):
        if times is None:
            unknown["a loop of unknown length"] += 1
            continue
        if op.code == "conditional" and program.branch(op, told) is None:
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
        if called := chip.kernel(op):
            known = kernel(op, program)
            if known is None:
                unknown[called] += 1
            elif called.startswith("attention_"):
                time.attention += times * known
            else:
                time.experts += times * known
        elif op.code not in FREE:
            known = chip.seconds(op, program)
            part = "untold" if known is None else "compute"
            if known is None and moved is None and at_once:
                known = 2 * program.written(op) / chip.hbm_speed
            part = "attention" if op.blockwise else part
            setattr(time, part, getattr(time, part) + times * (known or 0.0))
        if under_way.get(key) and (op.phase == "done" or (begins and at_once)):
            end, traffic = under_way[key].pop(0)
            traffic.exposed += max(0.0, end - time.busy - (copies.exposed if traffic is copies else 0.0))
    time.unknown = list(unknown)
    return time


def _cost(
    program: Program, op: Operation, whole: Operation, chip: Chip, mesh: dict[str, int]
) -> tuple[str, str, float, float]:
    """Of a collective: its kind, its axis, the bytes that a chip sends, and its seconds.

    It goes round a ring where the devices lie on one, else along a line: a lower bound.
    """
    kind = op.code.removesuffix("-start")
    axis, count = op.group(mesh)
    others = (count - 1) / count
    sent = op.largest * others
    if kind == "all-reduce" and whole is not op and whole.largest * count <= 1.1 * op.largest:
        kind = "reduce-scatter"  # each device cuts its part out of the sum
    elif kind == "all-reduce":
        sent *= 2
    elif kind == "reduce-scatter" and not op.phase:  # a start has what goes in in its type
        sent *= count
    elif kind == "collective-permute":
        sent = op.largest
    elif kind == "ragged-all-to-all":
        # One side has room for the worst case; what is sent at an even load is what the other one holds.
        sent = min(op.largest, program.named[op.operands[0]].size) * others
    around = kind != "collective-permute"
    speed = chip.sending(count, whole=count == math.prod(mesh.values())) if around else chip.link_gbps * 1e9
    return kind, axis, sent, sent / speed + max(count - 1, 1) * HOP

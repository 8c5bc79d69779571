"""What a compiled program does, read off its text: operations, how often each runs, what goes over links."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ...layers.kernels.attention import portable

BYTES: dict[str, float] = {
    **dict.fromkeys(("s2", "u2"), 0.25),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e3m4", "f8e4m3", "f8e4m3fn", "f8e5m2", "f8e8m0fnu"), 1),
    **dict.fromkeys(("f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
"""Of a type: the kind, the sizes, and the memory, where that is not HBM."""
UNKNOWN_CYCLES = 2**60
DOT = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclass(frozen=True)
class Operation:
    """A line of a program."""

    name: str
    type: str
    code: str
    rest: str
    """Operands and attributes."""

    @property
    def largest(self) -> int:
        """Bytes of the result; of a start, of what goes in or of what comes out, whichever is more.

        Where collectives were combined, these are several arrays.
        """
        if not self.code.endswith("-start"):
            return self.size
        sides = re.findall(r"\([^()]*\)|\w+\[[\d,]*\]", re.sub(r"\{[^{}]*\}", "", self.type)[1:-1])
        sizes = [sum(bytes_of(kind, dims) for kind, dims, _ in ARRAY.findall(side)) for side in sides]
        return max(sizes, default=self.size)

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(bytes_of(kind, dims) for kind, dims, _ in ARRAY.findall(self.type))

    @property
    def in_hbm(self) -> int:
        """Bytes of the result that lie in HBM."""
        return sum(bytes_of(kind, dims) for kind, dims, space in ARRAY.findall(self.type) if not space)

    @property
    def phase(self) -> str:
        """Whether it is the "start" or the "done" of something that goes on beside what is between them."""
        for phase in ("start", "done"):
            if self.code.endswith(f"-{phase}") or self.name.startswith(f"async-collective-{phase}"):
                return phase
        return ""

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def cycles(self) -> int | None:
        """Of the schedule that the compiler chose, as it estimated them; None where it made no estimate."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found and int(found[1]) < UNKNOWN_CYCLES else None

    @property
    def models(self) -> list[dict[str, float]]:
        """What the models of the GPU compiler say of a fusion: exec_time_us, compute_time_us, memory_access_time_us."""
        found = re.search(r'"reification_cost":(\[.*?\])', self.rest)
        return json.loads(found[1]) if found else []

    @property
    def blockwise(self) -> bool:
        """Whether it is of attention that is no kernel, but loops of XLA (layers/kernels/attention/portable.py)."""
        return re.search(rf'op_name="[^"]*\b{portable.SCOPE}\b', self.rest) is not None

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def kernel(self) -> str | None:
        """The name of a Pallas kernel."""
        if self.target.startswith("mosaic_gpu"):
            found = re.search(r'op_name="[^"]*?([^"/]+)/[^"/]*"', self.rest)
            return found[1] if found else None
        return re.sub(r"[.\d]+$", "", self.name) if self.target == "tpu_custom_call" else None

    def called(self, *roles: str) -> str:
        """The computation in one of these roles: calls, body, condition, to_apply."""
        found = re.search(rf"(?:{'|'.join(roles)})=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    def group(self, mesh: dict[str, int]) -> tuple[str, int]:
        """The mesh axes that a collective goes over ("data+fsdp"), and how many devices take part."""
        places = np.unravel_index(self._members() or range(math.prod(mesh.values())), tuple(mesh.values()))
        axes = [axis for axis, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1]
        return "+".join(axes), math.prod(mesh[axis] for axis in axes)

    def _members(self) -> list[int]:
        """The devices of the first group of a collective, in any of the forms they are written in; none for all."""
        if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", self.rest):
            return [int(x) for x in found[1].split(",")]
        if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", self.rest):  # XLA may name axes of its own
            sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
            inside = tuple(slice(None) if f"'{name}'" in found[2] else 0 for name in sizes)
            return np.arange(math.prod(sizes.values())).reshape(*sizes.values())[inside].ravel().tolist()
        if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", self.rest):
            groups, shape, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
            ids = np.arange(math.prod(groups or ())).reshape(*shape or ()).transpose(order)
            return ids.reshape(*groups or ())[0].ravel().tolist()
        return []


TripCounts = Callable[[Operation], float | None]
"""What is not in a program: how often a loop runs, or the number of the branch that a conditional takes; None for
others."""


def bytes_of(kind: str, dims: str) -> int:
    """Of an array: `bytes_of("bf16", "8,128")`."""
    return math.ceil(BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n))


class Program:
    """The computations of a compiled module."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Operation]] = {}
        self.named: dict[str, Operation] = {}
        self.done: dict[str, Operation] = {}
        """The end of what a start begins, by the name of the start."""
        self.entry = ""
        current: list[Operation] = []
        for line in text.splitlines():
            if found := COMPUTATION.match(line):
                current = self.computations.setdefault(found[2], [])
                self.entry = found[2] if found[1] else self.entry
            elif found := OPERATION.match(line):
                op = Operation(*found.groups())
                current.append(op)
                self.named[op.name] = op
                if op.phase == "done":
                    self.done[self.start(op)] = op

    def trips(self, loop: Operation) -> int | None:
        """How often a loop's body runs, where the compiler says it or its condition compares with a number; loops of
        JAX begin at 0.
        """
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition = self.computations.get(loop.called("condition"), [])
        numbers = [
            int(op.rest.split(")")[0]) for op in condition if op.code == "constant" and op.type.startswith("s32[]")
        ]
        compares = [op for op in condition if op.code == "compare" and "direction=LT" in op.rest]
        return numbers[0] if len(numbers) == 1 and len(compares) == 1 else None

    def branch(self, op: Operation, trip_counts: TripCounts | None = None) -> str | None:
        """The computation that a conditional takes, by the program or else by `trip_counts`; None if neither has it."""
        found = re.search(r"branch_computations=\{(.*?)\}", op.rest)
        branches = re.findall(r"[\w.\-]+", found[1]) if found else []
        index = self.named.get(op.operands[0])
        number = re.match(r"\d+", index.rest) if index is not None and index.code == "constant" else None
        if len(branches) <= 1:
            return branches[0] if branches else None
        place = int(number[0]) if number is not None else trip_counts(op) if trip_counts is not None else None
        return None if place is None else branches[min(int(place), len(branches) - 1)]

    def start(self, op: Operation) -> str:
        """The name of what began an operation that goes on or ends; its own where it is none of these."""
        while op.code.endswith(("-update", "-done")) and op.operands and op.operands[0] in self.named:
            op = self.named[op.operands[0]]
        return op.name

    def collective(self, op: Operation) -> Operation | None:
        """The collective that an operation begins or is, also inside a fusion or of a call to the SparseCore."""
        if op.code.removesuffix("-start") in COLLECTIVES:
            return op
        if op.code not in ("fusion", "async-start", "call-start"):
            return None
        inside = self.computations.get(op.called("calls", "to_apply"), [])
        return next((found for found in map(self.collective, inside) if found is not None), None)

    def copied(self, start: Operation) -> int:
        """Bytes of HBM that are read and written by a copy, or by what else goes on beside the computation."""
        end = self.done.get(start.name)
        if end is None:
            return 0
        inside = self.computations.get(start.called("calls"), []) if start.code == "fusion-start" else []
        if updates := [op for op in inside if op.code == "dynamic-update-slice"]:  # in place
            return 2 * sum(self.written(op) for op in updates)
        source = self.named.get(start.operands[0]) if start.operands else None
        return end.in_hbm + (end.size if source is None or source.in_hbm else 0)

    def written(self, op: Operation) -> int:
        """Bytes of HBM that an operation writes: of an update in place, what it puts there."""
        if op.code == "custom-call":  # of buffers and bounds; kernels have models of their own
            return 0
        into = self.named.get(op.operands[1]) if op.code == "dynamic-update-slice" else None
        return min(op.in_hbm, op.in_hbm if into is None else into.in_hbm)

    def flops(self, op: Operation) -> float:
        """Of the products in an operation, in those of 16 bits: in a time, matrix units do twice as many of 8 bits and
        half as many of 32.
        """
        if op.code == "dot":
            factors = [self.named[name] for name in op.operands]
            (_, left, _), (_, result, _) = ARRAY.findall(factors[0].type)[0], ARRAY.findall(op.type)[0]
            found = DOT.search(op.rest)
            assert found is not None
            summed = [int(left.split(",")[int(dim)]) for dim in found[1].split(",") if dim]
            width = max(bytes_of(ARRAY.findall(factor.type)[0][0], "") for factor in factors)
            return 2 * bytes_of("s8", result) * math.prod(summed) * width / 2
        inside = self.computations.get(op.called("calls"), []) if op.code == "fusion" else []
        return sum(self.flops(one) for one in inside)

    def walk(self, trip_counts: TripCounts | None = None) -> Iterator[tuple[Operation, float | None]]:
        """Every operation in the order of the program, and how often it runs; None if that is not known.

        `trip_counts` gives the counts that are not in the program.
        """
        yield from self._walk(self.entry, 1, trip_counts)

    def _walk(
        self, name: str, times: float | None, trip_counts: TripCounts | None
    ) -> Iterator[tuple[Operation, float | None]]:
        for op in self.computations.get(name, []):
            yield op, times
            if op.code == "while":
                trips = self.trips(op)
                trips = trip_counts(op) if trips is None and trip_counts is not None else trips
                inside = None if trips is None or times is None else times * trips
                yield from self._walk(op.called("body"), inside, trip_counts)
            elif op.code == "call":
                yield from self._walk(op.called("to_apply"), times, trip_counts)
            elif op.code == "conditional":
                yield from self._walk(self.branch(op, trip_counts) or "", times, trip_counts)

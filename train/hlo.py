"""What a compiled TPU program does, read off its text: operations, how often each runs, what goes over links."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
UNKNOWN_CYCLES = 2**60


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
        """Bytes of the largest array of the result; of all, where it is several of a collective that were combined."""
        sizes = [bytes_of(kind, dims) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", self.type)]
        return max(sizes, default=0) if self.code.endswith("-start") else sum(sizes)

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
    def kernel(self) -> str | None:
        """The name of a Pallas kernel."""
        return re.sub(r"[.\d]+$", "", self.name) if 'custom_call_target="tpu_custom_call"' in self.rest else None

    def called(self, role: str) -> str:
        """The computation in a role: calls, body, condition, to_apply."""
        found = re.search(rf"{role}=%?([\w.\-]+)", self.rest)
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


def bytes_of(kind: str, dims: str) -> int:
    """Of an array: `bytes_of("bf16", "8,128")`."""
    return BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)


class Program:
    """The computations of a compiled module."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Operation]] = {}
        self.entry = ""
        current: list[Operation] = []
        for line in text.splitlines():
            if found := COMPUTATION.match(line):
                current = self.computations.setdefault(found[2], [])
                self.entry = found[2] if found[1] else self.entry
            elif found := OPERATION.match(line):
                current.append(Operation(*found.groups()))

    def trips(self, loop: Operation) -> int | None:
        """How often a loop's body runs, where its condition compares with a number; loops of JAX begin at 0."""
        condition = self.computations.get(loop.called("condition"), [])
        numbers = [
            int(op.rest.split(")")[0]) for op in condition if op.code == "constant" and op.type.startswith("s32[]")
        ]
        compares = [op for op in condition if op.code == "compare" and "direction=LT" in op.rest]
        return numbers[0] if len(numbers) == 1 and len(compares) == 1 else None

    def collective(self, op: Operation) -> Operation | None:
        """The collective that an operation begins or is, also inside a fusion."""
        if op.code.removesuffix("-start") in COLLECTIVES:
            return op
        if op.code in ("fusion", "async-start", "call-start"):
            inside = self.computations.get(op.called("calls"), [])
            return next((x for x in inside if x.code.removesuffix("-start") in COLLECTIVES), None)
        return None

    def walk(self) -> Iterator[tuple[Operation, int | None]]:
        """Every operation in the order of the program, and how often it runs; None where that is not known."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int | None) -> Iterator[tuple[Operation, int | None]]:
        for op in self.computations.get(name, []):
            yield op, times
            if op.code == "while":
                trips = self.trips(op)
                yield from self._walk(op.called("body"), None if trips is None or times is None else times * trips)
            elif op.code == "call":
                yield from self._walk(op.called("to_apply"), times)

"""Tables of names: which tensor of a checkpoint holds which of our parameters, and in which axes.

A table has one line a tensor of the checkpoint:

    "model.layers.{layer}.self_attn.q_proj.weight": ("NH D", "mixer.query.weight")

the checkpoint's name, its axes, and our name, without "stack.0." where it is of a block. Letters without a space
between them are one flattened axis, the first letter the slowest. A tensor that holds several parameters names the
axis it is cut on, and one parameter a part; the letters of each part are those of its own parameter:

    "...qkv_proj.weight": ("NH+KH+KH D", "mixer.query.weight", "mixer.key.weight", "mixer.value.weight")
    "...experts.gate_up_proj": ("E D F(1+1)", ...)       two parts interleaved: part i is [..., i::2]
    "...kv_b_proj.weight": ("N(H+J) R", ...)             cut within each head
    "...experts.{expert}.up_proj.weight": ("F D", ...)   one tensor an expert; ours has an E axis besides

A line stands for a parameter only where the letters are the parameter's own, so that one name of ours may stand in two
lines: dense (D F) and of experts (E D F), say. Reading and writing both follow from the line, so that neither can
disagree with the other.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..decoder import Decoder
from ..parameters import Description

Table = Mapping[str, tuple[str, ...]]
"""Lines by the checkpoint's name: (axes, our name, our next name, ...)."""

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class TableEntry:
    """One line of a table."""

    name: str
    axes: str
    ours: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = {len(parts) for _, parts in self._dims() if len(parts) > 1}
        if not self.ours or counts != ({len(self.ours)} if len(self.ours) > 1 else set()):
            raise ValueError(f"a tensor is cut on one axis, into a part a parameter: got {self.axes!r} and {self.ours}")

    def letters(self, part: int) -> str:
        """The axes of a part in the order of the checkpoint, e.g. "NHD"."""
        return "".join(before + parts[part if len(parts) > 1 else 0] for before, parts in self._dims()).replace("1", "")

    def shape(self, sizes: Sequence[Sizes]) -> tuple[int, ...]:
        """The shape of the tensor; `sizes` has those of each part's letters."""
        return tuple(_count(before, sizes[0]) * sum(self._parts(parts, sizes)) for before, parts in self._dims())

    def cut(self, tensor: np.ndarray, sizes: Sequence[Sizes]) -> list[np.ndarray]:
        """Views of the tensor, one a part, with an axis a letter of `letters`."""
        views = []
        for part in range(len(self.ours)):
            view = tensor.reshape(
                [n for b, ps in self._dims() for n in (_count(b, sizes[0]), sum(self._parts(ps, sizes)))]
            )
            for place, (_, parts) in enumerate(self._dims()):
                if len(parts) > 1:
                    ends = np.cumsum([0, *self._parts(parts, sizes)])
                    view = view[(slice(None),) * (2 * place + 1) + (slice(ends[part], ends[part + 1]),)]
            views.append(view.reshape([sizes[part][letter] for letter in self.letters(part)]))
        return views

    def join(self, parts: Sequence[np.ndarray], sizes: Sequence[Sizes]) -> np.ndarray:
        """The tensor of these parts: the inverse of `cut`."""
        flat, axis = [], 0
        for part, array in enumerate(parts):
            shape = []
            for place, (before, choices) in enumerate(self._dims()):
                axis = 2 * place + 1 if len(choices) > 1 else axis
                shape += [_count(before, sizes[part]), _count(choices[part if len(choices) > 1 else 0], sizes[part])]
            flat.append(array.reshape(shape))
        return (np.concatenate(flat, axis) if len(flat) > 1 else flat[0]).reshape(self.shape(sizes))

    def _dims(self) -> list[tuple[str, list[str]]]:
        """Each dimension as the letters before the cut and those of each part: "NH" is NH and [""]."""
        dims = []
        for dim in self.axes.split():
            found = re.fullmatch(r"([A-Z]*)(?:\(([A-Z1]+(?:\+[A-Z1]+)+)\))?|([A-Z]+(?:\+[A-Z]+)+)", dim)
            if found is None:
                raise ValueError(f'axes are written "NH D", "NH+KH+KH D" or "D F(1+1)", got {self.axes!r}')
            before, inside, whole = found.groups()
            dims.append((before or "", (inside or whole or "").split("+")))
        return dims

    def _parts(self, parts: list[str], sizes: Sequence[Sizes]) -> list[int]:
        return [_count(letters, sizes[place]) for place, letters in enumerate(parts)]


def _count(letters: str, sizes: Sizes) -> int:
    return math.prod(sizes[letter] for letter in letters if letter != "1")


@dataclass(frozen=True)
class Part:
    """Where a part of a tensor belongs: a parameter, and the layer of its stack (None where it stacks none)."""

    parameter: str
    layer: int | None
    order: tuple[int, ...]
    """The part's axes, transposed by this, are the parameter's."""


@dataclass(frozen=True)
class Unit:
    """What is read or written at once: the parts of some parameters, and the tensor (or one an expert) they are in."""

    line: TableEntry
    depth: int | None
    """Of the layer."""
    count: int
    """How many tensors."""
    parts: tuple[Part, ...]
    sizes: tuple[Sizes, ...]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the tensors."""
        return tuple(self.line.name.format(layer=self.depth, expert=expert) for expert in range(self.count))

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Of each tensor."""
        return self.line.shape(self.sizes)

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.line.name

    def cut(self, tensors: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The parts of these tensors, in the checkpoint's order of axes, E first where each expert has its own."""
        cuts = [self.line.cut(tensor, self.sizes) for tensor in tensors]
        return [np.stack(part) for part in zip(*cuts, strict=True)] if self.by_expert else cuts[0]

    def join(self, expert: int, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor (of this expert) of parts in the parameters' own order of axes: the inverse of `cut`."""
        turned = [np.transpose(a, np.argsort(p.order)) for a, p in zip(parts, self.parts, strict=True)]
        return self.line.join([part[expert] for part in turned] if self.by_expert else turned, self.sizes)


def units(table: Table, decoder: Decoder, described: Mapping[str, Description]) -> list[Unit]:
    """Everything a checkpoint of `decoder` holds, by depth.

    Raises ValueError where a parameter of the decoder is in no tensor of the table, or in two.
    """
    lines = [TableEntry(name, axes, tuple(ours)) for name, (axes, *ours) in table.items()]
    depths = list(enumerate(_depths(decoder)))
    found = [_unit(line, "", None, None, described) for line in lines if "{layer}" not in line.name]
    for depth, (prefix, layer) in depths:
        found += [_unit(line, prefix, depth, layer, described) for line in lines if "{layer}" in line.name]
    result = [unit for unit in found if unit is not None]
    held = Counter((part.parameter, part.layer) for unit in result for part in unit.parts)
    wanted = [(name, None) for name in described if not name.startswith(("first.", "stack.", "rest."))]
    wanted += [(n, layer) for _, (prefix, layer) in depths for n in described if n.startswith(prefix)]
    missing = sorted({name for name, _ in set(wanted) - set(held)})
    twice = sorted({name for (name, _), times in held.items() if times > 1})
    if missing or twice:
        axes = ", ".join(f"{name} ({described[name].axes})" for name in missing)
        raise ValueError(f"the table of names has no tensor for {axes or 'none'}, and several for {twice or 'none'}")
    return result


def _depths(decoder: Decoder) -> Iterator[tuple[str, int | None]]:
    """What the names of each layer's parameters start with, and its place in their L axis."""
    yield from ((f"first.{i}.", None) for i in range(len(decoder.first)))
    for repeat in range(decoder.repeats):
        yield from ((f"stack.{i}.", repeat) for i in range(len(decoder.block)))
    yield from ((f"rest.{i}.", None) for i in range(len(decoder.rest)))


def _unit(
    line: TableEntry, prefix: str, depth: int | None, layer: int | None, described: Mapping[str, Description]
) -> Unit | None:
    """The unit of a line at one depth, or None where the model has no such parameters, or they have other axes."""
    ours = [prefix + name for name in line.ours]
    if not any(name in described for name in ours):
        return None
    if not all(name in described for name in ours):
        raise ValueError(f"{line.name} holds {ours} together, and the model has only some of them")
    parts, sizes = [], []
    by_expert = "{expert}" in line.name
    for place, name in enumerate(ours):
        known, stacked = described[name], layer is not None
        inner, shape = known.axes.split()[stacked:], known.shape[stacked:]
        letters = ("E" if by_expert else "") + line.letters(place)
        if sorted(letters) != sorted(inner):
            return None
        sizes.append(dict(zip(inner, shape, strict=True)))
        parts.append(Part(name, layer, tuple(letters.index(letter) for letter in inner)))
    count = sizes[0]["E"] if by_expert else 1
    return Unit(line, depth, count, tuple(parts), tuple(sizes))

"""How a mesh splits a model: every tensor's shards and bytes per device, as a table, a drawing, JSON or a picture.

Nothing is computed, and the devices need not be there.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from ...configs.run import Run
from ...layers.sharding.axes import batch_partition, names_of, shard_count, stream_partition
from ...layers.spec import missing_package
from ...zoo.decoder import Decoder
from ...zoo.parameters import describe, partitions
from ..distributed import mesh as meshes
from ..runs.progress import memory_size, print_whole

MOST_CELLS = 8
"""Rows and columns of shards that are drawn of a tensor."""


@dataclass(frozen=True)
class Tensor:
    """An array and how it is split."""

    name: str
    axes: str
    shape: tuple[int, ...]
    dtype: str
    split: tuple[tuple[str, ...], ...]
    """The mesh axes that split each dimension."""
    shard: tuple[int, ...]
    """The shape of a device's part."""
    shards: int
    """How many different parts there are."""
    copies: int
    """How many devices hold the same part."""
    bytes: int
    bytes_per_device: int

    @property
    def layout(self) -> str:
        """E.g. "L=12 D=768/fsdp F=3072": each dimension with the mesh axes that split it."""
        parts = zip(self.axes.split(), self.shape, self.split, strict=True)
        return " ".join(f"{letter}={size}" + "".join(f"/{axis}" for axis in names) for letter, size, names in parts)


@dataclass(frozen=True)
class Layout:
    """All that a mesh splits: parameters, and of a run its tokens and residual stream (of one micro-batch)."""

    name: str
    mesh: dict[str, int]
    parameters: list[Tensor]
    activations: list[Tensor]

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return sum(tensor.bytes for tensor in self.parameters)

    @property
    def bytes_per_device(self) -> int:
        """Of the parameters that a device holds."""
        return sum(tensor.bytes_per_device for tensor in self.parameters)


def layout(name: str, found: Decoder | Run, mesh_text: str) -> Layout:
    """How a mesh such as "fsdp=8,tensor=4" splits a model or a run.

    Raises ValueError where an axis is unknown, or does not divide a dimension.
    """
    model = found.model if isinstance(found, Run) else found
    sizes = meshes.parse(mesh_text or (found.mesh if isinstance(found, Run) else ""))
    if not sizes:
        raise ValueError("there is no mesh to split over; name one, e.g. --mesh fsdp=8,tensor=4")
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    known = describe(model.abstract())
    specs = partitions(known, mesh)
    activations = []
    if isinstance(found, Run):
        meshes.check(found.replace(mesh=mesh_text or found.mesh), mesh)
        rows, length, dtype = found.batch // found.accumulate, found.length, jnp.dtype(found.dtype)
        tokens, stream = batch_partition(mesh), stream_partition(mesh, length)
        activations = [
            tensor_of("tokens", "B T", (rows, length), jnp.dtype(jnp.int32), tokens, mesh),
            tensor_of("residual stream", "B T D", (rows, length, model.dim), dtype, (*stream, None), mesh),
        ]
    tensors = [tensor_of(each, what.axes, what.shape, what.dtype, specs[each], mesh) for each, what in known.items()]
    return Layout(name, sizes, tensors, activations)


def tensor_of(name: str, axes: str, shape: tuple[int, ...], dtype: Any, spec: Any, mesh: AbstractMesh) -> Tensor:
    """An array with these axis letters on a mesh."""
    split = tuple(names_of(entry) for entry in (*spec, *[None] * (len(shape) - len(spec))))
    shard = tuple(size // shard_count(names, mesh) for size, names in zip(shape, split, strict=True))
    shards = math.prod(shard_count(names, mesh) for names in split)
    size = dtype.itemsize
    whole, own = math.prod(shape) * size, math.prod(shard) * size
    return Tensor(name, axes, shape, str(dtype), split, shard, shards, mesh.size // shards, whole, own)


def as_json(found: Layout) -> str:
    """The layout as JSON."""
    totals = {"devices": found.devices, "bytes": found.bytes, "bytes_per_device": found.bytes_per_device}
    return json.dumps(asdict(found) | totals, indent=2)


def show(found: Layout, console: Console, *, drawn: bool = True) -> None:
    """Prints the table, the totals, and a drawing of each kind of tensor in letters."""
    rows = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("tensor", "shape / mesh axes", "of a device", "dtype", "shards", "copies", "bytes", "per device"):
        right = heading in ("shards", "copies", "bytes", "per device")
        rows.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for tensor in (*found.parameters, *found.activations):
        rows.add_row(
            tensor.name,
            tensor.layout,
            " ".join(map(str, tensor.shard)),
            tensor.dtype,
            str(tensor.shards),
            str(tensor.copies),
            memory_size(tensor.bytes),
            memory_size(tensor.bytes_per_device),
        )
    print_whole(console, rows)
    mesh = ",".join(f"{name}={size}" for name, size in found.mesh.items())
    share = found.bytes_per_device * found.devices / found.bytes
    console.print(
        f"\n{found.name} on {mesh}: {memory_size(found.bytes)} of parameters, {memory_size(found.bytes_per_device)} on "
        f"each of {found.devices} devices ({share:.2f} copies of the model in all)\n",
        highlight=False,
    )
    for title, tensor in _kinds(found).items() if drawn else ():
        console.print(f"{title}\n{drawing(tensor, found.mesh)}\n", highlight=False, soft_wrap=True)


def drawing(tensor: Tensor, mesh: dict[str, int]) -> str:
    """The shards of a tensor as plain text, each with the devices that hold it."""
    grid, (down, across) = _grid(tensor, mesh)
    rows = [[_ranges(cell) for cell in row[:MOST_CELLS]] for row in grid[:MOST_CELLS]]
    width = max(len(cell) for row in rows for cell in row)
    lines = ["  | " + " | ".join(cell.ljust(width) for cell in row) + " |" for row in rows]
    more = [f"{len(grid)} rows of shards in all"] if len(grid) > MOST_CELLS else []
    more += [f"{len(grid[0])} columns in all"] if len(grid[0]) > MOST_CELLS else []
    return "\n".join([f"  {down} down, {across} across", *lines, *(f"  ... {each}" for each in more)])


def plot(found: Layout, file: Path) -> None:
    """Draws the shards of each kind of tensor into a picture. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("pictures take", "matplotlib") from error
    kinds = _kinds(found)
    columns = min(3, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(4.4 * columns, 2.6 * lines), layout="constrained", dpi=110)
    mesh = ",".join(f"{name}={size}" for name, size in found.mesh.items())
    figure.suptitle(f"{found.name} on {mesh}: {memory_size(found.bytes_per_device)} of parameters on each device")
    for place, (title, tensor) in enumerate(kinds.items()):
        grid, (down, across) = _grid(tensor, found.mesh)
        axes = figure.add_subplot(lines, columns, place + 1)
        first = np.array([[cell[0] for cell in row] for row in grid])
        axes.imshow(first, aspect="auto", cmap="viridis", vmin=0, vmax=max(1, found.devices - 1), alpha=0.6)
        axes.set_title(title, fontsize=7)
        axes.set_xlabel(across, fontsize=7)
        axes.set_ylabel(down, fontsize=7)
        axes.set_xticks(np.arange(first.shape[1] + 1) - 0.5, labels=[])
        axes.set_yticks(np.arange(first.shape[0] + 1) - 0.5, labels=[])
        axes.grid(color="white", linewidth=1)
        if first.size <= MOST_CELLS**2:
            for row, cells in enumerate(grid):
                for column, cell in enumerate(cells):
                    axes.text(column, row, _ranges(cell), ha="center", va="center", fontsize=6)
    figure.savefig(file)


def _kinds(found: Layout) -> dict[str, Tensor]:
    """One tensor of those that are split alike, by the names of all."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in (*found.parameters, *found.activations):
        split = tuple((letter, names) for letter, names in zip(tensor.axes.split(), tensor.split, strict=True) if names)
        groups.setdefault(split, []).append(tensor)
    titles = {}
    for tensors in groups.values():
        names = [tensor.name for tensor in tensors]
        rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
        titles[", ".join(names[:2]) + rest] = tensors[0]
    return titles


def _grid(tensor: Tensor, mesh: dict[str, int]) -> tuple[list[list[list[int]]], tuple[str, str]]:
    """The devices of each shard, in rows and columns, and what goes down and across: the last that is split."""
    devices = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    split = [dim for dim, names in enumerate(tensor.split) if names]
    sides = split[:-1], split[-1:]
    order = [list(mesh).index(name) for dim in split for name in tensor.split[dim]]
    others = [axis for axis in range(devices.ndim) if axis not in order]
    counts = [math.prod(mesh[name] for dim in side for name in tensor.split[dim]) for side in sides]
    grid = devices.transpose(*order, *others).reshape(*counts, -1)
    letters = [tensor.layout.split()[dim] for dim in range(len(tensor.split))]
    down, across = (" ".join(letters[dim] for dim in side) or "whole" for side in sides)
    return grid.tolist(), (down, across)


def _ranges(devices: list[int]) -> str:
    """E.g. "0-3,8-11"; of many stretches, the first and how many there are."""
    ordered = sorted(devices)
    stretches: list[list[int]] = []
    for device in ordered:
        if stretches and device == stretches[-1][1] + 1:
            stretches[-1][1] = device
        else:
            stretches.append([device, device])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in stretches]
    return ",".join(texts) if len(texts) <= 4 else f"{texts[0]},... ({len(ordered)})"

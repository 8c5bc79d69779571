"""`zoo shard`: how a mesh splits a model, as a table, a drawing, JSON or a picture. No devices are needed."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AbstractMesh, PartitionSpec
from rich.console import Console
from rich.table import Table

from ...configs.run import Run
from ...layers.sharding.axes import batch_partition, names_of, shard_count, stream_partition
from ...layers.spec import missing_package
from ...zoo.decoder import Decoder
from ...zoo.parameters import Description, describe, partitions
from ..distributed import mesh as meshes
from ..runs.progress import memory_size, print_whole
from .flags import parse_flags
from .source import HELP, SourceFlags

MAX_CELLS = 8
"""Largest number of rows and columns of shards in the drawing of a tensor."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Every tensor's shards and bytes per device on a mesh, with a drawing of the devices that hold each shard.

    Example: `zoo shard llama3_70b --mesh fsdp=64,tensor=4 --plot shards.png`
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=HELP)]
    mesh: str = ""
    """Axes and sizes, e.g. 'fsdp=8,tensor=4' (docs/sharding.md). Default: the run's mesh."""
    json: bool = False
    """Print JSON."""
    plot: Path | None = None
    """Draw a picture into this file (.png, .svg, .pdf) instead of in letters."""
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = SourceFlags()


def parse(arguments: Sequence[str]) -> Shard:
    """The spec that the arguments describe."""
    return parse_flags(Shard, arguments, "zoo shard")


def run(spec: Shard) -> None:
    """Prints the layout, as a table or as JSON, and draws it."""
    (model_or_run,) = spec.source.read(spec.model)
    result = layout(spec.model, model_or_run, spec.mesh)
    if spec.plot is not None:
        plot(result, spec.plot)
    if spec.json:
        print(as_json(result))
    else:
        show(result, Console(), drawn=spec.plot is None)


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
    """The shape of one shard."""
    shards: int
    """Number of different shards."""
    copies: int
    """Number of devices that hold the same shard."""
    bytes: int
    bytes_per_device: int

    @property
    def layout(self) -> str:
        """E.g. "L=12 D=768/fsdp F=3072": each dimension with the mesh axes that split it."""
        parts = zip(self.axes.split(), self.shape, self.split, strict=True)
        return " ".join(f"{letter}={size}" + "".join(f"/{axis}" for axis in names) for letter, size, names in parts)


@dataclass(frozen=True)
class Layout:
    """The arrays that a mesh splits: parameters and, for a run, the tokens and residual stream of one micro-batch."""

    name: str
    mesh: dict[str, int]
    parameters: list[Tensor]
    activations: list[Tensor]

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(tensor.bytes for tensor in self.parameters)

    @property
    def bytes_per_device(self) -> int:
        """Bytes of the parameters that a device holds."""
        return sum(tensor.bytes_per_device for tensor in self.parameters)


def layout(name: str, model_or_run: Decoder | Run, mesh_text: str) -> Layout:
    """How a mesh such as "fsdp=8,tensor=4" splits a model or a run.

    Raises ValueError if an axis is unknown, or does not divide a dimension.
    """
    run = model_or_run if isinstance(model_or_run, Run) else None
    model = model_or_run.model if isinstance(model_or_run, Run) else model_or_run
    sizes = meshes.parse(mesh_text or (run.mesh if run else ""))
    if not sizes:
        raise ValueError("there is no mesh to split over; name one, e.g. --mesh fsdp=8,tensor=4")
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    parameters = describe(model.abstract())
    specs = partitions(parameters, mesh)
    tensors = [tensor_of(name, parameter, specs[name], mesh) for name, parameter in parameters.items()]
    activations = []
    if run is not None:
        meshes.check(run.replace(mesh=mesh_text or run.mesh), mesh)
        shape, dtype = (run.batch // run.accumulate, run.length), jnp.dtype(run.dtype)
        tokens = Description("B T", shape, jnp.dtype(jnp.int32), 0)
        stream = Description("B T D", (*shape, model.dim), dtype, 0)
        activations = [
            tensor_of("tokens", tokens, batch_partition(mesh), mesh),
            tensor_of("residual stream", stream, PartitionSpec(*stream_partition(mesh, run.length), None), mesh),
        ]
    return Layout(name, sizes, tensors, activations)


def tensor_of(name: str, described: Description, spec: PartitionSpec, mesh: AbstractMesh) -> Tensor:
    """An array with these axis letters on a mesh."""
    shape = described.shape
    split = tuple(names_of(entry) for entry in (*spec, *[None] * (len(shape) - len(spec))))
    shard = tuple(size // shard_count(names, mesh) for size, names in zip(shape, split, strict=True))
    shards = math.prod(shard_count(names, mesh) for names in split)
    itemsize = described.dtype.itemsize
    return Tensor(
        name=name,
        axes=described.axes,
        shape=shape,
        dtype=str(described.dtype),
        split=split,
        shard=shard,
        shards=shards,
        copies=mesh.size // shards,
        bytes=math.prod(shape) * itemsize,
        bytes_per_device=math.prod(shard) * itemsize,
    )


def as_json(layout: Layout) -> str:
    """The layout as JSON."""
    totals = {"devices": layout.devices, "bytes": layout.bytes, "bytes_per_device": layout.bytes_per_device}
    return json.dumps(asdict(layout) | totals, indent=2)


def show(layout: Layout, console: Console, *, drawn: bool = True) -> None:
    """Prints the table, the totals, and a drawing of each kind of tensor in letters."""
    rows = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("tensor", "shape / mesh axes", "of a device", "dtype", "shards", "copies", "bytes", "per device"):
        right = heading in ("shards", "copies", "bytes", "per device")
        rows.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for tensor in (*layout.parameters, *layout.activations):
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
    mesh = ",".join(f"{name}={size}" for name, size in layout.mesh.items())
    share = layout.bytes_per_device * layout.devices / layout.bytes
    console.print(
        f"\n{layout.name} on {mesh}: {memory_size(layout.bytes)} of parameters, "
        f"{memory_size(layout.bytes_per_device)} on each of {layout.devices} devices ({share:.2f} copies of the model "
        "in all)\n",
        highlight=False,
    )
    for title, tensor in _kinds(layout).items() if drawn else ():
        console.print(f"{title}\n{drawing(tensor, layout.mesh)}\n", highlight=False, soft_wrap=True)


def drawing(tensor: Tensor, mesh: dict[str, int]) -> str:
    """The shards of a tensor as plain text, each with the devices that hold it."""
    grid, (down, across) = _grid(tensor, mesh)
    rows = [[_ranges(cell) for cell in row[:MAX_CELLS]] for row in grid[:MAX_CELLS]]
    width = max(len(cell) for row in rows for cell in row)
    lines = ["  | " + " | ".join(cell.ljust(width) for cell in row) + " |" for row in rows]
    notes = [f"{len(grid)} rows of shards in all"] if len(grid) > MAX_CELLS else []
    notes += [f"{len(grid[0])} columns in all"] if len(grid[0]) > MAX_CELLS else []
    return "\n".join([f"  {down} down, {across} across", *lines, *(f"  ... {note}" for note in notes)])


def plot(layout: Layout, file: Path) -> None:
    """Draws the shards of each kind of tensor into a picture. Raises ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("pictures take", "matplotlib") from error
    kinds = _kinds(layout)
    columns = min(3, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(4.4 * columns, 2.6 * lines), layout="constrained", dpi=110)
    mesh = ",".join(f"{name}={size}" for name, size in layout.mesh.items())
    figure.suptitle(f"{layout.name} on {mesh}: {memory_size(layout.bytes_per_device)} of parameters on each device")
    for index, (title, tensor) in enumerate(kinds.items()):
        grid, (down, across) = _grid(tensor, layout.mesh)
        axes = figure.add_subplot(lines, columns, index + 1)
        first = np.array([[cell[0] for cell in row] for row in grid])
        axes.imshow(first, aspect="auto", cmap="viridis", vmin=0, vmax=max(1, layout.devices - 1), alpha=0.6)
        axes.set_title(title, fontsize=7)
        axes.set_xlabel(across, fontsize=7)
        axes.set_ylabel(down, fontsize=7)
        axes.set_xticks(np.arange(first.shape[1] + 1) - 0.5, labels=[])
        axes.set_yticks(np.arange(first.shape[0] + 1) - 0.5, labels=[])
        axes.grid(color="white", linewidth=1)
        if first.size <= MAX_CELLS**2:
            for row, cells in enumerate(grid):
                for column, cell in enumerate(cells):
                    axes.text(column, row, _ranges(cell), ha="center", va="center", fontsize=6)
    figure.savefig(file)


def _kinds(layout: Layout) -> dict[str, Tensor]:
    """One tensor of each group that is split alike, by the names of the group."""
    groups: dict[tuple[tuple[str, tuple[str, ...]], ...], list[Tensor]] = {}
    for tensor in (*layout.parameters, *layout.activations):
        split = tuple((letter, names) for letter, names in zip(tensor.axes.split(), tensor.split, strict=True) if names)
        groups.setdefault(split, []).append(tensor)
    titles = {}
    for tensors in groups.values():
        names = [tensor.name for tensor in tensors]
        rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
        titles[", ".join(names[:2]) + rest] = tensors[0]
    return titles


def _grid(tensor: Tensor, mesh: dict[str, int]) -> tuple[list[list[list[int]]], tuple[str, str]]:
    """The devices of each shard, in rows and columns, and the dimensions that go down and across (the last)."""
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
    """E.g. "0-3,8-11"; if there are many ranges, the first one and the number of devices."""
    ordered = sorted(devices)
    ranges: list[list[int]] = []
    for device in ordered:
        if ranges and device == ranges[-1][1] + 1:
            ranges[-1][1] = device
        else:
            ranges.append([device, device])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in ranges]
    return ",".join(texts) if len(texts) <= 4 else f"{texts[0]},... ({len(ordered)})"

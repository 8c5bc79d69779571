"""`zoo show`: the parameters and sizes of a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table

from ...configs.run import Run
from ...zoo.decoder import Decoder
from ...zoo.parameters import Description, describe, partitions
from ..distributed import mesh as meshes
from ..runs.progress import amount, memory_size, print_whole
from .flags import parse_flags
from .shard import tensor_of
from .source import HELP, SourceFlags


@dataclass(frozen=True, kw_only=True)
class Show:
    """Every parameter of a model with shape, dtype, sharding and bytes; totals, FLOPs and KV-cache bytes per token."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=HELP)]
    mesh: str = ""
    """Axes and sizes to split parameters over, e.g. 'fsdp=4,tensor=2'. No devices are needed."""
    length: int | None = None
    """Tokens of context for which FLOPs are counted. Default: the run's length, or 2048 if the model has as many
    positions."""
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = SourceFlags()


def parse(arguments: Sequence[str]) -> Show:
    """The spec that the arguments describe."""
    return parse_flags(Show, arguments, "zoo show")


def run(spec: Show) -> None:
    """Prints the table."""
    (model_or_run,) = spec.source.read(spec.model)
    table(spec.model, model_or_run, spec.mesh, spec.length, Console())


def parameters_of(model: Decoder) -> dict[str, Description]:
    """Every parameter of a model by name; nothing is computed."""
    return describe(model.abstract())


def cache_bytes(model: Decoder, dtype: DTypeLike = jnp.bfloat16) -> float:
    """Bytes of cache for one more token of a document, from the shapes of the caches."""

    def size(length: int) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(lambda: model.cache(1, length, dtype)))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return size(2) - size(1)


def table(title: str, model_or_run: Decoder | Run, mesh_text: str, length: int | None, console: Console) -> None:
    """Prints every parameter, and the totals."""
    is_run = isinstance(model_or_run, Run)
    model = model_or_run.model if is_run else model_or_run
    length = length or (model_or_run.length if is_run else min(2048, model.max_positions or 2048))
    sizes = meshes.parse(mesh_text or (model_or_run.mesh if is_run else ""))
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    parameters = parameters_of(model)
    splits = partitions(parameters, mesh)
    rows = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("parameter", "shape / mesh axis", "dtype", "bytes"):
        rows.add_column(heading, justify="right" if heading == "bytes" else "left", no_wrap=True)
    tensors = [tensor_of(name, parameter, splits[name], mesh) for name, parameter in parameters.items()]
    for tensor in tensors:
        rows.add_row(tensor.name, tensor.layout, tensor.dtype, memory_size(tensor.bytes))
    print_whole(console, rows)
    total = sum(parameter.size for parameter in parameters.values())
    weights = sum(tensor.bytes for tensor in tensors)
    unused = model.unused()
    active = f", {total - unused:,} active in a token" if unused else ""
    console.print(f"\n{title}: {total:,} parameters{active}, {memory_size(weights)}", highlight=False)
    if sizes:
        share = sum(tensor.bytes_per_device for tensor in tensors)
        console.print(f"on each of {math.prod(sizes.values())} devices: {memory_size(share)}", highlight=False)
    forward = model.flops(length)
    console.print(f"FLOPs per token at {length} tokens: {amount(forward)} forward, {amount(3 * forward)} training")
    console.print(f"KV cache per token: {memory_size(cache_bytes(model))} in bfloat16", highlight=False)

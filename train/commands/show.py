"""Tables of models and runs for people."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from ... import configs
from ...configs.run import Run
from ...layers.spec import Spec
from ...zoo.decoder import Decoder
from ...zoo.parameters import Description, describe, partitions
from ..distributed import mesh as meshes
from ..runs.progress import amount, memory_size, print_whole
from .shard import tensor_of


def parameters_of(model: Decoder) -> dict[str, Description]:
    """Every parameter of a model by name; nothing is computed."""
    return describe(model.abstract())


def cache_bytes(model: Decoder, dtype: Any = jnp.bfloat16) -> float:
    """Bytes of cache that one more token of a document takes, from the shapes of the caches themselves."""

    def size(length: int) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(lambda: model.cache(1, length, dtype)))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return size(2) - size(1)


def listing(console: Console) -> None:
    """Prints the named models and runs."""
    table = Table("name", "parameters", "what it is", box=None, header_style="bold", pad_edge=False)
    for title, named in (("models", configs.MODELS), ("runs", configs.RUNS)):
        table.add_row(f"[bold]{title}[/bold]")
        for name, made in named.items():
            found = made()
            model = found.model if isinstance(found, Run) else found
            size = sum(known.size for known in parameters_of(model).values())
            table.add_row(f"  {name}", amount(size), (made.__doc__ or "").splitlines()[0])
    console.print(table)
    console.print("\nzoo show NAME tells more; zoo train RUN trains.", highlight=False)


def table(title: str, found: Decoder | Run, mesh_text: str, length: int, console: Console) -> None:
    """Prints every parameter, and the totals."""
    model = found.model if isinstance(found, Run) else found
    length = length or (found.length if isinstance(found, Run) else min(2048, model.max_positions or 2048))
    sizes = meshes.parse(mesh_text or (found.mesh if isinstance(found, Run) else ""))
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    known = parameters_of(model)
    splits = partitions(known, mesh)
    rows = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("parameter", "shape / mesh axis", "dtype", "bytes"):
        rows.add_column(heading, justify="right" if heading == "bytes" else "left", no_wrap=True)
    tensors = [tensor_of(name, what.axes, what.shape, what.dtype, splits[name], mesh) for name, what in known.items()]
    for tensor in tensors:
        rows.add_row(tensor.name, tensor.layout, tensor.dtype, memory_size(tensor.bytes))
    print_whole(console, rows)
    total = sum(what.size for what in known.values())
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


def difference(a: str, first: Spec, b: str, second: Spec, console: Console) -> None:
    """Prints the settings in which two specs differ; a model is compared with a run's model."""
    if isinstance(first, Run) != isinstance(second, Run):
        first, second = (x.model if isinstance(x, Run) else x for x in (first, second))
    left, right = first.flat(), second.flat()
    rows = Table("setting", a, b, box=None, header_style="bold", pad_edge=False)
    for name in dict.fromkeys((*left, *right)):
        if left.get(name, "-") != right.get(name, "-"):
            rows.add_row(name, str(left.get(name, "-")), str(right.get(name, "-")))
    console.print(rows if rows.row_count else f"{a} and {b} are the same", highlight=False)

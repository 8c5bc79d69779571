"""The stages of a pipeline, which are the devices along a mesh axis, and their collectives."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

from .axes import AXES, spec, spec_of

(AXIS,) = AXES["L"]
"""The mesh axis."""


def count() -> int:
    """The number of stages of the ambient mesh; 1 if it has no such axis."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def check_none() -> None:
    """Raises ValueError if there are several: a model on stages can be trained, but not called."""
    if count() > 1:
        raise ValueError(
            f"layers on the stages of a mesh with {AXIS}={count()} can be trained, and not called: place the model on "
            f"a mesh without this axis, e.g. with fsdp={count()}"
        )


def index() -> Int[Array, ""]:
    """The index of this stage, inside `run`."""
    return jax.lax.axis_index(AXIS)


def bubble(stages: int, micro_batches: int) -> float:
    """The pipeline bubble, the share of time that a stage is idle: (P - 1) / (M + P - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def run(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on every stage. The specs name only this mesh axis; other axes split the arrays as before."""
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of size one split nothing, but must be manual too: a kernel needs to know that it has the whole device.
    names = {AXIS, *(name for name in mesh.axis_names if mesh.shape[name] == 1)}
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def _across(function: Callable[[Array], Array], x: Array) -> Array:
    """Calls a function that exchanges data between stages on each device's shard of x."""
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return function(x)
    split = spec(*spec_of(x))
    return jax.shard_map(function, in_specs=split, out_specs=split, check_vma=False)(x)


def shift(x: Array, offset: int) -> Array:
    """The x of the stage `offset` before this one; zeros if there is none."""
    stages = range(count())
    route = [(stage, stage + offset) for stage in stages if stage + offset in stages]
    return _across(lambda x: jax.lax.ppermute(x, AXIS, route), x)


def scatter(x: Float[Array, "B T D"]) -> Float[Array, "B U D"]:
    """This stage's slice, along T, of the x of one stage; all others pass zeros."""
    return _across(lambda x: jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True), x)


def gather(x: Float[Array, "B U D"]) -> Float[Array, "B T D"]:
    """The slices of all stages, concatenated along T."""
    return _across(lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True), x)


def own_slice(array: Array, stream: Float[Array, "B T D"]) -> Array:
    """This stage's slice of an array B T: that of the tokens which `scatter` of `stream` gives it."""

    def own(x: Array) -> Array:
        size = x.shape[1] // count()
        return jax.lax.dynamic_slice_in_dim(x, index() * size, size, axis=1)

    before, as_stream = spec(*spec_of(array)), spec(*spec_of(stream)[:2])
    if before == as_stream:
        return _across(own, array)
    return reshard(_across(own, reshard(array, as_stream)), before)


def total(tree: Any) -> Any:
    """The sum over stages."""
    return jax.tree.map(lambda x: _across(lambda x: jax.lax.psum(x, AXIS), x), tree)

"""The stages of a pipeline, which are devices along a mesh axis, and what they exchange."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

from .axes import AXES, spec, spec_of

(AXIS,) = AXES["L"]
"""The mesh axis."""


def count() -> int:
    """How many stages the mesh around has; 1 where it has no such axis."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def check_none() -> None:
    """Raises ValueError where there are several: what is on them can be trained alone."""
    if count() > 1:
        raise ValueError(
            f"layers on the stages of a mesh with {AXIS}={count()} can be trained, and not called: place the model on "
            f"a mesh without this axis, e.g. with fsdp={count()}"
        )


def place() -> Int[Array, ""]:
    """Which of them this one is, inside `run`."""
    return jax.lax.axis_index(AXIS)


def bubble(stages: int, micro_batches: int) -> float:
    """The share of the time in which a stage waits for micro-batches to come, or for others to end: (P-1) / (M+P-1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def run(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function done by every stage; specs name this axis alone, and others of the mesh split arrays as before."""
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of size one split nothing, but a kernel wants to know that it has the whole device.
    names = {AXIS, *(name for name in mesh.axis_names if mesh.shape[name] == 1)}
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def _across(function: Callable[[Array], Array], x: Array) -> Array:
    """Calls a function that moves something between stages, on each device's own part of x."""
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return function(x)
    split = spec(*spec_of(x))
    return jax.shard_map(function, in_specs=split, out_specs=split, check_vma=False)(x)


def passed(x: Array, places: int) -> Array:
    """What the stage so many places before has; zeros where there is none."""
    stages = range(count())
    route = [(stage, stage + places) for stage in stages if stage + places in stages]
    return _across(lambda x: jax.lax.ppermute(x, AXIS, route), x)


def shared(x: Float[Array, "B T D"]) -> Float[Array, "B U D"]:
    """A stage's share, along T, of what one stage has; the others have zeros."""
    return _across(lambda x: jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True), x)


def gathered(x: Float[Array, "B U D"]) -> Float[Array, "B T D"]:
    """The shares of all stages."""
    return _across(lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True), x)


def cut(array: Array, stream: Float[Array, "B T D"]) -> Array:
    """A stage's share of an array B T, split as it was: that of the tokens which `shared` gives it."""

    def own(x: Array) -> Array:
        size = x.shape[1] // count()
        return jax.lax.dynamic_slice_in_dim(x, place() * size, size, axis=1)

    before, as_stream = spec(*spec_of(array)), spec(*spec_of(stream)[:2])
    if before == as_stream:
        return _across(own, array)
    return reshard(_across(own, reshard(array, as_stream)), before)


def summed(tree: Any) -> Any:
    """The sum over stages."""
    return jax.tree.map(lambda x: _across(lambda x: jax.lax.psum(x, AXIS), x), tree)

"""Where arrays live on a mesh: one table from axis letter to mesh axis, and an einsum that follows types.

Meshes are explicit-mode (`jax.sharding.AxisType.Explicit`): an array's sharding is part of its type. So only parameters
and the batch are placed by hand; everything computed from them is placed by the rules of this file, and the same code
runs with no mesh at all.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec, reshard
from jaxtyping import Array, Float

MESH_AXES = ("dcn", "pipeline", "data", "fsdp", "expert", "context", "tensor")
"""The mesh axes there are, slowest first: dcn is over slices or hosts, all others within one."""

AXES: dict[str, tuple[str, ...]] = {
    "B": ("dcn", "data", "fsdp", "expert"),
    "T": ("context", "tensor"),
    "D": ("fsdp",),
    "V": ("tensor",),
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "E": ("expert",),
    "L": ("pipeline",),
}
"""The mesh axes that split each letter. Letters that are not here are never split.

A letter gives way where its axis splits another letter of the same product. So parameters, split by D and E at rest,
are gathered to be used: B is split over the same axes. And T is split over tensor in the residual stream and its norms
alone: between them, heads, features or the vocabulary are.
"""

GATHERED = (*AXES["D"], *AXES["E"])
"""The mesh axes that split parameters at rest alone."""


def partition(axes: str, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter with these axis letters ("D N H") is split at rest; vectors are not split over fsdp."""
    letters = axes.split()
    names = [_there(AXES.get(letter, ()), mesh) if letter not in "BT" else () for letter in letters]
    if len(letters) - stacked(axes) <= 1:
        names = [tuple(name for name in each if name not in AXES["D"]) for each in names]
    return spec(*names)


def stacked(axes: str) -> int:
    """How many leading letters only stack parameters that are alike: those of layers (L) and of experts (E)."""
    letters = axes.split()
    return next((place for place, letter in enumerate(letters) if letter not in "LE"), len(letters))


def batch_partition(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How tokens, B T, and what comes with them are split."""
    return spec(_there(AXES["B"], mesh), _there(("context",), mesh))


def stream_partition(mesh: Mesh | AbstractMesh, length: int) -> PartitionSpec:
    """How the residual stream, B T D, is split: as tokens are, and along T over tensor too, if that divides it."""
    time = _there(AXES["T"], mesh)
    return spec(_there(AXES["B"], mesh), time) if length % shard_count(time, mesh) == 0 else batch_partition(mesh)


def _there(names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def spec(*entries: Any) -> PartitionSpec:
    """A partition of arrays from a name, a tuple of names or nothing for each dimension."""
    each = (names_of(entry) for entry in entries)
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in each))


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a partition."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def shard_count(entry: Any, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts an entry of a partition splits."""
    return math.prod(mesh.shape.get(name, 1) for name in names_of(entry))


def parameter_axes(name: str, variable: Any) -> str:
    """The axis letters of a parameter, with an L for each leading dimension that stacks layers."""
    axes = variable.get_metadata().get("axes")
    if axes is None:
        raise ValueError(f"parameter {name} has no axes: make it with flaxzoo.layers.sharding.parameter")
    return " ".join(["L"] * (len(variable.shape) - len(axes.split())) + axes.split())


def parameter(axes: str, value: Float[Array, "..."], inputs: int = 0, *, exact: bool = False) -> nnx.Param:
    """An NNX parameter that knows its axis letters and, if it is a matrix, how many of them are its input.

    These are its first letters, or those after a leading E that stacks one matrix for each expert. One that is `exact`
    is used in float32, also in a model that is cast to compute in less.
    """
    assert value.ndim == len(axes.split()), (axes, value.shape)
    return nnx.Param(value, axes=axes, inputs=inputs, exact=exact)


def check_divides(name: str, axes: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError where a dimension of a parameter is not a multiple of the mesh axis that splits it."""
    for letter, size, axis in zip(axes.split(), shape, partition(axes, mesh), strict=False):
        if size % shard_count(axis, mesh):
            fits = [n for n in range(1, max(mesh.size, 64) + 1) if size % n == 0]
            raise ValueError(
                f"mesh axis {axis}={mesh.shape[axis]} does not divide {letter}={size} of parameter {name} ({axes}); "
                f"{axis} may be {', '.join(map(str, fits))}"
            )


def spec_of(array: Array | jax.ShapeDtypeStruct) -> tuple[Any, ...]:
    """The sharding of an array's type, one entry a dimension."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def gather(weight: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """A parameter made ready for use outside of `einsums`: cast, then gathered over fsdp and expert."""
    weight = jnp.asarray(weight, dtype)
    before = spec_of(weight)
    return reshard(weight, spec(*map(used_axes, before))) if any(map(names_of, before)) else weight


def used_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry that split a parameter also while it is used."""
    return tuple(name for name in names_of(entry) if name not in GATHERED)


def gather_shard(array: Array, before: tuple[Any, ...], after: tuple[Any, ...]) -> Array:
    """Inside `jax.shard_map`: a device's part of an array under one partition, made its part under a coarser one.

    It has the name "gathered", by which remat policies do not keep it.
    """
    for dim, (old, new) in enumerate(zip(before, after, strict=True)):
        more = names_of(old)[len(names_of(new)) :]
        assert names_of(old) == (*names_of(new), *more), (before, after)
        if more:
            array = checkpoint_name(jax.lax.all_gather(array, more, axis=dim, tiled=True), "gathered")
    return array


def reduce_shard(array: Array, over: tuple[str, ...], dim: int) -> Array:
    """Inside `jax.shard_map`: the sum over mesh axes, split over them along a dimension if they divide it."""
    if not over:
        return array
    if array.shape[dim] % jax.lax.axis_size(over):
        return jax.lax.psum(array, over)
    return jax.lax.psum_scatter(array, over, scatter_dimension=dim, tiled=True)


def time_after(entry: Any, length: int, over: tuple[str, ...]) -> tuple[str, ...]:
    """What splits T after `reduce_shard` along it, where `entry` did before."""
    names = (*names_of(entry), *over)
    return names if length % shard_count(names, jax.sharding.get_abstract_mesh()) == 0 else names_of(entry)


def shards(array: Array, dim: int) -> int:
    """Into how many parts a dimension of an array is split."""
    return shard_count(spec_of(array)[dim], jax.typeof(array).sharding.mesh)


def zeros(shape: tuple[int, ...], dtype: Any, spec: tuple[Any, ...]) -> Array:
    """Zeros split as `spec` says."""
    return jnp.zeros(shape, dtype, out_sharding=split_as(*spec))


def zeros_like(tree: Any, *leading: int) -> Any:
    """Zeros with the shapes of arrays, after leading dimensions, and split as they are; shapes alone will do."""
    return jax.tree.map(lambda x: zeros((*leading, *x.shape), x.dtype, (*[None] * len(leading), *spec_of(x))), tree)


def split_as(*spec: Any) -> PartitionSpec | None:
    """The `out_sharding` of a result with these entries, or None where there is no mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else PartitionSpec(*spec)


def reshard_like(array: Array, like: Array) -> Array:
    """An array, split as another one of its shape is."""
    spec = split_as(*spec_of(like))
    return array if spec is None else reshard(array, spec)


def per_device(function: Callable[..., Array], *arrays: Array) -> Array:
    """Calls `function` on each device's own part of the arrays; the result is split like the first of them.

    Arrays that every device has whole are no exception: a kernel may be among what it calls, of which XLA does not know
    that all devices do the same (nor over which axes results differ: hence `check_vma`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape[name] == 1 for name in mesh.explicit_axes):
        return function(*arrays)
    specs = tuple(PartitionSpec(*spec_of(array)) for array in arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def context_axis(array: Float[Array, "B T ..."]) -> str | None:
    """The mesh axis that splits T outside of the residual stream, where one does."""
    names = names_of(spec_of(array)[1])
    return names[0] if names else None


def between_norms(array: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    """An array that is split along T as the residual stream is, split as what depends on positions is."""
    batch, time, *rest = spec_of(array)
    outside = tuple(name for name in names_of(time) if name not in AXES["N"])
    return array if outside == names_of(time) else reshard(array, spec(batch, outside, *rest))


def with_layer(stack: Float[Array, "L ..."], one: Float[Array, "..."], index: Any) -> Float[Array, "L ..."]:
    """A stack with one of its layers filled in, by the devices that hold it."""
    split, mesh = spec_of(stack), jax.typeof(stack).sharding.mesh
    if not names_of(split[0]):
        return jax.lax.dynamic_update_index_in_dim(stack, one, index, 0)

    def put(stack: Array, one: Array, index: Array) -> Array:
        place = index - jax.lax.axis_index(split[0]) * stack.shape[0]
        nearest = jnp.clip(place, 0, stack.shape[0] - 1)
        old = jax.lax.dynamic_index_in_dim(stack, nearest, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(stack, jax.lax.select(place == nearest, one, old), nearest, 0)

    specs = spec(*split), spec(*split[1:]), PartitionSpec()
    return jax.shard_map(put, mesh=mesh, in_specs=specs, out_specs=specs[0])(stack, one, jnp.asarray(index))


def whole(array: Array) -> Array:
    """The array with all of its parts on every device."""
    return array if jax.sharding.get_abstract_mesh().empty else reshard(array, PartitionSpec())

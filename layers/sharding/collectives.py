"""Collectives between the devices of a mesh, and functions of each device's shard."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, reshard
from jaxtyping import Array, Float

from .axes import AXES, names_of, spec, spec_of, split_as, used_axes


def gather(weight: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """A parameter for use outside of `einsums`: cast to `dtype`, then gathered over fsdp and expert."""
    weight = jnp.asarray(weight, dtype)
    before = spec_of(weight)
    return reshard(weight, spec(*map(used_axes, before))) if any(map(names_of, before)) else weight


def gather_shard(array: Array, before: tuple[Any, ...], after: tuple[Any, ...]) -> Array:
    """Inside `jax.shard_map`: gathers a shard under the partition `before` to the shard under the coarser `after`.

    It has the checkpoint name "gathered", so that remat policies do not save it.
    """
    for dim, (old, new) in enumerate(zip(before, after, strict=True)):
        more = names_of(old)[len(names_of(new)) :]
        assert names_of(old) == (*names_of(new), *more), (before, after)
        if more:
            array = checkpoint_name(jax.lax.all_gather(array, more, axis=dim, tiled=True), "gathered")
    return array


def reduce_shard(array: Array, over: tuple[str, ...], dim: int) -> Array:
    """Inside `jax.shard_map`: the sum over mesh axes, scattered over them along a dimension if it is divisible."""
    if not over:
        return array
    if array.shape[dim] % jax.lax.axis_size(over):
        return jax.lax.psum(array, over)
    return jax.lax.psum_scatter(array, over, scatter_dimension=dim, tiled=True)


def reshard_like(array: Array, like: Array) -> Array:
    """An array, resharded to the partition of another one of its shape."""
    spec = split_as(*spec_of(like))
    return array if spec is None else reshard(array, spec)


def per_device(function: Callable[..., Array], *arrays: Array) -> Array:
    """Calls `function` on each device's shards of the arrays; the result is split like the first of them.

    Replicated arrays are mapped too: `function` may call a kernel, and XLA cannot infer that all devices compute the
    same in it, nor over which axes results differ (hence `check_vma=False`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape[name] == 1 for name in mesh.explicit_axes):
        return function(*arrays)
    specs = tuple(PartitionSpec(*spec_of(array)) for array in arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def between_norms(array: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    """An array whose T is split like the residual stream, resharded to the T of arrays between norms."""
    batch, time, *rest = spec_of(array)
    outside = tuple(name for name in names_of(time) if name not in AXES["N"])
    return array if outside == names_of(time) else reshard(array, spec(batch, outside, *rest))


def with_layer(stack: Float[Array, "L ..."], layer: Float[Array, "..."], index: Any) -> Float[Array, "L ..."]:
    """A stack with one layer replaced, on the devices that hold it."""
    split, mesh = spec_of(stack), jax.typeof(stack).sharding.mesh
    if not names_of(split[0]):
        return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)

    def replace(stack: Array, layer: Array, index: Array) -> Array:
        local = index - jax.lax.axis_index(split[0]) * stack.shape[0]
        nearest = jnp.clip(local, 0, stack.shape[0] - 1)
        old = jax.lax.dynamic_index_in_dim(stack, nearest, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(stack, jax.lax.select(local == nearest, layer, old), nearest, 0)

    specs = spec(*split), spec(*split[1:]), PartitionSpec()
    return jax.shard_map(replace, mesh=mesh, in_specs=specs, out_specs=specs[0])(stack, layer, jnp.asarray(index))


def replicate(array: Array) -> Array:
    """The array with a full copy on every device."""
    return array if jax.sharding.get_abstract_mesh().empty else reshard(array, PartitionSpec())

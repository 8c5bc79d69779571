"""Tables of vectors, looked up by id, and the map from hidden states to logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..kernels.by_platform import by_platform
from ..sharding.axes import names_of, parameter, spec, spec_of, time_after, used_axes
from ..sharding.collectives import gather_shard, reduce_shard
from .einsum import einsum
from .expand import expand
from .linear import is_few, rows_product


def to_logits(x: Float[Array, "B T D"], head: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Float32 logits: the products of hidden states with every row of the output embedding."""

    def product(x: Array, head: Array) -> Array:
        return einsum("B T D, V D -> B T V", x, head, preferred_element_type=jnp.float32)

    if not is_few(x, head) or not jax.sharding.get_abstract_mesh().empty:
        return product(x, head)
    like = jax.ShapeDtypeStruct((*x.shape[:2], head.shape[0]), jnp.float32)
    return by_platform({"tpu": product, "cuda": product, "default": rows_product}, (x, head), like)


class Embedding(nnx.Module):
    """A table of vectors that are looked up by id; its transpose maps hidden states to logits."""

    def __init__(self, axes: str, rows: int, dim: int, *, rngs: nnx.Rngs, std: float = 0.02):
        self.table = parameter(axes, jax.random.normal(rngs.params(), (rows, dim), jnp.float32) * std, inputs=1)

    def __call__(self, ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """The vectors of `ids`, in `dtype`, split like the residual stream."""
        return _lookup(self.table[...], ids, dtype)


def _lookup(table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """The vectors of ids. If the vocabulary is split, each device looks up all ids in its shard."""
    before = spec_of(table)
    after = tuple(map(used_axes, before))
    over = after[0]
    batch, time = spec_of(ids)
    if not any(map(names_of, (*before, batch, time))):
        return expand(_take, table, ids, dtype=dtype)

    def lookup(table: Array, ids: Array) -> Array:
        table = gather_shard(table, before, after)
        if not over:
            return _take(table, ids)
        index = ids - jax.lax.axis_index(over) * table.shape[0]
        inside = (index >= 0) & (index < table.shape[0])
        rows = _take(table, jnp.where(inside, index, 0))
        return jnp.where(inside[..., None], rows, jnp.zeros((), rows.dtype))

    def local(table: Array, ids: Array) -> Array:
        return reduce_shard(expand(lookup, table, ids, dtype=dtype), over, 1)

    out = spec(batch, time_after(time, ids.shape[1], over), None)
    return jax.shard_map(local, in_specs=(spec(*before), spec(batch, time)), out_specs=out, check_vma=False)(table, ids)


def _take(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return table.at[ids].get()

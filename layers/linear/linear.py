"""Linear maps between named axes, and embeddings."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ..kernels.by_platform import by_platform
from ..sharding.axes import (
    gather,
    gather_shard,
    names_of,
    parameter,
    reduce_shard,
    spec,
    spec_of,
    time_after,
    used_axes,
)
from .einsum import einsum, einsums
from .expand import add_bias, expand


class Linear(nnx.Module):
    """y = x W + b between named axes: `Linear("D -> N H", {"D": 64, "N": 4, "H": 16}, ...)` maps B T D to B T N H.

    W starts normal with standard deviation 1 / sqrt of the input size, b at zero.
    """

    def __init__(self, axes: str, sizes: Mapping[str, int], *, rngs: nnx.Rngs, bias: bool = False):
        inputs, outputs = (side.split() for side in axes.split("->"))
        fan_in = math.prod(sizes[letter] for letter in inputs)
        shape = tuple(sizes[letter] for letter in inputs + outputs)
        value = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(fan_in)
        self.axes = axes
        self.weight = parameter(" ".join(inputs + outputs), value, inputs=len(inputs))
        self.bias = parameter(" ".join(outputs), jnp.zeros(shape[len(inputs) :])) if bias else None

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """Maps the last axes of `x`, in the dtype of `x`."""
        return products((self,), x)[0]

    def finished(self, y: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """A product with the weight, named and with the bias."""
        # By this name a remat policy keeps y: it sees no matmul inside a function that has a gradient of its own.
        y = checkpoint_name(y, "product")
        return y if self.bias is None else add_bias(y, self.bias[...])

    def matrix(self, dtype: Any) -> Float[Array, "..."]:
        """W made ready for use, its input axes first."""
        return gather(self.weight[...], dtype)


class FusedTransposed(nnx.Module):
    """Linear maps of the same x as one matrix for decoding on a CPU, whose rows are the outputs.

    An output reads one stretch of memory. XLA's CPU compiler transposes a weight of more dimensions in memory at every
    product, and makes a float32 copy of one in bfloat16; for a few tokens that takes longer than the product. A sum of
    products it does in one pass, but two that share x put x in memory as often as the weight has rows.
    """

    def __init__(self, *linears: Linear):
        weights = [linear.weight[...] for linear in linears]
        biases = [linear.bias[...].reshape(-1) for linear in linears if linear.bias is not None]
        inputs = len(linears[0].axes.split("->")[0].split())
        self.shapes = tuple((weight.shape[:inputs], weight.shape[inputs:]) for weight in weights)
        """Of the inputs and the outputs of each map."""
        columns = [weight.reshape(math.prod(weight.shape[:inputs]), -1) for weight in weights]
        self.rows = parameter("F D", jnp.concatenate(columns, axis=1).T, inputs=1)
        assert len(biases) in (0, len(linears)), linears
        self.bias = parameter("F", jnp.concatenate(biases)) if biases else None

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """Maps the last axes of `x`, in the dtype of `x`, by the one map this is."""
        (y,) = self.each(x)
        return y

    def each(self, x: Float[Array, "B T ..."]) -> list[Float[Array, "B T ..."]]:
        """What each of the maps makes of `x`, in the dtype of `x`."""
        rows = self.rows[...].astype(x.dtype)
        flat = x.reshape(*x.shape[:2], -1)
        y = _rows_product(flat, rows).astype(x.dtype) if _few(x, rows) else jnp.einsum("BTD,FD->BTF", flat, rows)
        y = y if self.bias is None else add_bias(y, self.bias[...])
        ends = list(itertools.accumulate(math.prod(shape) for _, shape in self.shapes))
        parts = zip(jnp.split(y, ends[:-1], axis=2), self.shapes, strict=True)
        return [part.reshape(*x.shape[:2], *outputs) for part, (_, outputs) in parts]

    def matrix(self, dtype: Any) -> Float[Array, "..."]:
        """W of the one map this is, made ready for use, its input axes first."""
        ((inputs, outputs),) = self.shapes
        return self.rows[...].astype(dtype).T.reshape(*inputs, *outputs)


def products(linears: Sequence[Any], x: Float[Array, "..."], *which: Array) -> list[Float[Array, "..."]]:
    """What each of several linear maps makes of `x`, which on a mesh is gathered once for all of them.

    `FusedTransposed` may stand first for all; maps of other kinds are given `which` besides.
    """
    first = linears[0]
    if isinstance(first, FusedTransposed):
        return first.each(x)
    if not all(type(linear) is Linear for linear in linears):
        return [linear(x, *which) for linear in linears]
    sides = [[side.strip() for side in linear.axes.split("->")] for linear in linears]
    texts = [f"B T {inputs}, {inputs} {outputs} -> B T {outputs}" for inputs, outputs in sides]
    found = einsums(x, *zip(texts, (linear.weight[...] for linear in linears), strict=True))
    return [linear.finished(y) for linear, y in zip(linears, found, strict=True)]


def _rows_product(x: Float[Array, "B T D"], weight: Float[Array, "F D"]) -> Float[Array, "B T F"]:
    """The product with the transposed weight, in float32, as sums of products."""
    wide = weight.astype(jnp.float32)
    rows = [jnp.sum(wide * row, axis=1) for row in x.reshape(-1, x.shape[-1]).astype(jnp.float32)]
    return jnp.stack(rows).reshape(*x.shape[:2], -1)


def _few(x: Array, weight: Array) -> bool:
    """Whether a CPU does a product better as sums of products."""
    return weight.dtype != jnp.float32 and x.shape[0] * x.shape[1] <= 4


def to_logits(x: Float[Array, "B T D"], head: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Float32 products of hidden states with every row of the output embedding."""

    def product(x: Array, head: Array) -> Array:
        return einsum("B T D, V D -> B T V", x, head, preferred_element_type=jnp.float32)

    if not _few(x, head) or not jax.sharding.get_abstract_mesh().empty:
        return product(x, head)
    like = jax.ShapeDtypeStruct((*x.shape[:2], head.shape[0]), jnp.float32)
    return by_platform({"tpu": product, "cuda": product, "default": _rows_product}, (x, head), like)


class Embedding(nnx.Module):
    """A table of vectors, looked up by id and, transposed, the map from hidden states to logits."""

    def __init__(self, axes: str, rows: int, dim: int, *, rngs: nnx.Rngs, std: float = 0.02):
        self.table = parameter(axes, jax.random.normal(rngs.params(), (rows, dim), jnp.float32) * std, inputs=1)

    def __call__(self, ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """The rows of `ids`, in `dtype`, as the residual stream is split."""
        return _rows(self.table[...], ids, dtype)


def _rows(table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """The rows of ids. Where the vocabulary is split, each device looks for all ids in its part."""
    before = spec_of(table)
    after = tuple(map(used_axes, before))
    over = after[0]
    batch, time = spec_of(ids)
    if not any(map(names_of, (*before, batch, time))):
        return expand(_lookup, table, ids, dtype=dtype)

    def lookup(table: Array, ids: Array) -> Array:
        table = gather_shard(table, before, after)
        if not over:
            return _lookup(table, ids)
        index = ids - jax.lax.axis_index(over) * table.shape[0]
        inside = (index >= 0) & (index < table.shape[0])
        rows = _lookup(table, jnp.where(inside, index, 0))
        return jnp.where(inside[..., None], rows, jnp.zeros((), rows.dtype))

    def local(table: Array, ids: Array) -> Array:
        return reduce_shard(expand(lookup, table, ids, dtype=dtype), over, 1)

    out = spec(batch, time_after(time, ids.shape[1], over), None)
    return jax.shard_map(local, in_specs=(spec(*before), spec(batch, time)), out_specs=out, check_vma=False)(table, ids)


def _lookup(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return table.at[ids].get()

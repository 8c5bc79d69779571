"""Broadcasts and lookups whose gradients, which are sums over rows, are accumulated in float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..sharding.axes import spec_of, split_as, zeros

Expansion = Callable[..., Array]
"""A linear function of its first argument that copies entries to many rows; the others are indices or counts."""


def expand(function: Expansion, values: Float[Array, "..."], *indices: Array, dtype: Any) -> Float[Array, "..."]:
    """`function(values.astype(dtype), *indices)`, whose gradient in `values` is summed in float32.

    The transpose that JAX derives sums in `dtype`. In bfloat16 a sum of thousands of rows stops growing once an addend
    is below half a unit in the last place of the sum: it is wrong by tens of percent.
    """
    return _expand(function, jax.typeof(values), jnp.dtype(dtype), values, *indices)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _expand(function: Expansion, like: Any, dtype: Any, values: Array, *indices: Array) -> Array:
    return function(values.astype(dtype), *indices)


def _forward(
    function: Expansion, like: Any, dtype: Any, values: Array, *indices: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _expand(function, like, dtype, values, *indices), indices


def _backward(function: Expansion, like: Any, dtype: Any, indices: tuple[Array, ...], g: Array) -> tuple[Any, ...]:
    # The function is linear, so its gradient is the same at zeros, which XLA leaves out.
    start = zeros(like.shape, jnp.float32, tuple(like.sharding.spec))
    _, transpose = jax.vjp(lambda values: function(values, *indices), start)
    (total,) = transpose(g.astype(jnp.float32))
    return total.astype(like.dtype), *(None for _ in indices)


_expand.defvjp(_forward, _backward)


def broadcast(values: Float[Array, "..."], like: Float[Array, "..."], dims: tuple[int, ...]) -> Float[Array, "..."]:
    """`values` in the shape, dtype and sharding of `like`; dimension i of `values` becomes dimension `dims[i]`."""
    function = partial(_broadcast, like.shape, dims, split_as(*spec_of(like)))
    return expand(function, values, dtype=like.dtype)


def _broadcast(shape: tuple[int, ...], dims: tuple[int, ...], sharding: Any, values: Array) -> Array:
    return jax.lax.broadcast_in_dim(values, shape, dims, out_sharding=sharding)


def add_bias(y: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """Y + bias over the last dimensions of y, in the dtype of y."""
    return y + broadcast(bias, y, tuple(range(y.ndim - bias.ndim, y.ndim)))

"""Matmuls of rows with the matrix of their group, as in mixtures of experts."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..by_platform import by_platform


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "M D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """y_m = x_m W_e of the group e that row m is in; rows come in order of their groups, `sizes` rows in each.

    The sizes must sum to M. On TPU and GPU this is `jax.lax.ragged_dot`, which XLA compiles to one kernel. On CPU, XLA
    would multiply every row with the matrix of every group; there each block of rows is multiplied with its own matrix.
    """
    return by_platform({"default": _blocks, "tpu": _ragged, "cuda": _ragged}, (x, weights, sizes), _like(x, weights))


def _like(x: Array, weights: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], weights.shape[2]), x.dtype)


def _forward(x: Array, weights: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_product(x, weights, sizes), (x, weights, sizes)


def _backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, weights, sizes = saved
    x_grad = grouped_product(g, jnp.swapaxes(weights, 1, 2), sizes)
    functions = {"default": _outer_blocks, "tpu": _outer_ragged, "cuda": _outer_ragged}
    like = jax.ShapeDtypeStruct(weights.shape, weights.dtype)
    return x_grad, by_platform(functions, (x, g, sizes), like), None


grouped_product.defvjp(_forward, _backward)


def _ragged(x: Array, weights: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, weights, sizes)


_ROWS_OF_GROUPS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _outer_ragged(x: Array, g: Array, sizes: Array) -> Array:
    """The sum of x_m^T g_m over the rows of each group."""
    return jax.lax.ragged_dot_general(x, g, sizes, _ROWS_OF_GROUPS)


def _blocks(x: Array, weights: Array, sizes: Array) -> Array:
    block = _block_size(x.shape[0], sizes.shape[0])
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def step(index: Any, y: Array) -> Array:
        # A block may extend into the next group, whose first block overwrites these rows.
        group, start, _ = _locate(index, sizes, block)
        rows = jax.lax.dynamic_slice_in_dim(padded, start, block)
        product = rows @ jax.lax.dynamic_index_in_dim(weights, group, keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0)

    y = jnp.zeros((padded.shape[0], weights.shape[2]), x.dtype)
    return jax.lax.fori_loop(0, jnp.sum(_counts(sizes, block)), step, y)[: x.shape[0]]


def _outer_blocks(x: Array, g: Array, sizes: Array) -> Array:
    block = _block_size(x.shape[0], sizes.shape[0])
    x, g = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (x, g))

    def step(index: Any, total: Array) -> Array:
        group, start, end = _locate(index, sizes, block)
        inside = start + jnp.arange(block, dtype=jnp.int32) < end
        left, right = (jax.lax.dynamic_slice_in_dim(rows, start, block) for rows in (x, g))
        left = jnp.where(inside[:, None], left, jnp.zeros((), left.dtype))
        product = jnp.matmul(left.T, right, preferred_element_type=jnp.float32)
        so_far = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, so_far + product, group, 0)

    total = jnp.zeros((sizes.shape[0], x.shape[1], g.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, jnp.sum(_counts(sizes, block)), step, total).astype(x.dtype)


def _block_size(rows: int, groups: int) -> int:
    """The average number of rows of a group, rounded up to a power of two from 8 to 256."""
    return min(256, max(8, 2 ** math.ceil(math.log2(max(1, rows / groups)))))


def _counts(sizes: Array, block: int) -> Array:
    """The number of blocks of each group."""
    return -(-sizes // block)


def _locate(index: Any, sizes: Array, block: int) -> tuple[Array, Array, Array]:
    """The group of a block, its first row, and the first row after the group."""
    ends = jnp.cumsum(_counts(sizes, block))
    group = jnp.sum(ends <= index, dtype=jnp.int32)
    last = jnp.cumsum(sizes)[group]
    first = last - sizes[group]
    before = ends[group] - _counts(sizes, block)[group]
    return group, first + (index - before) * block, last

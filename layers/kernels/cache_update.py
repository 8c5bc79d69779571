"""Writes one token of every batch row into a KV cache: on TPU all rows at once, in place.

XLA would update one row after another, each by operations of a microsecond, which in a decode step of a large model add
up to more than its attention. The kernel copies the tiles that hold the slots to VMEM, all at the same time, and back
with the new vectors in them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from .by_platform import by_platform

ROWS_AT_ONCE = 32
"""The most batch rows at a time: each has a semaphore, and operations of its own in the kernel."""
TILE_BYTES = 8 * 2**20
"""VMEM for the tiles of these rows."""


def write_token(slots: Array, new: Array, index: Int[Array, " B"]) -> Array:
    """`slots[b, :, index[b]] = new[b, :, 0]`, in place; an index past the end writes nothing.

    Args:
        slots: B K S H, or B K S.
        new: B K 1 H, or B K 1, of the same dtype.
        index: the slot of each batch row.
    """
    functions = {"tpu": write_tiles if slots.ndim == 4 else write_all, "cpu": write_in_loop, "default": write_mapped}
    return by_platform(functions, (slots, new, index), slots)


def write_tiles(slots: Array, new: Array, index: Array, interpret: Any = False) -> Array:
    """`write_token` by the kernel; by XLA for float16, and where the slots end within a tile."""
    batch, heads, length, size = slots.shape
    rows = 32 // slots.dtype.itemsize
    if length % rows or slots.dtype == jnp.float16:
        return write_mapped(slots, new, index)
    tile = heads * rows * -(-size // 128) * 128 * slots.dtype.itemsize
    at_once = max(1, min(batch, ROWS_AT_ONCE, TILE_BYTES // tile))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(batch, at_once),),
        in_specs=[
            pl.BlockSpec((at_once, heads, 1, size), lambda i, _: (i, 0, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[
            pltpu.VMEM((at_once, heads, rows, size), slots.dtype),
            pltpu.SemaphoreType.DMA((at_once,)),
        ],
    )
    return pl.pallas_call(
        _kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(slots.shape, slots.dtype),
        input_output_aliases={2: 0},
        interpret=interpret,
        name="attention_put",
    )(index, new, slots)


def _kernel(index: Any, new: Any, _: Any, slots: Any, tiles: Any, semaphores: Any) -> None:
    at_once, _, rows, _ = tiles.shape
    batch, first = slots.shape[0], pl.program_id(0) * at_once

    def for_each_row(function: Callable[[int], None]) -> None:
        """Calls a function for each batch row of this program; the last program may have fewer."""
        for row in range(at_once):
            pl.when(first + row < batch)(partial(function, row)) if batch % at_once else function(row)

    def tile_of(row: int) -> tuple[Any, Any]:
        """The tile in HBM, and the index of the slot in it, which is past its end where nothing is written."""
        slot = index[first + row]
        start = pl.multiple_of(jnp.minimum(slot, slots.shape[2] - 1) // rows * rows, rows)
        return slots.at[first + row, :, pl.ds(start, rows), :], slot - start

    def read(row: int) -> Any:
        return pltpu.make_async_copy(tile_of(row)[0], tiles.at[row], semaphores.at[row])

    def write(row: int) -> Any:
        return pltpu.make_async_copy(tiles.at[row], tile_of(row)[0], semaphores.at[row])

    wide = jnp.float32 if jnp.issubdtype(tiles.dtype, jnp.floating) else jnp.int32
    line = lax.broadcasted_iota(jnp.int32, tiles.shape[1:], 1)

    def change(row: int) -> None:
        old, fresh = tiles[row].astype(wide), new[row].astype(wide)
        tiles[row] = jnp.where(line == tile_of(row)[1], fresh, old).astype(tiles.dtype)

    for_each_row(lambda row: read(row).start())
    for_each_row(lambda row: read(row).wait())
    for_each_row(change)
    for_each_row(lambda row: write(row).start())
    for_each_row(lambda row: write(row).wait())


def write_all(slots: Array, new: Array, index: Array) -> Array:
    """`write_token` for one number a slot: so few numbers that all are written."""
    slot = lax.broadcasted_iota(jnp.int32, slots.shape, 2)
    return jnp.where(slot == index.reshape(-1, 1, 1), new, slots)


def write_mapped(slots: Array, new: Array, index: Array) -> Array:
    """`write_token` by one update for each batch row, which XLA runs one after another."""
    return jax.vmap(lambda slots, new, index: _write_row(slots[None], new[None], 0, index)[0])(slots, new, index)


def write_in_loop(slots: Array, new: Array, index: Array) -> Array:
    """`write_token` in a loop: outside a loop, XLA for CPUs fuses an update into each of its readers, which copies."""

    def write(row: Any, slots: Array) -> Array:
        return _write_row(slots, lax.dynamic_slice_in_dim(new, row, 1), row, index[row])

    rows = jnp.where(jnp.any(index < slots.shape[2]), index.size, 0)  # not constant, so that XLA keeps the loop
    return lax.fori_loop(0, rows, write, slots)


def _write_row(slots: Array, new: Array, row: Any, index: Int[Array, ""]) -> Array:
    """`slots[row, :, index] = new[0, :, 0]`, in place; past the end, the last slot is written back unchanged."""
    start = (row, 0, jnp.minimum(index, slots.shape[2] - 1), *[0] * (slots.ndim - 3))
    old = lax.dynamic_slice(slots, start, new.shape)
    return lax.dynamic_update_slice(slots, jnp.where(index < slots.shape[2], new, old), start)

"""One token of every row into arrays with a slot for each: on TPU all rows at once, in place.

XLA would update row after row, each by operations of a microsecond, which for a decode step of a large model comes to
more than its attention. The kernel copies the tiles that the slots lie in to VMEM, all at the same time, and back with
the new vectors in them.
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

TOGETHER = 32
"""Rows at a time, at most: each has a semaphore, and operations of its own in the kernel."""
ROOM = 8 * 2**20
"""Bytes of VMEM for their tiles."""


def put(slots: Array, new: Array, index: Int[Array, " B"]) -> Array:
    """`slots[b, :, index[b]] = new[b, :, 0]`, in place; an index past the end writes nothing.

    Args:
        slots: B K S H, or B K S.
        new: B K 1 H, or B K 1, of the same dtype.
        index: one a row.
    """
    ways = {"tpu": put_tiles if slots.ndim == 4 else put_all, "cpu": put_in_turn, "default": put_each}
    return by_platform(ways, (slots, new, index), slots)


def put_tiles(slots: Array, new: Array, index: Array, interpret: Any = False) -> Array:
    """As `put`, by the kernel; what it can't do is left to XLA: slots that end within a tile, and float16."""
    batch, heads, length, size = slots.shape
    rows = 32 // slots.dtype.itemsize
    if length % rows or slots.dtype == jnp.float16:
        return put_each(slots, new, index)
    tile = heads * rows * -(-size // 128) * 128 * slots.dtype.itemsize
    together = max(1, min(batch, TOGETHER, ROOM // tile))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(batch, together),),
        in_specs=[
            pl.BlockSpec((together, heads, 1, size), lambda i, _: (i, 0, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[
            pltpu.VMEM((together, heads, rows, size), slots.dtype),
            pltpu.SemaphoreType.DMA((together,)),
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


def _kernel(index: Any, new: Any, _: Any, slots: Any, tiles: Any, done: Any) -> None:
    together, _, rows, _ = tiles.shape
    batch, first = slots.shape[0], pl.program_id(0) * together

    def each(what: Callable[[int], None]) -> None:
        """Of the rows that there are: the last ones may be fewer."""
        for row in range(together):
            pl.when(first + row < batch)(partial(what, row)) if batch % together else what(row)

    def where(row: int) -> tuple[Any, Any]:
        """Of a row: its tile in HBM, and the place of its slot in it, past the end where it writes nothing."""
        slot = index[first + row]
        start = pl.multiple_of(jnp.minimum(slot, slots.shape[2] - 1) // rows * rows, rows)
        return slots.at[first + row, :, pl.ds(start, rows), :], slot - start

    def read(row: int) -> Any:
        return pltpu.make_async_copy(where(row)[0], tiles.at[row], done.at[row])

    def write(row: int) -> Any:
        return pltpu.make_async_copy(tiles.at[row], where(row)[0], done.at[row])

    kind = jnp.float32 if jnp.issubdtype(tiles.dtype, jnp.floating) else jnp.int32
    line = lax.broadcasted_iota(jnp.int32, tiles.shape[1:], 1)

    def change(row: int) -> None:
        old, fresh = tiles[row].astype(kind), new[row].astype(kind)
        tiles[row] = jnp.where(line == where(row)[1], fresh, old).astype(tiles.dtype)

    each(lambda row: read(row).start())
    each(lambda row: read(row).wait())
    each(change)
    each(lambda row: write(row).start())
    each(lambda row: write(row).wait())


def put_all(slots: Array, new: Array, index: Array) -> Array:
    """The same for one number a slot, of which there are so few that all are written."""
    place = lax.broadcasted_iota(jnp.int32, slots.shape, 2)
    return jnp.where(place == index.reshape(-1, 1, 1), new, slots)


def put_each(slots: Array, new: Array, index: Array) -> Array:
    """The same by an update for each row, which XLA does one after the other."""
    return jax.vmap(lambda slots, new, index: _put_one(slots[None], new[None], 0, index)[0])(slots, new, index)


def put_in_turn(slots: Array, new: Array, index: Array) -> Array:
    """The same in a loop: XLA for CPUs fuses an update outside one into all that read it, each in its own copy."""

    def put(row: Any, slots: Array) -> Array:
        return _put_one(slots, lax.dynamic_slice_in_dim(new, row, 1), row, index[row])

    rows = jnp.where(jnp.any(index < slots.shape[2]), index.size, 0)  # a number that XLA does not know
    return lax.fori_loop(0, rows, put, slots)


def _put_one(slots: Array, new: Array, row: Any, index: Int[Array, ""]) -> Array:
    """`slots[row, :, index] = new[0, :, 0]`, in place; past the end, a slot is given what it has."""
    place = (row, 0, jnp.minimum(index, slots.shape[2] - 1), *[0] * (slots.ndim - 3))
    old = lax.dynamic_slice(slots, place, new.shape)
    return lax.dynamic_update_slice(slots, jnp.where(index < slots.shape[2], new, old), place)

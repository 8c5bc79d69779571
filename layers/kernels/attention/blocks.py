"""Which blocks of pairs a mask leaves empty, fills, or cuts through."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from .intervals import Bounds, Interval, bounds
from .pair_function import PairFunction, Sizes, Value, positions

EMPTY, PARTIAL, FULL = 0, 1, 2
PACKED = 16
"""Kinds in an int32 word, two bits each."""
SEARCHED = 2**14
"""Blocks in doubt at a time, in the search for a visible pair."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """The kinds of all blocks of a mask: 2 bits a block, and for each row of blocks where its visible keys lie.

    The leading dimensions are 1 where the mask is the same for all sequences or heads.
    """

    words: Int[Array, "B N rows words"]
    """Kinds, 16 to an int32, lowest bits first."""
    low: Int[Array, "B N rows"]
    """The first block that is not empty."""
    high: Int[Array, "B N rows"]
    """One more than the last block that is not empty; `low` where all are."""

    def kind(self, row: Any, column: Any) -> Any:
        """EMPTY, PARTIAL or FULL, for the one sequence and head that is left ("rows words")."""
        return self.words[row, column // PACKED] >> 2 * (column % PACKED) & 3

    def kinds(self, columns: int) -> Any:
        """The kinds of all blocks, "B N rows columns"."""
        place = np.arange(columns)
        return self.words[..., place // PACKED] >> 2 * (place % PACKED) & 3

    @property
    def nbytes(self) -> int:
        """Bytes of it all."""
        return self.words.nbytes + self.low.nbytes + self.high.nbytes


def classify(
    mask: PairFunction,
    sides: Sequence[Any],
    sizes: Sizes,
    block_q: int,
    block_k: int,
    *,
    kv_heads: int,
    transposed: bool = False,
) -> Blocks:
    """The kinds of all blocks of `block_q` queries and `block_k` keys, for each sequence and key/value head.

    With numbers that are known (no tracers among `sides` and positions) the result is numpy arrays, known now. A block
    is EMPTY or FULL only if it is; where the mask depends on pairs in a way that intervals say nothing about, every
    pair of the blocks in doubt is looked at. With `transposed`, rows are blocks of keys.
    """
    traced = any(isinstance(x, Tracer) for x in (*sides, sizes.query, sizes.key))
    xp: Any = jnp if traced else np
    known = dict(zip(mask.sides, sides if traced else map(np.asarray, sides), strict=True))
    rows, columns = -(-sizes.queries // block_q), -(-sizes.keys // block_k)
    found, sure = _bounds(xp, mask, known, sizes, block_q, block_k)
    must, may = (_grouped(xp, x, kv_heads, join) for x, join in ((found.low, xp.all), (found.high, xp.any)))
    if not sure:
        with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
            looked = _looked_at(mask, sides, sizes, block_q, block_k, jnp.asarray(must), jnp.asarray(may), kv_heads)
        must, may = looked if traced else map(np.asarray, looked)
    must, may = (xp.broadcast_to(x, (*x.shape[:2], rows, columns)) for x in (must, may))
    if sizes.keys % block_k:  # the last block is not whole, so it can't be full
        must = must & (np.arange(columns) < columns - 1)
    kinds = may.astype(np.int32) + must.astype(np.int32)
    return _packed(xp, xp.swapaxes(kinds, -1, -2) if transposed else kinds)


def hides_everything(mask: PairFunction, sides: Sequence[Any], sizes: Sizes, blocks: Blocks, block: int) -> bool:
    """Whether a mask shows nothing, as `Causal() & ~Causal()`; `blocks`, of `block` x `block` pairs, are known now.

    Intervals leave some blocks in doubt. If none is full, those are halved until a pair is sure to be visible (for most
    masks after a few small arrays) or no doubt is left. False is said also where that would take too long: where more
    than `SEARCHED` blocks are in doubt at a time (8192 tokens have so many along the diagonal), or an array is looked
    up by query and key.
    """
    if not blocks.high.any():
        return True
    if (blocks.words.view(np.uint32) & 0xAAAAAAAA).any() or any(side.shape for side in mask.sides):
        return False
    known = dict(zip(mask.sides, map(np.asarray, sides), strict=True))

    def shown(rows: np.ndarray, columns: np.ndarray, sampled: int | None) -> bool | None:
        """Whether some of these blocks have visible pairs; None if too many are in doubt to look at each."""
        size, complete, most = block, True, sampled or SEARCHED
        while rows.size:
            if rows.size > most:
                if sampled is None:
                    return None
                some = np.random.default_rng(0).choice(rows.size, most, replace=False)
                rows, columns, complete = rows[some], columns[some], False
            found, sure = _bounds(np, mask, known, sizes, size, size, (rows, columns))
            if not sure or np.any(found.low) or (size == 1 and np.any(found.high)):
                return True
            doubt = np.broadcast_to(found.high, np.broadcast_shapes(np.shape(found.high), rows.shape))
            doubt = doubt.reshape(-1, rows.size).any(axis=0)
            size //= 2
            rows, columns = (
                (2 * x[doubt, None, None] + half).repeat(2, axis).ravel()
                for x, half, axis in ((rows, [[0], [1]], 2), (columns, [[0, 1]], 1))
            )
            inside = (rows * size < sizes.queries) & (columns * size < sizes.keys)
            rows, columns = rows[inside], columns[inside]
        return False if complete else None

    assert block.bit_count() == 1
    some = np.asarray(blocks.high > blocks.low)
    if shown(np.nonzero(some)[-1], np.asarray(blocks.low)[some], sampled=64):
        return False
    columns = -(-sizes.keys // block)
    if blocks.low.size * columns > 2**20:
        return False
    *_, rows, columns = np.nonzero(blocks.kinds(columns))
    return shown(rows, columns, sampled=None) is False


def may_see(mask: PairFunction, sizes: Sizes, block_q: int, block_k: int) -> Bool[np.ndarray, "rows columns"]:
    """Whether any pair of a block may be visible in any sequence and head, knowing nothing of the sides."""
    found, _ = _bounds(np, mask, {}, sizes, block_q, block_k)
    shape = -(-sizes.queries // block_q), -(-sizes.keys // block_k)
    some = np.broadcast_to(found.high, np.broadcast_shapes(np.shape(found.high), shape))
    return some.reshape(-1, *shape).any(axis=0)


def _bounds(
    xp: Any,
    mask: PairFunction,
    known: dict[Value, Any],
    sizes: Sizes,
    block_q: int,
    block_k: int,
    chosen: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Interval, bool]:
    """What the mask may be on each block, from the sides that are known, and whether that is all there is to know.

    It is an array of rows and columns of blocks, or of those that are `chosen` by row and column.
    """

    def span(count: int, block: int, place: Any) -> Any:
        if isinstance(place, Tracer) and xp is np:
            return None
        if not isinstance(place, int):
            return _extremes(xp, xp.asarray(place), block)
        first = np.arange(0, count, block, dtype=np.int32)
        return first + place, np.minimum(first + block, count) - 1 + place

    def read(value: Value) -> Bounds:
        if value.leaf == "query":
            ends = span(sizes.queries, block_q, sizes.query)
        elif value.leaf == "key":
            ends = span(sizes.keys, block_k, sizes.key)
        elif value not in known:
            return None
        elif value.shape:
            return Interval(known[value], known[value])
        elif value.side == "neither":
            ends = known[value], known[value]
        else:
            block, side = block_q if value.side == "query" else block_k, known[value]
            if chosen is not None:
                places = chosen[0 if value.side == "query" else 1][:, None] * block + np.arange(block)
                part = side[..., np.minimum(places, side.shape[2] - 1)]
                return Interval(part.min(axis=-1), part.max(axis=-1))
            ends = _extremes(xp, side, block)
        if ends is None:
            return None
        low, high = ends
        if chosen is not None:
            place = {"query": chosen[0], "key": chosen[1]}.get(value.side or "neither", slice(None))
            return Interval(low[..., place], high[..., place])
        if "query" in value.depends:
            return Interval(low[..., None], high[..., None])
        return Interval(low[..., None, :], high[..., None, :])

    found, sure = bounds(mask, read, xp)
    return found or Interval(np.False_, np.True_), sure


def _extremes(xp: Any, side: Any, block: int) -> tuple[Any, Any]:
    """Least and greatest of each block of a side: (B N L) to (B N blocks)."""
    blocked = _blocked(xp, side, block)
    if side.dtype == np.bool_:
        return xp.all(blocked, axis=-1), xp.any(blocked, axis=-1)
    return xp.min(blocked, axis=-1), xp.max(blocked, axis=-1)


def _blocked(xp: Any, side: Any, block: int) -> Any:
    """(B N L) as (B N blocks block), the last block filled up with the last entry."""
    padded = xp.pad(side, ((0, 0), (0, 0), (0, -side.shape[2] % block)), mode="edge")
    return padded.reshape(*side.shape[:2], -1, block)


def _grouped(xp: Any, found: Any, kv_heads: int, join: Any) -> Any:
    """One entry for all the heads of a group: (.. N rows columns) to (B K rows columns)."""
    found = xp.asarray(found)
    found = found.reshape((1,) * (4 - found.ndim) + found.shape)
    if found.shape[1] == 1:
        return found
    return join(found.reshape(found.shape[0], kv_heads, -1, *found.shape[2:]), axis=2)


def _looked_at(
    mask: PairFunction,
    sides: Sequence[Any],
    sizes: Sizes,
    block_q: int,
    block_k: int,
    must: Array,
    may: Array,
    kv_heads: int,
) -> tuple[Array, Array]:
    """`must` and `may` made exact, by looking at every pair of the blocks where they differ."""
    places = positions(sizes)
    values = dict(zip(mask.sides, sides, strict=True))
    query, key = (_blocked(jnp, places[name], size) for name, size in (("query", block_q), ("key", block_k)))
    blocks = {
        value: _blocked(jnp, jnp.asarray(side), block_q if value.side == "query" else block_k)
        for value, side in values.items()
        if value.side != "neither"
    }
    heads = max((side.shape[1] for side in sides), default=1)
    batch = max([x.shape[0] for x in (*sides, query, key)])
    rows, columns = query.shape[2], key.shape[2]
    must, may = (jnp.broadcast_to(x, (batch, kv_heads if heads > 1 else 1, rows, columns)) for x in (must, may))

    def one(place: Int[Array, ""]) -> tuple[Array, Array]:
        row, column = place // columns, place % columns

        def read(value: Value) -> Array:
            if value.leaf == "query" or value.side == "query":
                array = query if value.leaf else blocks[value]
                return jnp.take(array, row, axis=2)[..., :, None]
            if value.leaf == "key" or value.side == "key":
                array = key if value.leaf else blocks[value]
                return jnp.take(array, column, axis=2)[..., None, :]
            side = jnp.asarray(values[value])
            return side if value.shape else side[..., None]

        def look() -> tuple[Array, Array]:
            (visible,) = mask.evaluate(read)
            visible = jnp.broadcast_to(visible, (batch, heads, block_q, block_k))
            visible = visible.reshape(batch, must.shape[1], -1, block_q * block_k)
            return jnp.all(visible, axis=(2, 3)), jnp.any(visible, axis=(2, 3))

        known = must[:, :, row, column], may[:, :, row, column]
        return jax.lax.cond(jnp.any(known[0] != known[1]), look, lambda: known)

    found = jax.lax.map(one, jnp.arange(rows * columns, dtype=jnp.int32))
    must, may = (jnp.moveaxis(x, 0, -1).reshape(*x.shape[1:], rows, columns) for x in found)
    return must, may


def padded(x: Any, dim: int, block: int, value: Any = 0) -> Array:
    """An array lengthened to whole blocks along a dimension, with a number or, for None, its last entry again."""
    missing = -x.shape[dim] % block
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, missing)
    return jnp.pad(x, widths, mode="edge") if value is None else jnp.pad(x, widths, constant_values=value)


def block_size(length: int, most: int, multiple: int) -> int:
    """The size of the blocks of so many queries or keys: no larger than they are, but for a multiple."""
    return min(most, -(-length // multiple) * multiple)


def _packed(xp: Any, kinds: Any) -> Blocks:
    columns = kinds.shape[-1]
    some = kinds > 0
    any_ = some.any(-1)
    low = xp.where(any_, xp.argmax(some, axis=-1), 0).astype(np.int32)
    high = xp.where(any_, columns - xp.argmax(some[..., ::-1], axis=-1), 0).astype(np.int32)
    padded = xp.pad(kinds.astype(np.uint32), ((0, 0),) * 3 + ((0, -columns % PACKED),))
    shifted = padded.reshape(*kinds.shape[:-1], -1, PACKED) << (2 * np.arange(PACKED, dtype=np.uint32))
    return Blocks(shifted.sum(-1, dtype=np.uint32).view(np.int32), low, high)

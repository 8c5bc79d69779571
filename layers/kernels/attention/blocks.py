"""The kind of each block of pairs under a mask: empty, partial or full."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from .intervals import EITHER, Interval, Numbers, interval_of
from .pair_function import PairFunction, Sizes, Value, positions

EMPTY, PARTIAL, FULL = 0, 1, 2
PACKED = 16
"""Kinds in an int32 word, two bits each."""
SEARCHED = 2**14
"""The most partial blocks that the search for a visible pair evaluates at a time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """The kinds of all blocks of a mask: 2 bits a block, and for each row of blocks the range of its visible keys.

    The leading dimensions are 1 where the mask is the same for all sequences or heads.
    """

    words: Int[Array, "B N rows words"]
    """Kinds, 16 to an int32, lowest bits first."""
    low: Int[Array, "B N rows"]
    """The first block that is not empty."""
    high: Int[Array, "B N rows"]
    """One more than the last block that is not empty; `low` where all are empty."""

    def kind(self, row: Any, column: Any) -> Numbers:
        """EMPTY, PARTIAL or FULL, where one sequence and one head are selected already ("rows words")."""
        return self.words[row, column // PACKED] >> 2 * (column % PACKED) & 3

    def kinds(self, columns: int) -> Numbers:
        """The kinds of all blocks, "B N rows columns"."""
        column = np.arange(columns)
        return self.words[..., column // PACKED] >> 2 * (column % PACKED) & 3

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.words.nbytes + self.low.nbytes + self.high.nbytes


def classify(
    mask: PairFunction,
    hoisted: Sequence[Any],
    sizes: Sizes,
    block_q: int,
    block_k: int,
    *,
    kv_heads: int,
    transposed: bool = False,
) -> Blocks:
    """The kinds of all blocks of `block_q` queries and `block_k` keys, for each sequence and key/value head.

    A block is called EMPTY or FULL only if it is. Where an operation has no interval rule, all pairs of the partial
    blocks are evaluated. With `transposed`, rows are blocks of keys. The result is numpy arrays unless `hoisted` or the
    positions are traced, or pairs have to be evaluated under a mesh, whose devices may exist only to compile for.
    """
    traced = any(isinstance(x, Tracer) for x in (*hoisted, sizes.query, sizes.key))
    xp = jnp if traced else np
    values = dict(zip(mask.hoisted, hoisted if traced else map(np.asarray, hoisted), strict=True))
    rows, columns = -(-sizes.queries // block_q), -(-sizes.keys // block_k)
    visible, exact = _visible(xp, mask, values, sizes, block_q, block_k)
    always, sometimes = _grouped(xp, visible.low, kv_heads, xp.all), _grouped(xp, visible.high, kv_heads, xp.any)
    if not exact:
        traced = traced or not jax.sharding.get_abstract_mesh().empty
        xp = jnp if traced else np
        with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
            bounds = jnp.asarray(always), jnp.asarray(sometimes)
            evaluated = _evaluated(mask, hoisted, sizes, block_q, block_k, *bounds, kv_heads)
        always, sometimes = evaluated if traced else map(np.asarray, evaluated)
    always, sometimes = (xp.broadcast_to(x, (*x.shape[:2], rows, columns)) for x in (always, sometimes))
    if sizes.keys % block_k:  # the last block has fewer than `block_k` keys, so it is not full
        always = always & (np.arange(columns) < columns - 1)
    kinds = sometimes.astype(np.int32) + always.astype(np.int32)
    return _packed(xp, xp.swapaxes(kinds, -1, -2) if transposed else kinds)


def hides_everything(mask: PairFunction, hoisted: Sequence[Any], sizes: Sizes, blocks: Blocks, block: int) -> bool:
    """Whether no pair is visible, as in `Causal() & ~Causal()`; `blocks` are of `block` x `block` pairs.

    If there are partial blocks and no full one, the partial ones are halved until a pair is visible for certain (for
    most masks after a few small arrays) or no partial block is left. The answer is False too where that would take too
    long: where more than `SEARCHED` blocks are partial at a time (8192 tokens have as many along the diagonal), or an
    array is looked up by query and key; and where `blocks` are traced.
    """
    assert block.bit_count() == 1
    if isinstance(blocks.high, Tracer):
        return False
    if not blocks.high.any():
        return True
    if (blocks.words.view(np.uint32) & 0xAAAAAAAA).any() or any(value.shape for value in mask.hoisted):
        return False
    values = dict(zip(mask.hoisted, map(np.asarray, hoisted), strict=True))
    not_empty = np.asarray(blocks.high > blocks.low)
    if _search(mask, values, sizes, block, np.nonzero(not_empty)[-1], np.asarray(blocks.low)[not_empty], sampled=64):
        return False
    columns = -(-sizes.keys // block)
    if blocks.low.size * columns > 2**20:
        return False
    *_, row, column = np.nonzero(blocks.kinds(columns))
    return _search(mask, values, sizes, block, row, column, sampled=None) is False


def _search(
    mask: PairFunction,
    values: dict[Value, Any],
    sizes: Sizes,
    size: int,
    rows: np.ndarray,
    columns: np.ndarray,
    sampled: int | None,
) -> bool | None:
    """Whether some of these blocks of `size` x `size` pairs have a visible pair; None if too many are partial.

    With `sampled`, at most that many blocks are evaluated at a time, and the answer is True or None.
    """
    complete, most = True, sampled or SEARCHED
    while rows.size:
        if rows.size > most:
            if sampled is None:
                return None
            sample = np.random.default_rng(0).choice(rows.size, most, replace=False)
            rows, columns, complete = rows[sample], columns[sample], False
        visible, exact = _visible(np, mask, values, sizes, size, size, (rows, columns))
        if not exact or np.any(visible.low) or (size == 1 and np.any(visible.high)):
            return True
        partial = np.broadcast_to(visible.high, np.broadcast_shapes(np.shape(visible.high), rows.shape))
        partial = partial.reshape(-1, rows.size).any(axis=0)
        size //= 2
        rows, columns = (
            (2 * x[partial, None, None] + half).repeat(2, axis).ravel()
            for x, half, axis in ((rows, [[0], [1]], 2), (columns, [[0, 1]], 1))
        )
        inside = (rows * size < sizes.queries) & (columns * size < sizes.keys)
        rows, columns = rows[inside], columns[inside]
    return False if complete else None


def may_see(mask: PairFunction, sizes: Sizes, block_q: int, block_k: int) -> Bool[np.ndarray, "rows columns"]:
    """Whether any pair of a block may be visible in any sequence and head, without the hoisted values."""
    visible, _ = _visible(np, mask, {}, sizes, block_q, block_k)
    shape = -(-sizes.queries // block_q), -(-sizes.keys // block_k)
    sometimes = np.broadcast_to(visible.high, np.broadcast_shapes(np.shape(visible.high), shape))
    return sometimes.reshape(-1, *shape).any(axis=0)


def _visible(
    xp: ModuleType,
    mask: PairFunction,
    values: dict[Value, Any],
    sizes: Sizes,
    block_q: int,
    block_k: int,
    selected: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Interval, bool]:
    """The interval of the mask on each block, from the hoisted values, and whether every operation has a rule.

    Its arrays have rows and columns of blocks, or one dimension of the blocks that are `selected` by row and column.
    """

    def positions_of(count: int, block: int, position: Any) -> tuple[Numbers, Numbers] | None:
        if isinstance(position, Tracer) and xp is np:
            return None
        if not isinstance(position, int):
            return _extremes(xp, xp.asarray(position), block)
        first = np.arange(0, count, block, dtype=np.int32)
        return first + position, np.minimum(first + block, count) - 1 + position

    def read(value: Value) -> Interval | None:
        if value.leaf == "query":
            ends = positions_of(sizes.queries, block_q, sizes.query)
        elif value.leaf == "key":
            ends = positions_of(sizes.keys, block_k, sizes.key)
        elif value not in values:
            return None
        elif value.shape:
            return Interval(values[value], values[value])
        elif value.side == "neither":
            ends = values[value], values[value]
        else:
            block, array = block_q if value.side == "query" else block_k, values[value]
            if selected is not None:
                index = selected[0 if value.side == "query" else 1][:, None] * block + np.arange(block)
                part = array[..., np.minimum(index, array.shape[2] - 1)]
                return Interval(part.min(axis=-1), part.max(axis=-1))
            ends = _extremes(xp, array, block)
        if ends is None:
            return None
        low, high = ends
        if selected is not None:
            index = {"query": selected[0], "key": selected[1]}.get(value.side or "neither", slice(None))
            return Interval(low[..., index], high[..., index])
        if "query" in value.depends:
            return Interval(low[..., None], high[..., None])
        return Interval(low[..., None, :], high[..., None, :])

    visible, exact = interval_of(mask, read, xp)
    return visible or EITHER, exact


def _extremes(xp: ModuleType, array: Any, block: int) -> tuple[Numbers, Numbers]:
    """The minimum and maximum of each block: (B N L) to (B N blocks)."""
    blocked = _blocked(xp, array, block)
    if array.dtype == np.bool_:
        return xp.all(blocked, axis=-1), xp.any(blocked, axis=-1)
    return xp.min(blocked, axis=-1), xp.max(blocked, axis=-1)


def _blocked(xp: ModuleType, array: Any, block: int) -> Numbers:
    """(B N L) as (B N blocks block); the last block is padded with the last entry."""
    padded = xp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % block)), mode="edge")
    return padded.reshape(*array.shape[:2], -1, block)


def _grouped(xp: ModuleType, visible: Numbers, kv_heads: int, join: Callable[..., Numbers]) -> Numbers:
    """One entry for the query heads of each key/value head: (.. N rows columns) to (B K rows columns)."""
    visible = xp.asarray(visible)
    visible = visible.reshape((1,) * (4 - visible.ndim) + visible.shape)
    if visible.shape[1] == 1:
        return visible
    return join(visible.reshape(visible.shape[0], kv_heads, -1, *visible.shape[2:]), axis=2)


def _evaluated(
    mask: PairFunction,
    hoisted: Sequence[Any],
    sizes: Sizes,
    block_q: int,
    block_k: int,
    always: Array,
    sometimes: Array,
    kv_heads: int,
) -> tuple[Array, Array]:
    """`always` and `sometimes` made exact, by evaluating every pair of the blocks where they differ."""
    places = positions(sizes)
    values = dict(zip(mask.hoisted, hoisted, strict=True))
    query, key = (_blocked(jnp, places[name], size) for name, size in (("query", block_q), ("key", block_k)))
    blocks = {
        value: _blocked(jnp, jnp.asarray(array), block_q if value.side == "query" else block_k)
        for value, array in values.items()
        if value.side != "neither"
    }
    heads = max((array.shape[1] for array in hoisted), default=1)
    batch = max([x.shape[0] for x in (*hoisted, query, key)])
    rows, columns = query.shape[2], key.shape[2]
    shape = batch, kv_heads if heads > 1 else 1, rows, columns
    always, sometimes = (jnp.broadcast_to(x, shape) for x in (always, sometimes))

    def evaluate_block(number: Int[Array, ""]) -> tuple[Array, Array]:
        row, column = number // columns, number % columns

        def read(value: Value) -> Array:
            if value.leaf == "query" or value.side == "query":
                array = query if value.leaf else blocks[value]
                return jnp.take(array, row, axis=2)[..., :, None]
            if value.leaf == "key" or value.side == "key":
                array = key if value.leaf else blocks[value]
                return jnp.take(array, column, axis=2)[..., None, :]
            array = jnp.asarray(values[value])
            return array if value.shape else array[..., None]

        def evaluate() -> tuple[Array, Array]:
            (visible,) = mask.evaluate(read)
            visible = jnp.broadcast_to(visible, (batch, heads, block_q, block_k))
            visible = visible.reshape(*shape[:2], -1, block_q * block_k)
            return jnp.all(visible, axis=(2, 3)), jnp.any(visible, axis=(2, 3))

        bounds = always[:, :, row, column], sometimes[:, :, row, column]
        return jax.lax.cond(jnp.any(bounds[0] != bounds[1]), evaluate, lambda: bounds)

    exact = jax.lax.map(evaluate_block, jnp.arange(rows * columns, dtype=jnp.int32))
    always, sometimes = (jnp.moveaxis(x, 0, -1).reshape(*x.shape[1:], rows, columns) for x in exact)
    return always, sometimes


def padded(x: Any, dim: int, block: int, value: Any = 0) -> Array:
    """An array padded to whole blocks along a dimension, with a number or, for None, with its last entry."""
    missing = -x.shape[dim] % block
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, missing)
    return jnp.pad(x, widths, mode="edge") if value is None else jnp.pad(x, widths, constant_values=value)


def block_size(length: int, most: int, multiple: int) -> int:
    """The size of blocks of `length` queries or keys: `most`, or less where the length rounded up to a multiple is."""
    return min(most, -(-length // multiple) * multiple)


def _packed(xp: ModuleType, kinds: Any) -> Blocks:
    columns = kinds.shape[-1]
    visible = kinds > 0
    any_visible = visible.any(-1)
    low = xp.where(any_visible, xp.argmax(visible, axis=-1), 0).astype(np.int32)
    high = xp.where(any_visible, columns - xp.argmax(visible[..., ::-1], axis=-1), 0).astype(np.int32)
    padded = xp.pad(kinds.astype(np.uint32), ((0, 0),) * 3 + ((0, -columns % PACKED),))
    shifted = padded.reshape(*kinds.shape[:-1], -1, PACKED) << (2 * np.arange(PACKED, dtype=np.uint32))
    return Blocks(shifted.sum(-1, dtype=np.uint32).view(np.int32), low, high)

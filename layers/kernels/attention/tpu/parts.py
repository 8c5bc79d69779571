"""What the forward and the backward kernel for TPU share.

In both, the logits of a block are computed transposed, keys down the sublanes and queries along the lanes: the running
maximum and sum of a query are then one lane of a row, and reductions over keys are plain maxima and additions of vector
registers, with no shuffle across lanes. Axis letters: B batch, T query time, S key time, N query heads, K key/value
heads, G = N / K, H head dim (Hv of values); a block has block_q queries and block_k keys, and is worked on in strips of
keys.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..blocks import EMPTY, FULL, PACKED, Blocks, padded
from ..pair_function import Operation, Side, Value, is_literal, positions
from ..problem import Operands, Problem

LOG2_E = math.log2(math.e)
WORKING = 24 * 2**20
"""VMEM for intermediate results of a strip of up to 1024 queries and 256 keys."""


@dataclass(frozen=True)
class BlockSizes:
    """Queries and keys of a block, keys of a strip (processed at a time), and the VMEM of the chip, in bytes."""

    block_q: int
    block_k: int
    strip: int
    vmem_bytes: int = 100 * 2**20
    cores: int = 1
    """Cores of the chip, which share the programs of a grid."""

    def block_bytes(self, *operands: Array) -> int:
        """VMEM for blocks of the operands (B heads rows width): copies in flight, and sums in float32."""
        return 10 * max(self.block_q, self.block_k) * sum(x.dtype.itemsize * lanes(x.shape[3]) for x in operands)

    def vmem_limit(self, held: int, *operands: Array) -> int:
        """The VMEM to request, if `held` bytes are resident beside blocks of the operands.

        XLA may use the rest for operands of the kernel: copies in another layout, which would take HBM otherwise.
        """
        working = WORKING * max(1, self.block_q * self.strip >> 18)
        return min(self.vmem_bytes, held + self.block_bytes(*operands) + working)

    def holds(self, share: float, *operands: Array) -> float:
        """The bytes that may be resident: a share of VMEM, or what blocks and intermediate results leave."""
        working = 48 * self.block_q * self.strip
        return min(share * self.vmem_bytes, self.vmem_bytes - working - self.block_bytes(*operands))


def lanes(width: int) -> int:
    """The width of a row in VMEM, which is a multiple of 128."""
    return -(-width // 128) * 128


def dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """A float32 product of two blocks over one dimension of each; float32 inputs keep their precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def in_blocks(x: Array, size: int) -> Array:
    """(B heads rows width) as (B heads blocks size width)."""
    return x.reshape(*x.shape[:2], -1, size, x.shape[3])


# The schedule of a row of blocks --------------------------------------------------------------------------------------


HEADER = 5
"""The numbers of a row of the schedule that precede the kinds of its blocks."""


def schedule(blocks: Blocks) -> Array:
    """(B or 1 x K or 1, rows, 1, HEADER + words): the numbers of `Row` for each row of blocks, then their kinds."""
    words, low, high = (jnp.asarray(x) for x in (blocks.words, blocks.low, blocks.high))
    pairs = jnp.bitwise_or(words, lax.shift_right_logical(words, 1)) & 0x55555555  # kinds 1 and 2 alike
    count = jnp.sum(lax.population_count(pairs), axis=-1, dtype=jnp.int32)
    beyond = words.shape[-1] * PACKED
    # The first column that this row or a later one sees.
    first = lax.cummin(jnp.where(count > 0, low, beyond), axis=2, reverse=True)
    begin, end = (
        jnp.pad(x, ((0, 0), (0, 0), pad), constant_values=fill)
        for x, pad, fill in ((first[:, :, 1:], (1, 0), 0), (first[:, :, 1:], (0, 1), beyond))
    )
    rows = jnp.concatenate([jnp.stack([low, high, count, begin, end], axis=-1), words], axis=-1)
    return rows.reshape(-1, rows.shape[2], 1, rows.shape[3])


def row_spec(blocks: Blocks, rows: Array, place: Callable[..., Any]) -> pl.BlockSpec:
    """The row of a schedule for a program; `place` gives (batch, kv head, row) from the indices of the grid."""
    of_batch, of_head = blocks.low.shape[:2]

    def index(*grid: Any) -> Any:
        batch, kv_head, row = place(*grid)
        return (batch if of_batch > 1 else 0) * of_head + (kv_head if of_head > 1 else 0), row, 0, 0

    return pl.BlockSpec((1, 1, 1, rows.shape[-1]), index, memory_space=pltpu.SMEM)


@dataclass(frozen=True)
class Chain:
    """A grid of programs (batch, heads, ...), each of which starts copies for the next program on its core."""

    sizes: tuple[int, ...]
    cores: int

    @property
    def shared(self) -> int:
        """The number of dimensions that are split over cores: sequences if there are several, else heads."""
        return 0 if self.cores == 1 else 1 if self.sizes[0] > 1 else 2

    @property
    def semantics(self) -> tuple[Literal["parallel", "arbitrary"], ...]:
        """The dimension semantics of the grid."""
        return tuple("parallel" if dim < self.shared else "arbitrary" for dim in range(len(self.sizes)))

    def following(self, *grid: Any) -> tuple[Any, ...]:
        """The grid indices of the next program; arbitrary after the last."""
        place, more = list(grid), True
        for dim in reversed(range(self.shared, len(grid))):
            moved = grid[dim] + jnp.where(more, 1, 0)
            more = moved == self.sizes[dim]
            place[dim] = jnp.where(more, 0, moved)
        return tuple(place)

    def ends(self, *grid: Any) -> tuple[Any, Any]:
        """Whether a program is the first, and whether it is the last, of its core."""
        chained = list(zip(grid, self.sizes, strict=True))[self.shared :]
        firsts, lasts = (
            [index == at for index, at in ends]
            for ends in ([(i, 0) for i, _ in chained], [(i, n - 1) for i, n in chained])
        )
        return functools.reduce(jnp.logical_and, firsts), functools.reduce(jnp.logical_and, lasts)


class Row:
    """One row of the schedule, read by the scalar core.

    Its `count` blocks that are not empty lie from `low` to before `high`. From column `done_from` to before `done_to`
    (which may be past the last column), all later rows are empty; the same columns are listed for no other row.
    """

    def __init__(self, ref: Any):
        self.ref = ref
        self.low, self.high, self.count, self.done_from, self.done_to = (ref[0, 0, 0, n] for n in range(HEADER))

    def kind(self, block: Any) -> Any:
        """EMPTY, PARTIAL or FULL."""
        word = self.ref[0, 0, 0, HEADER + lax.div(block, PACKED)]
        return lax.shift_right_logical(word, 2 * lax.rem(block, PACKED)) & 3

    def is_full(self, block: Any) -> Any:
        """Whether every pair of the block is visible."""
        return self.kind(block) == FULL

    def after(self, block: Any) -> Any:
        """The next block that is not empty; `high` after the last."""

        def skip(block: Any) -> Any:
            # Past the end, the last block is read instead, which is not empty.
            return (block < self.high) & (self.kind(jnp.minimum(block, self.high - 1)) == EMPTY)

        return lax.while_loop(skip, lambda block: block + 1, block + 1)


# Hoisted values -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HoistedInput:
    """An operand of a kernel with a value for each query or key, or for each sequence and head."""

    key: "Key"
    side: Side
    array: Array
    """(B or 1, N or 1, 1, padded length), which is 1 of what depends on neither; (B or 1, N or 1, words, 1, padded T)
    of a table."""

    def words(self, block_k: int) -> int:
        """The number of values for each query and block of keys."""
        return -(-block_k // word_span(self.key)) if isinstance(self.key, Operation) else 1

    def spec(self, query_block: Callable[..., Any] | None, key_block: Callable[..., Any] | None, size: Any) -> Any:
        """Its block: of the queries or keys that a program works on (index functions of the grid), else all of them."""
        many = [n > 1 for n in self.array.shape[:2]]
        if self.side == "neither":
            of_both = query_block or key_block
            assert of_both is not None

            def own(*grid: Any) -> Any:
                batch, head, _ = of_both(*grid)
                return batch if many[0] else 0, head if many[1] else 0, 0, 0

            return pl.BlockSpec((1, 1, 1, 1), own, memory_space=pltpu.SMEM)
        index = query_block if self.side == "query" else key_block
        length = size[self.side] if index is not None else self.array.shape[-1]
        span = word_span(self.key) if isinstance(self.key, Operation) else 0
        words = self.words(size["key"]) if key_block else self.array.shape[2]

        def place(*grid: Any) -> Any:
            batch, head, block = (index or size["whole"])(*grid)
            first = lax.div(key_block(*grid)[2] * size["key"], words * span) if key_block and span else 0
            return batch if many[0] else 0, head if many[1] else 0, first, *[0] * bool(span), block

        return pl.BlockSpec((1, 1, words, *[1] * bool(span), length), place)


Key = Value | Operation | str
"""Of a side input: a side of the mask or the score; a lookup in a table by query and key; "query" or "key", their
positions; or "dropout", the numbers of its rows."""

Hoisted = list[tuple[Key, Side, Array]]
"""The operands of a kernel besides q, k and v, with the side that each belongs to: (B or 1, N or 1, T or S or 1)."""


def hoisted_bytes(hoisted: list[HoistedInput], side: Side, length: int, block_k: int) -> int:
    """VMEM for the hoisted values of `length` queries or keys, including copies in flight."""
    return 8 * length * sum(x.words(block_k) for x in hoisted if x.side == side)


def word_span(operation: Operation) -> int:
    """The number of keys that a word of 32 cells of a table covers."""
    return 32 * operation.params["size"]


def untabled(operation: Operation, keys: int, sizes: BlockSizes) -> str | None:
    """The reason why a kernel does not support a lookup; None for a boolean table by query and key that fits blocks."""
    if operation.name != "lookup" or operation.outputs[0].dtype != np.bool_:
        return "looks up an array by query and key at once"
    *_, query, key = operation.inputs
    size, (*_, rows, columns) = operation.params["size"], operation.params["axes"].split()
    if (rows, columns) != ("T", "S") or query.side != "query" or not _is_cell(key, size):
        return "looks up an array by query and key at once"
    span, strip = word_span(operation), math.gcd(sizes.block_k, sizes.strip)
    fitting = (strip, sizes.block_k) if keys > sizes.block_k else (strip,)
    if all(span % number == 0 or number % span == 0 for number in fitting):
        return None
    return f"has cells of {size} positions, 32 of which are no divisor or multiple of strips and blocks of {fitting}"


def _is_cell(key: Value, size: int) -> bool:
    """Whether a value is the key divided by `size`."""
    if size == 1 or key.operation is None:
        return key.leaf == "key" and size == 1
    inputs = key.operation.inputs
    divided = key.operation.name == "div" and inputs[0].leaf == "key" and is_literal(inputs[1])
    return divided and int(inputs[1].constant) == size


def _words_of(operation: Operation, values: dict[Value, Any], places: dict[str, Array], keys: int) -> Array:
    """The table of a lookup for each query, 32 cells to a word: (B or 1, N or 1, T, words), for `keys` keys."""
    table, *indices, _ = operation.inputs
    cells = values[table].reshape(table.shape)
    many = -(-keys // word_span(operation)) * 32
    cells = jnp.pad(cells, [(0, 0)] * (cells.ndim - 1) + [(0, many - cells.shape[-1])]).astype(jnp.uint32)
    bits = cells.reshape(*cells.shape[:-1], -1, 32) << jnp.arange(32, dtype=jnp.uint32)
    words = lax.bitcast_convert_type(jnp.sum(bits, axis=-1, dtype=jnp.uint32), jnp.int32)

    def index(value: Value) -> Any:
        if is_literal(value):
            return jnp.asarray(value.constant)
        return places["query"] if value.leaf == "query" else values[value]

    # Indices that are the same for all queries have T = 1; the result has a row of words for each query.
    return words[tuple(jnp.broadcast_arrays(*map(index, indices), places["query"]))[:-1]]


def hoisted_of(problem: Problem, operands: Operands, block_k: int) -> Hoisted:
    """The hoisted values of mask and score, tables, the rows of dropout, and positions that are arrays."""
    found: Hoisted = []
    for function, hoisted in ((problem.mask, problem.mask_values(operands)), (problem.score, operands.score_hoisted)):
        values = dict(zip(() if function is None else function.hoisted, hoisted, strict=True))
        for value, side in values.items():
            assert value.side is not None
            if not value.shape:
                found.append((value, value.side, jnp.asarray(side)))
        for operation in () if function is None else function.lookups:
            keys = -(-operands.k.shape[1] // block_k) * block_k
            words = _words_of(operation, values, positions(problem.sizes(operands)), keys)
            found.append((operation, "query", words))
    if operands.dropout_rows is not None:
        found.append(("dropout", "neither", operands.dropout_rows))
    if operands.query_positions is not None:
        found.append(("query", "query", operands.query_positions))
    if operands.key_positions is not None:
        found.append(("key", "key", operands.key_positions))
    return found


def hoisted_inputs(hoisted: Hoisted, block_q: int, block_k: int) -> list[HoistedInput]:
    """Hoisted values padded to whole blocks, as int32 or float32."""

    def one(key: Key, side: Side, array: Array) -> HoistedInput:
        array = array.astype(jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.int32)
        if side == "neither":
            return HoistedInput(key, side, array[..., None])
        if isinstance(key, Operation):
            return HoistedInput(key, side, jnp.swapaxes(padded(array, 2, block_q, None), 2, 3)[:, :, :, None])
        return HoistedInput(key, side, padded(array, 2, block_q if side == "query" else block_k, None)[:, :, None])

    return [one(*side) for side in hoisted]


@dataclass(frozen=True)
class Strip:
    """The indices of a strip of transposed logits (keys, queries)."""

    query: Any
    """The index of the first query; `query_slice` is the slice of its block of hoisted values."""
    query_slice: Any
    queries: int
    key: Any
    key_slice: Any
    keys: int


@dataclass(frozen=True)
class Pairs:
    """Mask, score and dropout of a problem, to be evaluated on strips."""

    problem: Problem
    refs: dict[Key, tuple[Side, Any]]
    """The references to the hoisted inputs."""
    key_length: int | None
    """The number of keys, if the last block has padding."""

    def _hoisted(self, key: Value | str, strip: Strip) -> Any:
        """A hoisted value: (1, queries), (keys, 1) or a number."""
        side, ref = self.refs[key]
        if side == "query":
            return ref[0, 0, :, strip.query_slice]
        if side == "key":
            return _column(ref[0, 0, :, strip.key_slice])
        return ref[0, 0, 0, 0]

    def _queries(self, strip: Strip) -> Any:
        """The positions of its queries."""
        if "query" in self.refs:
            return self._hoisted("query", strip)
        first = strip.query + self.problem.query_offset
        return first + lax.broadcasted_iota(jnp.int32, (1, strip.queries), 1)

    def _indices(self, strip: Strip) -> Any:
        """The indices of its keys."""
        return strip.key + lax.broadcasted_iota(jnp.int32, (strip.keys, 1), 0)

    def _keys(self, strip: Strip) -> Any:
        """The positions of its keys."""
        return self._hoisted("key", strip) if "key" in self.refs else self._indices(strip)

    def _reader(self, strip: Strip, given: dict[Value | str, Any]) -> Callable[[Value], Any]:
        """A function that returns leaves and hoisted values; `given` replaces some, by Value or "score"."""

        def read(value: Value) -> Any:
            if (value.leaf or value) in given:
                return given[value.leaf or value]
            if value.leaf == "query":
                return self._queries(strip)
            if value.leaf == "key":
                return self._keys(strip)
            found = self._hoisted(value, strip)
            return found != 0 if value.dtype == np.bool_ else found.astype(value.dtype)

        return read

    def masked(self, logits: Array, strip: Strip) -> Array:
        """The logits, -inf for pairs that are not visible."""
        read = self._reader(strip, {})
        (visible,) = self.problem.mask.evaluate(read, lambda operation: self._bit(operation, strip, read))
        if self.key_length is not None:
            visible = visible & (self._indices(strip) < self.key_length)
        return jnp.where(jnp.broadcast_to(visible, logits.shape), logits, -jnp.inf)

    def _bit(self, operation: Operation, strip: Strip, read: Callable[[Value], Any]) -> Array:
        """The entries of a table."""
        span, (_, ref) = word_span(operation), self.refs[operation]
        first = lax.div(strip.key_slice.start, span)
        rows = [ref[0, 0, first + n, :, strip.query_slice] for n in range(max(1, strip.keys // span))]
        wide = [jnp.broadcast_to(row, (strip.keys // len(rows), strip.queries)) for row in rows]
        cell = read(operation.inputs[-1]) & 31
        cell = jnp.broadcast_to(cell, (strip.keys, strip.queries))
        return lax.shift_right_logical(jnp.concatenate(wide), cell) & 1 != 0

    def kept(self, strip: Strip) -> Array | None:
        """The factor of the weights under dropout; None without dropout."""
        if "dropout" not in self.refs:
            return None
        return self.problem.dropout_factor(self._hoisted("dropout", strip), self._queries(strip), self._keys(strip))

    def scored(self, products: Array, strip: Strip) -> Array:
        """The logits, to base 2, of products q k."""
        function = self.problem.score
        if function is None:
            return products * (self.problem.scale * LOG2_E)
        (score,) = function.evaluate(self._reader(strip, {"score": products * self.problem.scale}))
        return score * LOG2_E

    def scored_with_slopes(self, products: Array, strip: Strip) -> tuple[Array, Array | None, list[Array]]:
        """`scored`, and the derivatives of the score by scale q k (None: 1) and by each trained value."""
        function = self.problem.score
        if function is None:
            return self.scored(products, strip), None, []
        names = ["score", *trained(self.problem)]
        inputs = [products * self.problem.scale, *(self._hoisted(x, strip).astype(x.dtype) for x in names[1:])]
        known = dict(zip(names, inputs, strict=True))

        def along(name: Value | str) -> tuple[Array, Array]:
            # A unit tangent gives the derivative of every pair; jax.vjp has no rule inside a kernel.
            def score(x: Array) -> Array:
                (found,) = function.evaluate(self._reader(strip, known | {name: x}))
                return jnp.broadcast_to(found, products.shape)

            return jax.jvp(score, (known[name],), (jnp.ones_like(known[name]),))

        (logits, slope), *rest = map(along, names)
        return logits * LOG2_E, slope, [slope for _, slope in rest]


def trained(problem: Problem) -> list[Value]:
    """The hoisted values of the score that get gradients."""
    hoisted = () if problem.score is None else problem.score.hoisted
    return [value for value in hoisted if jnp.issubdtype(value.dtype, jnp.floating)]


def _column(row: Array) -> Array:
    """A (1, n) row as an (n, 1) column."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


# Copies between HBM and VMEM ------------------------------------------------------------------------------------------


class Stream:
    """Copies of blocks hbm[n] to VMEM, some of them in flight: copy number n goes to slot n % slots."""

    def __init__(self, hbm: Any, buffer: Any, semaphores: Any):
        self.hbm, self.buffer, self.semaphores = hbm, buffer, semaphores

    def at(self, number: Any) -> Any:
        """The slot of copy `number`."""
        return self.buffer.at[lax.rem(number, self.buffer.shape[0])]

    def _copy(self, block: Any, number: Any, hbm: Any = None) -> Any:
        slot = lax.rem(number, self.buffer.shape[0])
        source = (self.hbm if hbm is None else hbm).at[block]
        return pltpu.make_async_copy(source, self.buffer.at[slot], self.semaphores.at[slot])

    def start(self, block: Any, number: Any, hbm: Any = None) -> None:
        """Starts the copy of a block, the `number`th of all, from the same array or another."""
        self._copy(block, number, hbm).start()

    def wait(self, number: Any) -> None:
        """Waits for copy `number`."""
        self._copy(0, number).wait()


class WriteBack(Stream):
    """Copies of the same buffer back to HBM."""

    def _copy(self, block: Any, number: Any, hbm: Any = None) -> Any:
        slot = lax.rem(number, self.buffer.shape[0])
        target = (self.hbm if hbm is None else hbm).at[block]
        return pltpu.make_async_copy(self.buffer.at[slot], target, self.semaphores.at[slot])

"""Flash attention for TPU, forward (2205.14135, 2307.08691).

A program has one block of queries of one head and goes through the blocks of keys that it sees. While the weights of
one block are summed (vector unit), the logits of the next are computed (matrix unit): the scheduler sees two
independent chains and overlaps them. Keys and values of a head stay in VMEM where they fit, and are streamed from HBM
otherwise.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .blocks import Blocks, padded
from .pairs import Side, positions
from .problem import Operands, Problem
from .tpu_parts import (
    LOG2_E,
    BlockSizes,
    Key,
    Pairs,
    Row,
    SideInput,
    Sides,
    Stream,
    Strip,
    dot,
    in_blocks,
    schedule,
    schedule_place,
    side_inputs,
    sides_of,
)

LOWEST = -1e30
"""Where the running maximum starts: finite, so that a hidden logit, -inf, stays that when it is subtracted."""
RESIDENT_SHARE = 0.16
"""Keys and values of one head up to this share of VMEM stay there."""


def forward(
    problem: Problem, operands: Operands, sizes: BlockSizes, interpret: Any
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row, -inf where a query sees no key."""
    (batch, queries, heads, _), (_, keys, _, value_size) = operands.q.shape, operands.v.shape
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (operands.q, operands.k, operands.v))
    blocks = problem.blocks(operands, sizes.block_q, sizes.block_k)
    sides = sides_of(problem, operands, sizes.block_k)
    packed = packs(operands, sides, sizes.block_q)
    if packed:
        q = q.reshape(batch, k.shape[1], -1, q.shape[3])
        problem, sides = replace(problem, causal=False), _packed(problem, operands, sides)
    q, k, v = padded(q, 2, sizes.block_q), padded(k, 2, sizes.block_k), padded(v, 2, sizes.block_k)
    head_bytes = k.shape[2] * (_lanes(k.shape[3]) + _lanes(value_size)) * k.dtype.itemsize
    grid = _Grid(
        blocks=blocks,
        batch=batch,
        heads=q.shape[1],
        rows=q.shape[2] // sizes.block_q,
        group=q.shape[1] // k.shape[1],
        # Of a long cache, little may be in use: what is not seen is not read.
        resident=head_bytes <= RESIDENT_SHARE * sizes.vmem_bytes and not packed,
    )
    out, lse = _call(problem, grid, q, k, v, side_inputs(sides, sizes.block_q, sizes.block_k), sizes, keys, interpret)
    if packed:
        out, lse = (x[..., : queries * heads // x.shape[1], :] for x in (out, jnp.swapaxes(lse, 2, 3)))
        out, lse = out.reshape(batch, heads, queries, value_size), lse.reshape(batch, heads, 1, queries)
    return jnp.swapaxes(out[:, :, :queries], 1, 2), lse[:, :, 0, :queries]


def packs(operands: Operands, sides: Sides, most: int) -> bool:
    """Whether all heads that share keys are taken as one: their queries are few, as in decoding, and fit a block."""
    queries, group = operands.q.shape[1], operands.q.shape[2] // operands.k.shape[2]
    alike = not any(side == "key" and array.shape[1] > 1 for _, side, array in sides)
    return group > 1 and alike and queries * group <= most


def _packed(problem: Problem, operands: Operands, sides: Sides) -> Sides:
    """The sides of G T queries for each key/value head, those of a query head after those of another."""
    queries, heads, kv_heads = *operands.q.shape[1:3], operands.k.shape[2]
    places = positions(problem.sizes(operands))["query"]
    given: Sides = [side for side in sides if side[0] != "query"]

    def one(key: Key, side: Side, array: Array) -> tuple[Key, Side, Array]:
        if side == "key" or (side == "neither" and array.shape[1] == 1):
            return key, side, array
        own = heads if array.shape[1] > 1 else heads // kv_heads
        wide = jnp.broadcast_to(array, (array.shape[0], own, queries, *array.shape[3:]))
        return key, "query", wide.reshape(array.shape[0], -1, heads // kv_heads * queries, *array.shape[3:])

    return [one(*side) for side in [*given, ("query", "query", places)]]


@dataclass(frozen=True)
class _Grid:
    """The programs: one for each sequence, query head and row of blocks."""

    blocks: Blocks
    batch: int
    heads: int
    rows: int
    group: int
    """Query heads that share a key/value head."""
    resident: bool
    """Keys and values of a head are in VMEM; else they are streamed, and each program starts the copies of the next."""

    @property
    def chained(self) -> bool:
        """Whether the next program may be another head's. With one sequence, heads are what two cores share."""
        return self.batch > 1 and not self.resident

    @property
    def semantics(self) -> tuple[Literal["parallel", "arbitrary"], ...]:
        """What of it cores may share."""
        if self.resident:
            return "parallel", "parallel", "parallel"
        return "parallel", "arbitrary" if self.chained else "parallel", "arbitrary"

    def following(self, head: Any, row: Any) -> tuple[Any, Any]:
        """The head and row of the next program; of this one where it is the last."""
        if not self.chained:
            return head, jnp.minimum(row + 1, self.rows - 1)
        place = jnp.minimum(head * self.rows + row + 1, self.heads * self.rows - 1)
        return lax.div(place, self.rows), lax.rem(place, self.rows)

    def ends(self, head: Any, row: Any) -> tuple[Any, Any]:
        """Whether a program is the first, and the last, of those that follow each other."""
        first, last = row == 0, row == self.rows - 1
        return (first & (head == 0), last & (head == self.heads - 1)) if self.chained else (first, last)

    def row_spec(self, words: int, following: bool) -> pl.BlockSpec:
        """The schedule of a program's row, or of the next program's."""

        def place(b: Any, n: Any, i: Any) -> Any:
            n, i = self.following(n, i) if following else (n, i)
            return schedule_place(self.blocks, b, lax.div(n, self.group)), i, 0, 0

        return pl.BlockSpec((1, 1, 1, words), place, memory_space=pltpu.SMEM)


def _call(
    problem: Problem,
    grid: _Grid,
    q: Array,
    k: Array,
    v: Array,
    sides: list[SideInput],
    sizes: BlockSizes,
    keys: int,
    interpret: Any,
) -> tuple[Array, Array]:
    """The kernel on whole blocks: (B N T Hv), (B N 1 T)."""
    block_q, block_k, size, value_size = sizes.block_q, sizes.block_k, k.shape[3], v.shape[3]
    rows = schedule(grid.blocks)

    def whole_head(width: int) -> pl.BlockSpec:
        if not grid.resident:
            return pl.BlockSpec(memory_space=pl.ANY)
        return pl.BlockSpec(
            (1, 1, k.shape[2] // block_k, block_k, width), lambda b, n, i: (b, lax.div(n, grid.group), 0, 0, 0)
        )

    whole = {"query": block_q, "whole": lambda b, n, i: (b, n, 0)}
    streams = [
        pltpu.VMEM((2, block_k, size), k.dtype),
        pltpu.VMEM((2, block_k, value_size), v.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((1,), jnp.int32),
    ]
    kernel = functools.partial(
        _kernel,
        problem=problem,
        strip=math.gcd(block_k, sizes.strip),
        key_length=keys if keys % block_k else None,
        sides=[(side.key, side.side) for side in sides],
        grid=grid,
    )
    return pl.pallas_call(
        kernel,
        grid=(grid.batch, grid.heads, grid.rows),
        in_specs=[
            grid.row_spec(rows.shape[-1], following=False),
            grid.row_spec(rows.shape[-1], following=True),
            pl.BlockSpec((1, 1, block_q, size), lambda b, n, i: (b, n, i, 0)),
            whole_head(size),
            whole_head(value_size),
            *[side.spec(lambda b, n, i: (b, n, i), None, whole) for side in sides],
        ],
        out_specs=[
            pl.BlockSpec((1, 1, block_q, value_size), lambda b, n, i: (b, n, i, 0)),
            pl.BlockSpec((1, 1, 1, block_q), lambda b, n, i: (b, n, 0, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:3], value_size), problem.out_dtype),
            jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((value_size, block_q), jnp.float32),
            pltpu.VMEM((block_k, block_q), jnp.float32),
            *([] if grid.resident else streams),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=grid.semantics, vmem_limit_bytes=sizes.vmem_bytes),
        name="attention_forward",
        interpret=interpret,
    )(rows, rows, q, in_blocks(k, block_k), in_blocks(v, block_k), *(side.array for side in sides))


def _lanes(width: int) -> int:
    return -(-width // 128) * 128


class _Resident:
    """Keys and values that are in VMEM already."""

    def __init__(self, k_ref: Any, v_ref: Any):
        self.k_ref, self.v_ref = k_ref, v_ref

    def keys(self, block: Any, number: Any) -> Any:
        """The keys of a block, the `number`th of this row."""
        return self.k_ref.at[0, 0, block]

    def values(self, block: Any, number: Any) -> Any:
        """The values of a block."""
        return self.v_ref.at[0, 0, block]

    def fetch_first(self) -> None:
        """Before anything is used."""

    def fetch_next(self, following: Any, number: Any) -> None:
        """While values of block `number` and keys of the next are used, those after are on their way."""

    def fetch_row(self) -> None:
        """The first block of the next row is on its way."""

    def wait_last(self) -> None:
        """Before the values of the last block are used."""


class _Streamed(_Resident):
    """Keys and values that are copied from HBM two blocks ahead, of the next program too; all copies are counted on."""

    def __init__(self, sources: Any, row: Row, following: tuple[Any, Row], ends: tuple[Any, Any], streams: Any):
        k_buffer, v_buffer, k_semaphores, v_semaphores, self.counter = streams
        self.k_stream = Stream(sources[0], k_buffer, k_semaphores)
        self.v_stream = Stream(sources[1], v_buffer, v_semaphores)
        self.row, (self.following_sources, self.following), (self.first, self.last) = row, following, ends
        self.before = jnp.where(self.first, 0, self.counter[0])
        self.counter[0] = self.before + row.count

    def keys(self, block: Any, number: Any) -> Any:
        """The keys of a block, the `number`th of this row."""
        return self.k_stream.at(self.before + number)

    def values(self, block: Any, number: Any) -> Any:
        """The values of a block."""
        return self.v_stream.at(self.before + number)

    def fetch_first(self) -> None:
        """Before anything is used."""

        @pl.when(self.first)
        def _() -> None:
            self.k_stream.start(self.row.low, 0)
            self.v_stream.start(self.row.low, 0)

        @pl.when(self.row.count > 1)
        def _() -> None:
            self.k_stream.start(self.row.after(self.row.low), self.before + 1)

        self.k_stream.wait(self.before)

    def fetch_next(self, following: Any, number: Any) -> None:
        """While values of block `number` and keys of the next are used, those after are on their way."""

        @pl.when(number + 2 < self.row.count)
        def _() -> None:
            self.k_stream.start(self.row.after(following), self.before + number + 2)

        self.v_stream.start(following, self.before + number + 1)
        self.k_stream.wait(self.before + number + 1)
        self.v_stream.wait(self.before + number)

    def fetch_row(self) -> None:
        """The first block of the next row is on its way."""

        @pl.when(jnp.logical_not(self.last) & (self.following.count > 0))
        def _() -> None:
            for stream, source in zip((self.k_stream, self.v_stream), self.following_sources, strict=True):
                stream.start(self.following.low, self.before + self.row.count, source)

    def wait_last(self) -> None:
        """Before the values of the last block are used."""
        self.v_stream.wait(self.before + self.row.count - 1)


def _kernel(
    row_ref: Any,
    following_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    problem: Problem,
    strip: int,
    key_length: int | None,
    sides: list[tuple[Key, Side]],
    grid: _Grid,
) -> None:
    side_refs: dict[Key, tuple[Side, Any]] = {key: (side, ref) for (key, side), ref in zip(sides, refs, strict=False)}
    out_ref, lse_ref, sum_ref, logits_ref, *streams = refs[len(sides) :]
    block_q, block_k = q_ref.shape[2], logits_ref.shape[0]
    batch, head, index = (pl.program_id(dim) for dim in range(3))
    row = Row(row_ref)
    pairs = Pairs(problem, side_refs, key_length)
    strips = range(0, block_k, strip)
    has_diagonal = problem.causal and block_q == block_k
    q = q_ref[0, 0]
    source = _Resident(k_ref, v_ref)
    if not grid.resident:

        def of_head(head: Any) -> tuple[Any, Any]:
            place = batch, lax.div(head, grid.group)
            return k_ref.at[place], v_ref.at[place]

        following = of_head(grid.following(head, index)[0]), Row(following_ref)
        source = _Streamed(of_head(head), row, following, grid.ends(head, index), streams)

    def place(block: Any, offset: int, kind: str) -> Strip:
        start = offset if kind == "diagonal" else 0  # the queries before see none of these keys
        key = pl.multiple_of(block * block_k + offset, strip)
        return Strip(
            batch=batch,
            head=head,
            query=index * block_q + start,
            query_slice=slice(start, block_q),
            queries=block_q - start,
            key=key,
            key_slice=pl.ds(key, strip),
            keys=strip,
        )

    def produce(block: Any, number: Any, offset: int, highest: Array, kind: str) -> Array:
        """Logits, to base 2, of a strip of a block, and the running maximum (8, block_q)."""
        where = place(block, offset, kind)
        start = block_q - where.queries
        logits = pairs.scored(dot(source.keys(block, number)[offset : offset + strip], q[start:], 1, 1), where)
        logits = logits if kind == "full" else pairs.masked(logits, where)
        logits_ref[offset : offset + strip, start:] = logits
        after = jnp.maximum(highest[:, start:], _folded(logits, jnp.max))
        return jnp.concatenate([highest[:, :start], after], axis=1) if start else after

    def produce_block(block: Any, number: Any, kind: str) -> Array:
        highest = jnp.full((8, block_q), LOWEST, jnp.float32)
        for offset in strips:
            highest = produce(block, number, offset, highest, kind)
        return highest

    def consume(block: Any, number: Any, offset: int, base: Array, shrink: Array, total: Array, kind: str) -> Array:
        """Adds a strip's weighted values to the sum, and its weights to the total (8, block_q)."""
        where = place(block, offset, kind)
        start = block_q - where.queries
        weights, kept = jnp.exp2(logits_ref[offset : offset + strip, start:] - base[:, start:]), pairs.kept(where)
        after = total[:, start:] + _folded(weights, jnp.sum)
        weights = weights if kept is None else weights * kept
        values = source.values(block, number)[offset : offset + strip]
        before = sum_ref[:, start:]
        before = before * shrink if offset == 0 else before
        sum_ref[:, start:] = before + dot(values, weights.astype(values.dtype), 0, 0)
        return jnp.concatenate([total[:, :start], after], axis=1) if start else after

    def begin(carry: Any) -> Any:
        base, highest, total = carry
        after = jnp.max(highest, axis=0, keepdims=True)
        shrink = jnp.exp2(base - after)
        return after, shrink, jnp.broadcast_to(after, highest.shape), total * shrink

    def step(block: Any, ahead: Any, number: Any, carry: Any, kind: str) -> Any:
        """Consumes a block while the next one, of this kind, is produced in its place."""
        base, shrink, highest, total = begin(carry)
        for offset in strips:
            total = consume(block, number, offset, base, shrink, total, "full")
            highest = produce(ahead, number + 1, offset, highest, kind)
        return base, highest, total

    def finish(block: Any, number: Any, carry: Any, kind: str) -> Any:
        base, shrink, _, total = begin(carry)
        for offset in strips:
            total = consume(block, number, offset, base, shrink, total, kind)
        return base, total

    def partial_or_diagonal(block: Any, run: Any) -> Any:
        if not has_diagonal:
            return run("partial")
        return lax.cond(block == index, lambda: run("diagonal"), lambda: run("partial"))

    def attend() -> Any:
        source.fetch_first()
        # The first block is masked whatever it is, which changes nothing of a full one.
        highest = partial_or_diagonal(row.low, lambda kind: produce_block(row.low, 0, kind))

        def body(number: Any, state: Any) -> Any:
            block, carry = state
            ahead = row.after(block)
            source.fetch_next(ahead, number)
            carry = lax.cond(
                row.is_full(ahead),
                lambda: step(block, ahead, number, carry, "full"),
                lambda: partial_or_diagonal(ahead, lambda kind: step(block, ahead, number, carry, kind)),
            )
            return ahead, carry

        nothing = jnp.full((1, block_q), LOWEST, jnp.float32), highest, jnp.zeros((8, block_q), jnp.float32)
        block, carry = lax.fori_loop(0, row.count - 1, body, (row.low, nothing))
        source.fetch_row()
        source.wait_last()
        return partial_or_diagonal(block, lambda kind: finish(block, row.count - 1, carry, kind))

    def skip() -> Any:
        source.fetch_row()
        return jnp.full((1, block_q), LOWEST, jnp.float32), jnp.zeros((8, block_q), jnp.float32)

    sum_ref[...] = jnp.zeros_like(sum_ref)
    base, total = lax.cond(row.count > 0, attend, skip)
    total = jnp.sum(total, axis=0, keepdims=True)
    seen = total > 0
    out_ref[0, 0] = (sum_ref[...] * jnp.where(seen, 1 / total, 0.0)).astype(out_ref.dtype).T
    lse_ref[0, 0] = jnp.where(seen, (base + jnp.log2(total)) / LOG2_E, -jnp.inf)


def _folded(x: Array, reduce: Any) -> Array:
    """(rows, n) reduced to (8, n), by whole vector registers."""
    return reduce(x.reshape(x.shape[0] // 8, 8, x.shape[1]), axis=0)

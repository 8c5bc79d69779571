"""Flash attention for TPU, forward (2205.14135, 2307.08691).

A program has one block of queries of one head and visits the blocks of keys that it sees. While the weights of one
block are summed (vector unit), the logits of the next are computed (matrix unit): the two are independent, so the
compiler overlaps them. Keys and values of a head stay in VMEM if they fit, and are streamed from HBM otherwise.
"""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..blocks import Blocks, padded
from ..pair_function import Side, positions
from ..problem import Operands, Problem
from .parts import (
    LOG2_E,
    BlockSizes,
    Chain,
    Hoisted,
    HoistedInput,
    Key,
    Pairs,
    Row,
    Stream,
    Strip,
    dot,
    hoisted_bytes,
    hoisted_inputs,
    hoisted_of,
    in_blocks,
    lanes,
    row_spec,
    schedule,
)

LOWEST = -1e30
"""The initial running maximum: finite, so that a masked logit, -inf, minus it is -inf."""
RESIDENT_SHARE = 0.6
"""Keys and values of a head stay in VMEM if they and those of the next head, in flight, take up to this share of it."""


def forward(
    problem: Problem, operands: Operands, sizes: BlockSizes, interpret: Any
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row, -inf where a query sees no key."""
    (batch, queries, heads, _), (_, keys, _, value_size) = operands.q.shape, operands.v.shape
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (operands.q, operands.k, operands.v))
    blocks = problem.blocks(operands, sizes.block_q, sizes.block_k)
    hoisted = hoisted_of(problem, operands, sizes.block_k)
    packed = packs(operands, hoisted, sizes.block_q)
    if packed:
        q = q.reshape(batch, k.shape[1], -1, q.shape[3])
        problem, hoisted = replace(problem, causal=False), _packed(problem, operands, hoisted)
    q, k, v = padded(q, 2, sizes.block_q), padded(k, 2, sizes.block_k), padded(v, 2, sizes.block_k)
    head_bytes = k.dtype.itemsize * k.shape[2] * (lanes(k.shape[3]) + lanes(value_size))
    # A long cache may be nearly empty: streaming reads only visible blocks.
    resident = 2 * head_bytes <= sizes.holds(RESIDENT_SHARE, q, v) and not packed
    inputs = hoisted_inputs(hoisted, sizes.block_q, sizes.block_k)
    out, lse = _call(problem, blocks, resident, q, k, v, inputs, sizes, keys, interpret)
    if packed:
        out, lse = (x[..., : queries * heads // x.shape[1], :] for x in (out, jnp.swapaxes(lse, 2, 3)))
        out, lse = out.reshape(batch, heads, queries, value_size), lse.reshape(batch, heads, 1, queries)
    return jnp.swapaxes(out[:, :, :queries], 1, 2), lse[:, :, 0, :queries]


def packs(operands: Operands, hoisted: Hoisted, most: int) -> bool:
    """Whether all heads that share keys are processed as one: their queries fit a block, as in decoding."""
    queries, group = operands.q.shape[1], operands.q.shape[2] // operands.k.shape[2]
    alike = not any(side == "key" and array.shape[1] > 1 for _, side, array in hoisted)
    return group > 1 and alike and queries * group <= most


def _packed(problem: Problem, operands: Operands, hoisted: Hoisted) -> Hoisted:
    """The hoisted values of G T queries for each key/value head, one query head after another."""
    queries, heads, kv_heads = *operands.q.shape[1:3], operands.k.shape[2]
    places = positions(problem.sizes(operands))["query"]
    given: Hoisted = [side for side in hoisted if side[0] != "query"]

    def one(key: Key, side: Side, array: Array) -> tuple[Key, Side, Array]:
        if side == "key" or (side == "neither" and array.shape[1] == 1):
            return key, side, array
        own = heads if array.shape[1] > 1 else heads // kv_heads
        wide = jnp.broadcast_to(array, (array.shape[0], own, queries, *array.shape[3:]))
        return key, "query", wide.reshape(array.shape[0], -1, heads // kv_heads * queries, *array.shape[3:])

    return [one(*side) for side in [*given, ("query", "query", places)]]


def _call(
    problem: Problem,
    blocks: Blocks,
    resident: bool,
    q: Array,
    k: Array,
    v: Array,
    hoisted: list[HoistedInput],
    sizes: BlockSizes,
    keys: int,
    interpret: Any,
) -> tuple[Array, Array]:
    """The kernel on whole blocks: (B N T Hv), (B N 1 T)."""
    block_q, block_k, size, value_size = sizes.block_q, sizes.block_k, k.shape[3], v.shape[3]
    rows, group = schedule(blocks), q.shape[1] // k.shape[1]
    held = hoisted_bytes(hoisted, "query", block_q, k.shape[2]) + hoisted_bytes(hoisted, "key", k.shape[2], block_k)
    if resident:
        held += 2 * k.dtype.itemsize * k.shape[2] * (lanes(size) + lanes(value_size))
    chain = Chain((*q.shape[:2], q.shape[2] // block_q), sizes.cores)

    def row_place(b: Any, n: Any, i: Any) -> Any:
        return b, lax.div(n, group), i

    def whole_head(width: int) -> pl.BlockSpec:
        if not resident:
            return pl.BlockSpec(memory_space=pl.ANY)
        return pl.BlockSpec(
            (1, 1, k.shape[2] // block_k, block_k, width), lambda b, n, i: (b, lax.div(n, group), 0, 0, 0)
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
        hoisted=[(side.key, side.side) for side in hoisted],
        chain=None if resident else chain,
        group=group,
    )
    return pl.pallas_call(
        kernel,
        grid=chain.sizes,
        in_specs=[
            row_spec(blocks, rows, row_place),
            row_spec(blocks, rows, lambda *grid: row_place(*chain.following(*grid))),
            pl.BlockSpec((1, 1, block_q, size), lambda b, n, i: (b, n, i, 0)),
            whole_head(size),
            whole_head(value_size),
            *[side.spec(lambda b, n, i: (b, n, i), None, whole) for side in hoisted],
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
            *([] if resident else streams),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 if resident else chain.semantics,
            vmem_limit_bytes=sizes.vmem_limit(held, q, v),
        ),
        name="attention_forward",
        interpret=interpret,
    )(rows, rows, q, in_blocks(k, block_k), in_blocks(v, block_k), *(side.array for side in hoisted))


class _Resident:
    """Keys and values that are resident in VMEM."""

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
    """Keys and values that are copied from HBM two blocks ahead, across programs; copies are numbered consecutively."""

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
    hoisted: list[tuple[Key, Side]],
    chain: Chain | None,
    group: int,
) -> None:
    hoisted_refs: dict[Key, tuple[Side, Any]] = {
        key: (side, ref) for (key, side), ref in zip(hoisted, refs, strict=False)
    }
    out_ref, lse_ref, sum_ref, logits_ref, *streams = refs[len(hoisted) :]
    block_q, block_k = q_ref.shape[2], logits_ref.shape[0]
    batch, head, index = (pl.program_id(dim) for dim in range(3))
    row = Row(row_ref)
    pairs = Pairs(problem, hoisted_refs, key_length)
    strips = range(0, block_k, strip)
    has_diagonal = problem.causal and block_q == block_k
    q = q_ref[0, 0]
    source = _Resident(k_ref, v_ref)
    if chain is not None:

        def of_head(batch: Any, head: Any, _: Any) -> tuple[Any, Any]:
            place = batch, lax.div(head, group)
            return k_ref.at[place], v_ref.at[place]

        here = batch, head, index
        following = of_head(*chain.following(*here)), Row(following_ref)
        source = _Streamed(of_head(*here), row, following, chain.ends(*here), streams)

    def place(block: Any, offset: int, kind: str) -> Strip:
        start = offset if kind == "diagonal" else 0  # the queries before see none of these keys
        key = pl.multiple_of(block * block_k + offset, strip)
        return Strip(
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

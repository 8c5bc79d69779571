"""Flash attention for TPU, backward, in one pass over the blocks of keys.

Gradients of a block of keys and values are summed in VMEM over the queries that see it, which are copied from HBM one
block ahead. Those of the queries are summed over blocks of keys: in VMEM if they fit, else in one float32 copy in HBM,
which is read and written block by block during the matmuls. So a pair takes five matmuls, not the seven of two passes,
and memory is linear in the length.

Parameters of the score get gradients too: sums over keys are rows below dq, one for each parameter; sums over queries
are beside dk.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ..blocks import padded
from ..pair_function import Side, Value
from ..problem import Gradients, Operands, Problem, gradients_like
from .parts import (
    LOG2_E,
    BlockSizes,
    Chain,
    Key,
    Pairs,
    Row,
    Stream,
    Strip,
    WriteBack,
    dot,
    hoisted_bytes,
    hoisted_inputs,
    hoisted_of,
    in_blocks,
    lanes,
    row_spec,
    schedule,
    trained,
)

RESIDENT_SHARE = 0.65
"""Sums that stay in VMEM from one block of keys to the next may take up to this share of it."""


def backward(
    problem: Problem, operands: Operands, lse: Array, delta: Array, out_grad: Array, sizes: BlockSizes, interpret: Any
) -> Gradients:
    """Gradients; `delta` is the sum over Hv of out * out_grad, less the cotangent of lse (B N T)."""
    block_q, block_k = sizes.block_q, sizes.block_k
    q, k, v, g = (
        jnp.swapaxes(x, 1, 2) for x in (operands.q, operands.k, operands.v, out_grad.astype(operands.q.dtype))
    )
    (batch, heads, queries, size), (_, kv_heads, keys, value_size) = q.shape, v.shape
    group = heads // kv_heads
    blocks = problem.blocks(operands, block_q, block_k, transposed=True)
    rows = schedule(blocks)
    # 2^(logit - inf) = 0: queries that see no key, and padding, have zero gradients.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)
    stats = jnp.stack([padded(lse, 2, block_q, jnp.inf), padded(delta, 2, block_q)], axis=2)
    q, g, k, v = padded(q, 2, block_q), padded(g, 2, block_q), padded(k, 2, block_k), padded(v, 2, block_k)
    q_blocks, k_blocks = q.shape[2] // block_q, k.shape[2] // block_k
    stats = jnp.moveaxis(stats.reshape(batch, heads, 2, q_blocks, block_q), 2, 3)
    hoisted = hoisted_inputs(hoisted_of(problem, operands, block_k), block_q, block_k)
    params = _Trained(problem, size)
    query_bytes, key_bytes = 4 * q.shape[2] * params.dq_rows, 4 * k.shape[2] * (lanes(size) + lanes(value_size))
    of_hoisted = hoisted_bytes(hoisted, "query", q.shape[2], block_k)
    together, held = _together(group, query_bytes, key_bytes, sizes.holds(RESIDENT_SHARE, q, g) - of_hoisted)
    resident, parts = held > 0, group // together
    chain = Chain((batch, kv_heads, parts, k_blocks, together), sizes.cores)

    def grid_place(*grid: Any) -> Any:
        """The sequence, the query head and the block of keys."""
        b, h, s, j, g = grid
        return b, (h * parts + s) * together + g, j

    def key_block(width: int, last: bool = False) -> pl.BlockSpec:
        def place(b: Any, h: Any, s: Any, j: Any, g: Any) -> Any:
            return b, h, jnp.where(s == parts - 1, j, 0) if last else j, 0

        return pl.BlockSpec((1, 1, block_k, width), place)

    whole = {"key": block_k, "whole": lambda *grid: (*grid_place(*grid)[:2], 0)}
    kernel = functools.partial(
        _kernel,
        problem=problem,
        strip=math.gcd(block_k, sizes.strip),
        key_length=keys if keys % block_k else None,
        hoisted=[(side.key, side.side) for side in hoisted],
        params=params,
        chain=chain,
        resident=resident,
    )
    like_q, like_k, like_v, like_hoisted = gradients_like(problem, operands)
    extra_rows = params.dq_rows - params.first_row
    if resident:
        q_shapes = [jax.ShapeDtypeStruct((batch, heads, q_blocks, block_q, size), like_q.dtype)]
        if extra_rows:
            q_shapes += [jax.ShapeDtypeStruct((batch, heads, q_blocks, extra_rows, block_q), jnp.float32)]
        dq_scratch: list[Any] = [
            pltpu.VMEM((together, q_blocks, params.dq_rows, block_q), jnp.float32),
            pltpu.VMEM((2, block_q, size), like_q.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SMEM((1,), jnp.int32),
        ]
    else:
        q_shapes = [jax.ShapeDtypeStruct((batch, heads, q_blocks, params.dq_rows, block_q), jnp.float32)]
        dq_scratch = [
            pltpu.VMEM((3, params.dq_rows, block_q), jnp.float32),
            *[pltpu.SemaphoreType.DMA((3,))] * 2,
        ]
    inputs = [
        rows,
        rows,
        k,
        v,
        in_blocks(q, block_q),
        in_blocks(g, block_q),
        stats,
        *(side.array for side in hoisted),
        *([] if resident else [jnp.zeros(q_shapes[0].shape, jnp.float32)]),
    ]
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)

    def row_place(b: Any, h: Any, s: Any, j: Any, g: Any) -> Any:
        return b, h, j

    found = pl.pallas_call(
        kernel,
        grid=chain.sizes,
        in_specs=[
            row_spec(blocks, rows, row_place),
            row_spec(blocks, rows, lambda *grid: row_place(*chain.following(*grid))),
            key_block(size),
            key_block(value_size),
            *[in_hbm] * 3,
            *[side.spec(None, grid_place, whole) for side in hoisted],
            *([] if resident else [in_hbm]),
        ],
        out_specs=[
            key_block(size, last=True),
            key_block(value_size, last=True),
            *[in_hbm for _ in q_shapes],
            *(
                pl.BlockSpec((1, 1, 1, block_k), lambda *grid: (*grid_place(*grid)[:2], 0, grid[3]))
                for _ in params.along_keys
            ),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(k.shape, like_k.dtype),
            jax.ShapeDtypeStruct(v.shape, like_v.dtype),
            *q_shapes,
            *(jax.ShapeDtypeStruct((batch, heads, 1, k.shape[2]), jnp.float32) for _ in params.along_keys),
        ],
        scratch_shapes=[
            pltpu.VMEM((k_blocks if parts > 1 else 1, block_k, size), jnp.float32),
            pltpu.VMEM((k_blocks if parts > 1 else 1, block_k, value_size), jnp.float32),
            pltpu.VMEM((2, block_q, size), q.dtype),
            pltpu.VMEM((2, block_q, value_size), g.dtype),
            pltpu.VMEM((2, 2, block_q), jnp.float32),
            *[pltpu.SemaphoreType.DMA((2,))] * 3,
            pltpu.SMEM((1,), jnp.int32),
            *dq_scratch,
        ],
        input_output_aliases={} if resident else {len(inputs) - 1: 2},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=chain.semantics, vmem_limit_bytes=sizes.vmem_limit(held + of_hoisted, q, g)
        ),
        name="attention_backward",
        interpret=interpret,
    )(*inputs)
    k_grad, v_grad, q_grad, *found = found
    extra = found.pop(0) if resident and extra_rows else q_grad[:, :, :, params.first_row :]
    if not resident:
        q_grad = jnp.swapaxes((q_grad[:, :, :, :size] * problem.scale).astype(like_q.dtype), 3, 4)
    found += [extra[:, :, :, row] for row, _ in enumerate(params.along_queries)]
    q_grad = q_grad.reshape(batch, heads, -1, size)[:, :, :queries]
    q_grad, k_grad, v_grad = (jnp.swapaxes(x, 1, 2) for x in (q_grad, k_grad[:, :, :keys], v_grad[:, :, :keys]))
    return q_grad, k_grad, v_grad, params.gradients(found, operands, like_hoisted)


def _together(group: int, query_bytes: int, key_bytes: int, most: float) -> tuple[int, int]:
    """The number of query heads, of those that share keys, that are processed together, and the bytes of their sums.

    The bytes are 0 if dq does not fit. If not all heads are processed together, they include dk and dv of all keys.
    """
    for together in range(group, 0, -1):
        held = together * query_bytes + (key_bytes if together < group else 0)
        if group % together == 0 and held <= most:
            return together, held
    return group, 0


class _Trained:
    """The parameters of the score that get gradients, and the rows of their sums."""

    def __init__(self, problem: Problem, size: int):
        self.all = trained(problem)
        self.along_keys = [value for value in self.all if value.side == "key"]
        self.along_queries = [value for value in self.all if value.side != "key"]
        self.first_row = -(-size // 8) * 8 if self.along_queries else size
        """Below the `size` rows of dq."""
        self.dq_rows = self.first_row + -(-len(self.along_queries) // 8) * 8

    def add(self, slopes: list[Array], logits_grad: Array, start: int, keys: Any, dq_sum: Any, key_refs: Any) -> None:
        """Adds the terms of a strip, whose queries start at `start` of their block."""
        grads = {value: logits_grad * slope for value, slope in zip(self.all, slopes, strict=True)}
        for row, value in enumerate(self.along_queries, self.first_row):
            dq_sum[row : row + 1, start:] += jnp.sum(grads[value], axis=0, keepdims=True)
        for ref, value in zip(key_refs, self.along_keys, strict=True):
            # The sum over the lanes as a product, which leaves the keys along the lanes.
            ones = jnp.ones((8, logits_grad.shape[1]), jnp.float32)
            ref[0, 0, :, keys] += dot(ones, grads[value], 1, 1)[:1]

    def gradients(self, sums: list[Array], operands: Operands, like: list[Any]) -> list[Array]:
        """The gradients of the hoisted values, in their order and shapes, from sums (B N T or S) of all heads."""
        by_value = dict(zip([*self.along_keys, *self.along_queries], sums, strict=True))

        def one(value: Value, like: Any) -> Array:
            found = by_value[value].reshape(operands.q.shape[0], operands.q.shape[2], -1)
            if value.side == "neither":
                found = jnp.sum(found, axis=2, keepdims=True)
            found = found[:, :, : like.shape[2]]
            shared = tuple(dim for dim in (0, 1) if like.shape[dim] == 1)
            return jnp.sum(found, axis=shared, keepdims=True).astype(like.dtype)

        return [one(value, x) for value, x in zip(self.all, like, strict=True)]


def _kernel(
    row_ref: Any,
    following_ref: Any,
    k_ref: Any,
    v_ref: Any,
    q_ref: Any,
    g_ref: Any,
    stats_ref: Any,
    *refs: Any,
    problem: Problem,
    strip: int,
    key_length: int | None,
    hoisted: list[tuple[Key, Side]],
    params: _Trained,
    chain: Chain,
    resident: bool,
) -> None:
    hoisted_refs: dict[Key, tuple[Side, Any]] = {
        key: (side, ref) for (key, side), ref in zip(hoisted, refs, strict=False)
    }
    # After the zeros that dq begins with, where it is copied.
    dk_ref, dv_ref, dq_ref, *others = refs[len(hoisted) + (not resident) :]
    extra_refs = [others.pop(0)] if resident and params.along_queries else []
    key_refs, others = others[: len(params.along_keys)], others[len(params.along_keys) :]
    dk_sums, dv_sums, *scratch = others
    streams, dq_scratch = scratch[:7], scratch[7:]
    grid = [pl.program_id(dim) for dim in range(5)]
    part, index, member = grid[2:]
    parts, together = chain.sizes[2], chain.sizes[4]

    def head_of(batch: Any, kv_head: Any, part: Any, index: Any, member: Any) -> Any:
        return batch, (kv_head * parts + part) * together + member

    block_q, (block_k, size) = q_ref.shape[3], k_ref.shape[2:]
    dk_sum, dv_sum = (ref.at[index if parts > 1 else 0] for ref in (dk_sums, dv_sums))
    row, following = Row(row_ref), Row(following_ref)
    pairs = Pairs(problem, hoisted_refs, key_length)
    strips = range(0, block_k, strip)
    head = head_of(*grid)
    heads = head, head_of(*chain.following(*grid))
    inputs = _Ahead([q_ref, g_ref, stats_ref], heads, (row, following), chain.ends(*grid), streams)
    targets = [ref.at[head] for ref in (dq_ref, *extra_refs)]
    if resident:
        sums: Any = _Resident(targets, params, dq_scratch, member, row, chain.ends(*grid))
    else:
        sums = _Copied(targets[0], dq_scratch, row)

    def tile(block: Any, number: Any, kind: str) -> None:
        """Processes one block of queries. In a diagonal block, the queries before a strip see none of its keys."""
        q_block, g_block, stats = inputs.blocks(number)
        dq_sum = sums.block(block, number)

        def products(offset: int) -> tuple[Array, Array]:
            """The matmuls before the softmax: k q^T and v g^T of a strip."""
            start, keys = offset if kind == "diagonal" else 0, pl.ds(offset, strip)
            return dot(k_ref[0, 0, keys], q_block[start:], 1, 1), dot(v_ref[0, 0, keys], g_block[start:], 1, 1)

        ahead = products(0)
        for offset in strips:
            logits, weights_grad = ahead
            ahead = products(offset + strip) if offset + strip < block_k else ahead
            start, keys = block_q - logits.shape[1], pl.ds(offset, strip)
            where = Strip(
                query=block * block_q + start,
                query_slice=pl.ds(pl.multiple_of(block * block_q + start, math.gcd(strip, block_q)), block_q - start),
                queries=block_q - start,
                key=index * block_k + offset,
                key_slice=keys,
                keys=strip,
            )
            logits, slope, slopes = pairs.scored_with_slopes(logits, where)
            logits = logits if kind == "full" else pairs.masked(logits, where)
            weights, kept = jnp.exp2(logits - stats[0:1, start:]), pairs.kept(where)
            q, g = q_block[start:], g_block[start:]
            dv_sum[keys] += dot((weights if kept is None else weights * kept).astype(g.dtype), g, 1, 0)
            weights_grad = weights_grad if kept is None else weights_grad * kept
            logits_grad = weights * (weights_grad - stats[1:2, start:])
            params.add(slopes, logits_grad, start, keys, dq_sum, key_refs)
            score_grad = (logits_grad if slope is None else logits_grad * slope).astype(q.dtype)
            dk_sum[keys] += dot(score_grad, q, 1, 0)
            dq_sum[:size, start:] += dot(k_ref[0, 0, keys], score_grad, 0, 0)

    for ref in key_refs:
        ref[...] = jnp.zeros_like(ref)

    @pl.when((part == 0) & (member == 0))
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    inputs.begin()
    sums.begin(index)

    def visit(number: Any, block: Any) -> Any:
        ahead = row.after(block)
        inputs.fetch(ahead, number)
        inputs.wait(number)
        sums.fetch(ahead, number)
        full = row.is_full(block)
        diagonal = (block == index) if problem.causal and block_q == block_k else False
        pl.when(full)(lambda: tile(block, number, "full"))
        pl.when(jnp.logical_not(full | diagonal))(lambda: tile(block, number, "partial"))
        if diagonal is not False:
            pl.when(jnp.logical_not(full) & diagonal)(lambda: tile(block, number, "diagonal"))
        sums.give_back(block, number)
        return ahead

    lax.fori_loop(0, row.count, visit, row.low)

    @pl.when((part == parts - 1) & (member == together - 1))
    def _() -> None:
        dk_ref[0, 0] = (dk_sum[...] * problem.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)

    sums.end(problem.scale)
    inputs.end()


class _Ahead:
    """Queries, output gradients and statistics, copied one block ahead, across programs.

    Copies are numbered consecutively. A row without blocks has one copy that is not used, and so has the last row.
    """

    def __init__(self, refs: list[Any], heads: Any, rows: tuple[Row, Row], ends: tuple[Any, Any], scratch: list[Any]):
        *parts, counter = scratch
        self.refs, self.heads, (self.row, self.following), (self.first, self.last) = refs, heads, rows, ends
        own = [ref.at[heads[0]] for ref in refs]
        self.streams = [Stream(*one) for one in zip(own, parts[:3], parts[3:], strict=True)]
        self.before = jnp.where(self.first, 0, counter[0])
        self.after = self.before + jnp.maximum(self.row.count, 1)
        counter[0] = self.after

    def _start(self, number: Any, head: tuple[Any, ...], block: Any) -> None:
        for stream, ref in zip(self.streams, self.refs, strict=True):
            stream.start(block, number, ref.at[head])

    def begin(self) -> None:
        """Before the first block: it is on its way, unless no program was before."""
        pl.when(self.first)(lambda: self._start(0, self.heads[0], self.row.low))

        @pl.when(self.row.count == 0)
        def _() -> None:
            self.fetch(0, 0)
            self.wait(0)

    def wait(self, number: Any) -> None:
        """Until block `number` of the row is there."""
        for stream in self.streams:
            stream.wait(self.before + number)

    def fetch(self, ahead: Any, number: Any) -> None:
        """While block `number` of the row is used, the one `ahead` is on its way, or the first of the next row."""
        inside = number + 1 < self.row.count
        head = tuple(jnp.where(inside, own, following) for own, following in zip(*self.heads, strict=True))
        self._start(self.before + number + 1, head, jnp.where(inside, ahead, self.following.low))

    def blocks(self, number: Any) -> list[Any]:
        """What lies in VMEM of block `number` of the row."""
        return [stream.at(self.before + number) for stream in self.streams]

    def end(self) -> None:
        """After the last block of a row."""

        @pl.when(self.last)
        def _() -> None:
            for stream in self.streams:
                stream.wait(self.after)


class _Resident:
    """Sums of dq in VMEM, written to HBM once no later row of blocks adds to them; writes are numbered in order."""

    def __init__(self, targets: list[Any], params: _Trained, scratch: list[Any], member: Any, row: Row, ends: Any):
        (self.target, *self.extra), (sums, buffer, semaphores, counter) = targets, scratch
        self.sums, self.back = sums.at[member], WriteBack(self.target, buffer, semaphores)
        self.params, (first, self.last) = params, ends
        self.done_from, self.done_to = (jnp.minimum(block, sums.shape[1]) for block in (row.done_from, row.done_to))
        self.before = jnp.where(first, 0, counter[0])
        self.after = self.before + self.done_to - self.done_from
        counter[0] = self.after

    def begin(self, index: Any) -> None:
        """Before the first block of a row: sums begin with zeros."""

        @pl.when(index == 0)
        def _() -> None:
            def clear(block: Any, carry: Any) -> Any:
                self.sums[block] = jnp.zeros(self.sums.shape[1:], jnp.float32)
                return carry

            lax.fori_loop(0, self.sums.shape[0], clear, 0)

    def fetch(self, ahead: Any, number: Any) -> None:
        """While a block is used."""

    def block(self, block: Any, number: Any) -> Any:
        """The sum of a block, the `number`th of the row."""
        return self.sums.at[block]

    def give_back(self, block: Any, number: Any) -> None:
        """When this row's part of a block is added."""

    def end(self, scale: float) -> None:
        """After the last block of a row."""
        width, first_row = self.target.shape[2], self.params.first_row

        def write(block: Any, number: Any) -> Any:
            pl.when(number >= 2)(lambda: self.back.wait(number - 2))
            self.back.at(number)[...] = (self.sums[block, :width] * scale).astype(self.target.dtype).T
            self.back.start(block, number)
            for extra in self.extra:
                pltpu.sync_copy(self.sums.at[block, first_row:], extra.at[block])
            return number + 1

        lax.fori_loop(self.done_from, self.done_to, write, self.before)
        for ago in (2, 1):
            pl.when(self.last & (self.after >= ago))(lambda ago=ago: self.back.wait(self.after - ago))


class _Copied:
    """Sums of dq in HBM, copied one block ahead and back; all copies of a row are complete at its end."""

    def __init__(self, target: Any, scratch: list[Any], row: Row):
        buffer, there, back = scratch
        self.there, self.back, self.row = Stream(target, buffer, there), WriteBack(target, buffer, back), row

    def begin(self, index: Any) -> None:
        """Before the first block of a row."""
        pl.when(self.row.count > 0)(lambda: self.there.start(self.row.low, 0))

    def fetch(self, ahead: Any, number: Any) -> None:
        """While a block is used the next is on its way; its slot must have been written back."""

        @pl.when(number + 1 < self.row.count)
        def _() -> None:
            pl.when(number >= 2)(lambda: self.back.wait(number - 2))
            self.there.start(ahead, number + 1)

        self.there.wait(number)

    def block(self, block: Any, number: Any) -> Any:
        """The sum of a block, the `number`th of the row."""
        return self.there.at(number)

    def give_back(self, block: Any, number: Any) -> None:
        """When this row's part of a block is added."""
        self.back.start(block, number)

    def end(self, scale: float) -> None:
        """After the last block of a row: the copies that no later fetch has waited for."""
        for ago in (3, 2, 1):
            pl.when(self.row.count >= ago)(lambda ago=ago: self.back.wait(self.row.count - ago))

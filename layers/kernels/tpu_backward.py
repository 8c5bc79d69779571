"""Flash attention for TPU, backward, in one pass over the blocks of keys.

Gradients of a block of keys and values are summed in VMEM while the queries that see it pass by. Those of the queries
are summed over blocks of keys: in VMEM where a head fits, else in one float32 copy in HBM, read and written block by
block behind the products. So a pair costs five products, not the seven of two passes, and memory stays linear.

Parameters of the score get gradients too: what is summed over keys stands below dq, a row for each parameter; what is
summed over queries, beside dk.
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

from .blocks import padded
from .pairs import Side, Value
from .problem import Gradients, Operands, Problem, gradients_like
from .tpu_parts import (
    LOG2_E,
    BlockSizes,
    Key,
    Pairs,
    Row,
    Stream,
    Strip,
    WriteBack,
    dot,
    in_blocks,
    schedule,
    schedule_place,
    side_inputs,
    sides_of,
    trained,
)

RESIDENT_SHARE = 0.4
"""What the backward pass needs of one head stays in VMEM up to this share of it."""


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
    # 2^(logit - inf) = 0: a query that sees nothing, or is padding, has no gradient.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)
    stats = jnp.stack([padded(lse, 2, block_q, jnp.inf), padded(delta, 2, block_q)], axis=2)
    q, g, k, v = padded(q, 2, block_q), padded(g, 2, block_q), padded(k, 2, block_k), padded(v, 2, block_k)
    q_blocks, k_blocks = q.shape[2] // block_q, k.shape[2] // block_k
    stats = jnp.moveaxis(stats.reshape(batch, heads, 2, q_blocks, block_q), 2, 3)
    sides = side_inputs(sides_of(problem, operands, block_k), block_q, block_k)
    params = _Trained(problem, size)
    resident = _resident_bytes(q, k, v, params) <= RESIDENT_SHARE * sizes.vmem_bytes

    def spec(shape: tuple[int, ...], place: Any, **options: Any) -> pl.BlockSpec:
        """A block by a function of (batch, kv head, member of its group, block of keys), in the order of the grid."""
        return pl.BlockSpec(shape, place if resident else lambda b, h, j, g: place(b, h, g, j), **options)

    def whole_head(*shape: int) -> pl.BlockSpec:
        if not resident:
            return pl.BlockSpec(memory_space=pl.ANY)
        return spec((1, 1, *shape), lambda b, h, g, j: (b, h * group + g, 0, 0, 0))

    def key_block(width: int, last: bool = False) -> pl.BlockSpec:
        def place(b: Any, h: Any, g: Any, j: Any) -> Any:
            return b, h, jnp.where(g == group - 1, j, 0) if last and resident else j, 0

        return spec((1, 1, block_k, width), place)

    def row_place(b: Any, h: Any, g: Any, j: Any) -> Any:
        return schedule_place(blocks, b, h), j, 0, 0

    def grid_place(*grid: Any) -> Any:
        b, h, g, j = grid if resident else (grid[0], grid[1], grid[3], grid[2])
        return b, h * group + g, j

    whole = {"key": block_k, "whole": lambda *grid: (*grid_place(*grid)[:2], 0)}
    kernel = functools.partial(
        _kernel,
        problem=problem,
        strip=math.gcd(block_k, sizes.strip),
        key_length=keys if keys % block_k else None,
        sides=[(side.key, side.side) for side in sides],
        params=params,
        resident=resident,
    )
    held = k_blocks if resident else 1
    like_q, like_k, like_v, like_sides = gradients_like(problem, operands)
    if resident:
        q_shape = jax.ShapeDtypeStruct((batch, heads, q_blocks, block_q, size), like_q.dtype)
        scratch: list[Any] = [pltpu.VMEM((q_blocks, params.dq_rows, block_q), jnp.float32)]
    else:
        q_shape = jax.ShapeDtypeStruct((batch, heads, q_blocks, params.dq_rows, block_q), jnp.float32)
        scratch = [
            pltpu.VMEM((2, block_q, size), q.dtype),
            pltpu.VMEM((2, block_q, value_size), g.dtype),
            pltpu.VMEM((2, 2, block_q), jnp.float32),
            pltpu.VMEM((3, params.dq_rows, block_q), jnp.float32),
            *(pltpu.SemaphoreType.DMA((slots,)) for slots in (2, 2, 2, 3, 3)),
        ]
    inputs = [
        rows,
        in_blocks(q, block_q),
        k,
        v,
        in_blocks(g, block_q),
        stats,
        *(side.array for side in sides),
    ]
    q_grad, k_grad, v_grad, *side_grads = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, group, k_blocks) if resident else (batch, kv_heads, k_blocks, group),
        in_specs=[
            spec((1, 1, 1, rows.shape[-1]), row_place, memory_space=pltpu.SMEM),
            whole_head(q_blocks, block_q, size),
            key_block(size),
            key_block(value_size),
            whole_head(q_blocks, block_q, value_size),
            whole_head(q_blocks, 2, block_q),
            *[side.spec(None, grid_place, whole) for side in sides],
            *([] if resident else [pl.BlockSpec(memory_space=pl.ANY)]),
        ],
        out_specs=[
            whole_head(*q_shape.shape[2:]),
            key_block(size, last=True),
            key_block(value_size, last=True),
            *(spec((1, 1, 1, block_k), lambda b, h, g, j: (b, h * group + g, 0, j)) for _ in params.along_keys),
            *(whole_head(q_blocks, 1, block_q) for _ in params.along_queries if resident),
        ],
        out_shape=[
            q_shape,
            jax.ShapeDtypeStruct(k.shape, like_k.dtype),
            jax.ShapeDtypeStruct(v.shape, like_v.dtype),
            *(jax.ShapeDtypeStruct((batch, heads, 1, k.shape[2]), jnp.float32) for _ in params.along_keys),
            *(
                jax.ShapeDtypeStruct((batch, heads, q_blocks, 1, block_q), jnp.float32)
                for _ in params.along_queries
                if resident
            ),
        ],
        scratch_shapes=[
            pltpu.VMEM((held, block_k, size), jnp.float32),
            pltpu.VMEM((held, block_k, value_size), jnp.float32),
            *scratch,
        ],
        input_output_aliases={} if resident else {len(inputs): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=sizes.vmem_bytes
        ),
        name="attention_backward",
        interpret=interpret,
    )(*inputs, *([] if resident else [jnp.zeros(q_shape.shape, q_shape.dtype)]))
    if not resident:
        side_grads += [
            q_grad[:, :, :, row] for row in range(params.first_row, params.first_row + len(params.along_queries))
        ]
        q_grad = jnp.swapaxes((q_grad[:, :, :, :size] * problem.scale).astype(like_q.dtype), 3, 4)
    q_grad = q_grad.reshape(batch, heads, -1, size)[:, :, :queries]
    found = (q_grad, k_grad[:, :, :keys], v_grad[:, :, :keys])
    q_grad, k_grad, v_grad = (jnp.swapaxes(x, 1, 2) for x in found)
    return q_grad, k_grad, v_grad, params.gradients(side_grads, operands, like_sides)


class _Trained:
    """The parameters of the score that get gradients, and where these are summed."""

    def __init__(self, problem: Problem, size: int):
        self.all = trained(problem)
        self.along_keys = [value for value in self.all if value.side == "key"]
        self.along_queries = [value for value in self.all if value.side != "key"]
        self.first_row = -(-size // 8) * 8 if self.along_queries else size
        """Below the `size` rows of dq."""
        self.dq_rows = self.first_row + -(-len(self.along_queries) // 8) * 8

    def add(self, slopes: list[Array], logits_grad: Array, start: int, keys: Any, dq_sum: Any, key_refs: Any) -> None:
        """Adds the part of a strip, whose queries begin at `start` of their block."""
        grads = {value: logits_grad * slope for value, slope in zip(self.all, slopes, strict=True)}
        for row, value in enumerate(self.along_queries, self.first_row):
            dq_sum[row : row + 1, start:] += jnp.sum(grads[value], axis=0, keepdims=True)
        for ref, value in zip(key_refs, self.along_keys, strict=True):
            # The sum over the lanes as a product, which leaves the keys along the lanes.
            ones = jnp.ones((8, logits_grad.shape[1]), jnp.float32)
            ref[0, 0, :, keys] += dot(ones, grads[value], 1, 1)[:1]

    def gradients(self, sums: list[Array], operands: Operands, like: list[Any]) -> list[Array]:
        """The gradients in the order and the shapes of the sides, from sums (B N T or S) of each sequence and head."""
        by_value = dict(zip([*self.along_keys, *self.along_queries], sums, strict=True))

        def one(value: Value, like: Any) -> Array:
            found = by_value[value].reshape(operands.q.shape[0], operands.q.shape[2], -1)
            if value.side == "neither":
                found = jnp.sum(found, axis=2, keepdims=True)
            found = found[:, :, : like.shape[2]]
            shared = tuple(dim for dim in (0, 1) if like.shape[dim] == 1)
            return jnp.sum(found, axis=shared, keepdims=True).astype(like.dtype)

        return [one(value, x) for value, x in zip(self.all, like, strict=True)]


def _resident_bytes(q: Array, k: Array, v: Array, params: _Trained) -> int:
    """VMEM of one head: q, g and dq twice (the next head's are on their way), dq, dk and dv in float32."""
    size, value_size = (-(-x.shape[3] // 128) * 128 for x in (k, v))
    of_query = 2 * q.dtype.itemsize * (2 * size + value_size) + 4 * size + 64 + 64 * len(params.along_queries)
    return q.shape[2] * of_query + k.shape[2] * 4 * (size + value_size)


def _kernel(
    row_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    g_ref: Any,
    stats_ref: Any,
    *refs: Any,
    problem: Problem,
    strip: int,
    key_length: int | None,
    sides: list[tuple[Key, Side]],
    params: _Trained,
    resident: bool,
) -> None:
    side_refs: dict[Key, tuple[Side, Any]] = {key: (side, ref) for (key, side), ref in zip(sides, refs, strict=False)}
    # After the zeros that dq begins with, where it is streamed.
    dq_ref, dk_ref, dv_ref, *others = refs[len(sides) + (not resident) :]
    key_refs, others = others[: len(params.along_keys)], others[len(params.along_keys) :]
    query_refs = others[: len(params.along_queries)] if resident else []
    dk_sums, dv_sums, *scratch = others[len(query_refs) :]
    block_q, (block_k, size) = q_ref.shape[3], k_ref.shape[2:]
    batch, kv_head = pl.program_id(0), pl.program_id(1)
    member, index = (pl.program_id(dim) for dim in ((2, 3) if resident else (3, 2)))
    group, count = (pl.num_programs(dim) for dim in ((2, 3) if resident else (3, 2)))
    head = kv_head * group + member
    dk_sum, dv_sum = (ref.at[index if resident else 0] for ref in (dk_sums, dv_sums))
    row = Row(row_ref)
    pairs = Pairs(problem, side_refs, key_length)
    strips = range(0, block_k, strip)

    if resident:
        targets = dq_ref, query_refs, params.first_row, problem.scale
        source = _Resident((q_ref, g_ref, stats_ref), targets, scratch[0], index == 0, index == count - 1)
    else:
        source = _Streamed([ref.at[batch, head] for ref in (q_ref, g_ref, stats_ref, dq_ref)], scratch, row)

    def tile(block: Any, number: Any, kind: str) -> None:
        """One block of queries. In a diagonal one, the queries before a strip see nothing of it."""
        q_block, g_block, stats, dq_sum = source.blocks(block, number)

        def products(offset: int) -> tuple[Array, Array]:
            """What does not wait for the softmax: k q^T and v g^T of a strip."""
            start, keys = offset if kind == "diagonal" else 0, pl.ds(offset, strip)
            return dot(k_ref[0, 0, keys], q_block[start:], 1, 1), dot(v_ref[0, 0, keys], g_block[start:], 1, 1)

        ahead = products(0)
        for offset in strips:
            logits, weights_grad = ahead
            ahead = products(offset + strip) if offset + strip < block_k else ahead
            start, keys = block_q - logits.shape[1], pl.ds(offset, strip)
            where = Strip(
                batch=batch,
                head=head,
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
        source.give_back(block, number)

    for ref in key_refs:
        ref[...] = jnp.zeros_like(ref)

    @pl.when(member == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    source.begin()

    def visit(number: Any, block: Any) -> Any:
        source.fetch(block, number)
        full = row.is_full(block)
        diagonal = (block == index) if problem.causal and block_q == block_k else False
        pl.when(full)(lambda: tile(block, number, "full"))
        pl.when(jnp.logical_not(full | diagonal))(lambda: tile(block, number, "partial"))
        if diagonal is not False:
            pl.when(jnp.logical_not(full) & diagonal)(lambda: tile(block, number, "diagonal"))
        return row.after(block)

    lax.fori_loop(0, row.count, visit, row.low)

    @pl.when(member == group - 1)
    def _() -> None:
        dk_ref[0, 0] = (dk_sum[...] * problem.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)

    source.end()


class _Resident:
    """Everything of a query head, in VMEM."""

    def __init__(self, sources: tuple[Any, ...], targets: tuple[Any, ...], sum_ref: Any, first: Any, last: Any):
        self.sources, self.targets, self.sum_ref, self.first, self.last = sources, targets, sum_ref, first, last

    def begin(self) -> None:
        """Before the first block of a row: dq of a head begins with zeros."""

        @pl.when(self.first)
        def _() -> None:
            self.sum_ref[...] = jnp.zeros_like(self.sum_ref)

    def fetch(self, block: Any, number: Any) -> None:
        """Before a block is used."""

    def blocks(self, block: Any, number: Any) -> list[Any]:
        """Queries, output gradients, statistics and the sum of dq of a block, the `number`th of the row."""
        return [*(ref.at[0, 0, block] for ref in self.sources), self.sum_ref.at[block]]

    def give_back(self, block: Any, number: Any) -> None:
        """When this row's part of a block's dq is added."""

    def end(self) -> None:
        """After the last block of a row: dq of a head is written once it is complete."""

        @pl.when(self.last)
        def _() -> None:
            dq_ref, query_refs, first_row, scale = self.targets

            def write(block: Any, carry: Any) -> Any:
                dq = self.sum_ref[block, : dq_ref.shape[4]]
                dq_ref[0, 0, block] = (dq * scale).astype(dq_ref.dtype).T
                for row, ref in enumerate(query_refs, first_row):
                    ref[0, 0, block] = self.sum_ref[block, row : row + 1]
                return carry

            lax.fori_loop(0, self.sum_ref.shape[0], write, 0)


class _Streamed:
    """Blocks copied from HBM one ahead, and dq copied back; every copy is done when a row ends."""

    def __init__(self, sources: list[Any], scratch: list[Any], row: Row):
        buffers, semaphores = scratch[:4], scratch[4:]
        self.inputs = [Stream(*parts) for parts in zip(sources, buffers, semaphores[:4], strict=True)]
        self.back = WriteBack(sources[3], buffers[3], semaphores[4])
        self.row = row

    def begin(self) -> None:
        """Before the first block of a row."""

        @pl.when(self.row.count > 0)
        def _() -> None:
            for stream in self.inputs:
                stream.start(self.row.low, 0)

    def fetch(self, block: Any, number: Any) -> None:
        """While a block is used the next is on its way; its slot of dq must have been written back."""

        @pl.when(number + 1 < self.row.count)
        def _() -> None:
            @pl.when(number >= 2)
            def _() -> None:
                self.back.wait(number - 2)

            for stream in self.inputs:
                stream.start(self.row.after(block), number + 1)

        for stream in self.inputs:
            stream.wait(number)

    def blocks(self, block: Any, number: Any) -> list[Any]:
        """Queries, output gradients, statistics and the sum of dq of a block, the `number`th of the row."""
        return [stream.at(number) for stream in self.inputs]

    def give_back(self, block: Any, number: Any) -> None:
        """When this row's part of a block's dq is added."""
        self.back.start(block, number)

    def end(self) -> None:
        """After the last block of a row: the copies that no later fetch has waited for."""
        for ago in (3, 2, 1):

            @pl.when(self.row.count >= ago)
            def _(ago: int = ago) -> None:
                self.back.wait(self.row.count - ago)

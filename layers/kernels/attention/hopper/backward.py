"""The kernels that compute gradients of attention on Hopper GPUs: of queries, and of keys and values.

There are two, so that every sum has one order and the same arguments give the same bits (both recompute the weights
from the logarithms of their sums; FlashAttention-2, 2307.08691, section 3.1.2).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..blocks import padded
from ..problem import Gradients, Operands, Problem
from .parts import (
    COMPUTING,
    LAYOUT,
    LOG2_E,
    ROWS,
    SLOTS,
    TILE,
    Pairs,
    Ring,
    Span,
    Work,
    added,
    filled,
    load,
    logits,
    spread,
    tiles,
    zeros,
)

BLOCK = 64
"""Keys, or queries, of a tile."""
SHAPE = (ROWS, BLOCK)


def gradients(
    problem: Problem, operands: Operands, lse: Array, delta: Array, out_grad: Array, interpret: Any
) -> Gradients:
    """Of queries, keys and values; `delta` is the sum over Hv of out * out_grad, less the cotangent of lse (B N T)."""
    work = Work(problem, operands, interpret)
    # Rows that see no key, and rows of padding, have zero weights.
    lse = padded(jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E), 2, TILE, jnp.inf)
    rows = filled(out_grad.astype(work.q.dtype)), lse, padded(delta, 2, TILE)
    found = _of_queries(work, *rows), *_of_keys(work, *rows)
    q, k, v = (x[:, : like.shape[1], :, : like.shape[3]] for x, like in zip(found, operands[:3], strict=True))
    return q, k, v, []


def _of_queries(work: Work, out_grad: Array, lse: Array, delta: Array) -> Array:
    """The gradient of queries, each block of them over the tiles of keys that it sees."""
    (_, queries, heads, width), (*_, value_width), dtype = work.q.shape, work.v.shape, work.q.dtype
    scale = work.problem.scale

    def kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, lse_ref: Any, delta_ref: Any, schedule_ref: Any, *refs: Any
    ) -> None:
        *hoisted, out_ref, q_tile, g_tile, lse_tile, delta_tile, k_tiles, v_tiles, loaded, full, free = refs
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        kv_head = lax.div(head, jnp.int32(work.group))
        row = queries // TILE - 1 - lax.axis_index("row")
        span, ring = Span.read(schedule_ref, batch, kv_head, row), Ring(full, free)

        def load_tile(n: Any, slot: Any) -> None:
            load((k_ref, v_ref), (batch, span.tile(n, BLOCK), kv_head), (k_tiles, v_tiles), slot, full)

        def compute(own: Any) -> None:
            first = row * TILE + own * ROWS
            rows = pl.ds(first, ROWS)
            load((q_ref, g_ref), (batch, rows, head), (q_tile, g_tile), own, loaded)
            load((lse_ref, delta_ref), (batch, head, rows), (lse_tile, delta_tile), own, loaded)
            plgpu.barrier_wait(loaded.at[own])
            sums, less = (plgpu.load(x.at[own], layout=LAYOUT.reduce(1)) for x in (lse_tile, delta_tile))

            def step(masked: bool, n: Any, found: Array) -> Array:
                slot = ring.wait(n)
                score = logits(q_tile.at[own], k_tiles.at[slot], SHAPE)
                weights = jnp.exp2(score * (scale * LOG2_E) - spread(sums, SHAPE))
                if masked:
                    pairs = Pairs("query", SHAPE, batch, head, (first, (span.low + n) * BLOCK))
                    weights = jnp.where(work.visible(pairs, hoisted), weights, 0.0)
                of_weights = logits(g_tile.at[own], v_tiles.at[slot], SHAPE)
                of_score = weights * (of_weights - spread(less, SHAPE))
                found = added(found, of_score.astype(dtype), k_tiles.at[slot])
                ring.release(slot)
                return found

            found = span.visit(step, zeros(width))
            q_tile[own] = (found * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile.at[own], out_ref.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        ring.run(span.count, load_tile, compute)

    scratch = [
        tiles(COMPUTING, ROWS, width, dtype),
        tiles(COMPUTING, ROWS, value_width, dtype),
        *[plgpu.SMEM((COMPUTING, ROWS), jnp.float32)] * 2,
        tiles(SLOTS, BLOCK, width, dtype),
        tiles(SLOTS, BLOCK, value_width, dtype),
        plgpu.Barrier(num_arrivals=4, num_barriers=COMPUTING),
        *Ring.barriers(2),
    ]
    arrays = work.q, work.k, work.v, out_grad, lse, delta, work.schedule(BLOCK)
    like = jax.ShapeDtypeStruct(work.q.shape, dtype)
    return work.call(kernel, "attention_backward_queries", (heads, queries // TILE), like, scratch, *arrays)


def _of_keys(work: Work, out_grad: Array, lse: Array, delta: Array) -> tuple[Array, Array]:
    """The gradients of keys and values, each block of them over the tiles of queries of all heads that see it."""
    (_, keys, kv_heads, width), (*_, value_width), dtype = work.k.shape, work.v.shape, work.k.dtype
    scale, group = work.problem.scale, work.group

    def kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, lse_ref: Any, delta_ref: Any, schedule_ref: Any, *refs: Any
    ) -> None:
        *hoisted, k_out, v_out, k_tile, v_tile, q_tiles, g_tiles, lse_tiles, delta_tiles, loaded, full, free = refs
        batch, kv_head, row = (lax.axis_index(axis) for axis in ("batch", "head", "row"))
        span, ring = Span.read(schedule_ref, batch, kv_head, row), Ring(full, free)

        def load_tile(n: Any, slot: Any) -> None:
            head = kv_head * group + lax.div(n, span.count)
            queries = span.tile(lax.rem(n, span.count), BLOCK)
            load((q_ref, g_ref), (batch, queries, head), (q_tiles, g_tiles), slot, full)
            load((lse_ref, delta_ref), (batch, head, queries), (lse_tiles, delta_tiles), slot, full)

        def compute(own: Any) -> None:
            first = row * TILE + own * ROWS
            rows = batch, pl.ds(first, ROWS), kv_head
            load((k_ref, v_ref), rows, (k_tile, v_tile), own, loaded)
            plgpu.barrier_wait(loaded.at[own])

            def of_head(index: Any, found: Any) -> Any:
                def step(masked: bool, n: Any, found: Any) -> Any:
                    of_keys, of_values = found
                    slot = ring.wait(index * span.count + n)
                    score = logits(k_tile.at[own], q_tiles.at[slot], SHAPE)
                    sums, less = (plgpu.load(x.at[slot], layout=LAYOUT.reduce(0)) for x in (lse_tiles, delta_tiles))
                    weights = jnp.exp2(score * (scale * LOG2_E) - spread(sums, SHAPE, 1))
                    if masked:
                        places = first, (span.low + n) * BLOCK
                        pairs = Pairs("key", SHAPE, batch, kv_head * group + index, places)
                        weights = jnp.where(work.visible(pairs, hoisted), weights, 0.0)
                    of_values = added(of_values, weights.astype(dtype), g_tiles.at[slot])
                    of_weights = logits(v_tile.at[own], g_tiles.at[slot], SHAPE)
                    of_score = weights * (of_weights - spread(less, SHAPE, 1))
                    of_keys = added(of_keys, of_score.astype(dtype), q_tiles.at[slot])
                    ring.release(slot)
                    return of_keys, of_values

                return span.visit(step, found)

            of_keys, of_values = lax.fori_loop(0, group, of_head, (zeros(width), zeros(value_width)))
            k_tile[own] = (of_keys * scale).astype(dtype)
            v_tile[own] = of_values.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_tile.at[own], k_out.at[rows])
            plgpu.copy_smem_to_gmem(v_tile.at[own], v_out.at[rows])
            plgpu.wait_smem_to_gmem(0)

        ring.run(span.count * group, load_tile, compute)

    scratch = [
        tiles(COMPUTING, ROWS, width, dtype),
        tiles(COMPUTING, ROWS, value_width, dtype),
        tiles(SLOTS, BLOCK, width, dtype),
        tiles(SLOTS, BLOCK, value_width, dtype),
        *[plgpu.SMEM((SLOTS, BLOCK), jnp.float32)] * 2,
        plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTING),
        *Ring.barriers(4),
    ]
    like = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (work.k, work.v)]
    arrays = work.q, work.k, work.v, out_grad, lse, delta, work.schedule(BLOCK, transposed=True)
    return tuple(work.call(kernel, "attention_backward_keys", (kv_heads, keys // TILE), like, scratch, *arrays))

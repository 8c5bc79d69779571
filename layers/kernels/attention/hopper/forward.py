"""The kernel that computes attention on Hopper GPUs, each block of queries over the tiles of keys that it sees."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..problem import Operands, Problem
from .parts import (
    COMPUTING,
    LOG2_E,
    ROWS,
    SLOTS,
    TILE,
    Pairs,
    Ring,
    Span,
    Work,
    added,
    load,
    logits,
    row_of,
    spread,
    tiles,
    zeros,
)

BLOCK = 128
"""Keys of a tile."""


def attention(
    problem: Problem, operands: Operands, interpret: Any
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row."""
    work = Work(problem, operands, interpret)
    (batch, queries, heads, width), (*_, value_width), dtype = work.q.shape, work.v.shape, work.q.dtype
    shape, scale = (ROWS, BLOCK), problem.scale * LOG2_E

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, schedule_ref: Any, *refs: Any) -> None:
        *hoisted, out_ref, lse_ref, q_tile, out_tile, lse_tile, k_tiles, v_tiles, loaded, full, free = refs
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        kv_head = lax.div(head, jnp.int32(work.group))
        row = queries // TILE - 1 - lax.axis_index("row")  # rows that see most keys under a causal mask start first
        span, ring = Span.read(schedule_ref, batch, kv_head, row), Ring(full, free)

        def load_tile(n: Any, slot: Any) -> None:
            load((k_ref, v_ref), (batch, span.tile(n, BLOCK), kv_head), (k_tiles, v_tiles), slot, full)

        def compute(own: Any) -> None:
            first = row * TILE + own * ROWS
            rows = pl.ds(first, ROWS)
            load((q_ref,), (batch, rows, head), (q_tile,), own, loaded)
            plgpu.barrier_wait(loaded.at[own])

            def step(masked: bool, n: Any, carry: Any) -> Any:
                out, top, total = carry
                slot = ring.wait(n)
                score = logits(q_tile.at[own], k_tiles.at[slot], shape) * scale
                if masked:
                    pairs = Pairs("query", shape, batch, head, (first, (span.low + n) * BLOCK))
                    score = jnp.where(work.visible(pairs, hoisted), score, -jnp.inf)
                higher = jnp.maximum(top, jnp.max(score, axis=1))
                shift = jnp.where(higher == -jnp.inf, 0.0, higher)
                shrunk, weights = jnp.exp2(top - shift), jnp.exp2(score - spread(shift, shape))
                total = total * shrunk + jnp.sum(weights, axis=1)
                out = added(out * spread(shrunk, out.shape), weights.astype(dtype), v_tiles.at[slot])
                ring.release(slot)
                return out, higher, total

            out, top, total = span.visit(step, (zeros(value_width), row_of(-jnp.inf), row_of(0.0)))
            some = top != -jnp.inf
            total = jnp.where(some, total, 1.0)
            out_tile[own] = (out * spread(jnp.where(some, 1.0 / total, 0.0), out.shape)).astype(dtype)
            lse_tile[own] = jnp.where(some, top / LOG2_E + jnp.log(total), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile.at[own], out_ref.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_tile.at[own], lse_ref.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        ring.run(span.count, load_tile, compute)

    results = [
        jax.ShapeDtypeStruct((batch, queries, heads, value_width), dtype),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    ]
    scratch = [
        tiles(COMPUTING, ROWS, width, dtype),
        tiles(COMPUTING, ROWS, value_width, dtype),
        plgpu.SMEM((COMPUTING, ROWS), jnp.float32),
        tiles(SLOTS, BLOCK, width, dtype),
        tiles(SLOTS, BLOCK, value_width, dtype),
        plgpu.Barrier(num_barriers=COMPUTING),
        *Ring.barriers(2),
    ]
    arrays = work.q, work.k, work.v, work.schedule(BLOCK)
    out, lse = work.call(kernel, "attention_forward", (heads, queries // TILE), results, scratch, *arrays)
    return out[:, : operands.q.shape[1], :, : operands.v.shape[3]], lse[:, :, : operands.q.shape[1]]

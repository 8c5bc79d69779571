"""Attention as one function of queries, keys, values and a mask."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ..masks import Causal, Mask
from ..sharding import locally, spec_of
from ..spec import unknown

Implementation = Literal["reference", "portable"]
BLOCKS = 8
"""The portable form cuts the queries into at most so many blocks: its program does not grow with the length."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: Mask | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N Hv"]:
    """softmax(cap(scale q k^T) + mask) v, over groups of N / K query heads that share a key/value head.

    Logits, softmax and sums are float32; the result has the dtype of q. A query that sees no key gives zeros.

    Args:
        q: queries. Batch and heads may be split over an explicit-mode mesh, alike in q, k and v.
        k: keys; N must be a multiple of K (GQA, 2305.13245).
        v: values, of any head dim.
        mask: which keys a query sees; causal by default.
        soft_cap: logits become cap tanh(logits / cap) (Gemma 2, 2408.00118, section 2).
        sinks: a learned logit per head that takes part in the softmax and has no value (2309.17453; gpt-oss).
        scale: of the logits; 1 / sqrt(H) by default.
        implementation: "reference" is the plain definition; "portable" goes block by block over the queries, leaves out
            keys that the mask is known to hide, and recomputes in the backward pass what it would otherwise store. It
            holds the float32 logits of max(512, T / 8) queries at a time: B x N x max(512, T / 8) x S x 4 bytes.

    Raises:
        ValueError: where shapes do not fit or the implementation is unknown.
    """
    (batch, _, heads, size), (keys, kv_heads) = q.shape, k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key/value heads, got N={heads}, K={kv_heads}")
    if k.shape != (batch, keys, kv_heads, size) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q, k, v must be B T N H, B S K H, B S K Hv, got {q.shape}, {k.shape}, {v.shape}")
    mask = Causal() if mask is None else jax.tree.map(lambda x: x if isinstance(x, int) else jnp.asarray(x), mask)
    scale = 1 / math.sqrt(size) if scale is None else scale
    functions = {"reference": _reference, "portable": _portable}
    if implementation is not None and implementation not in functions:
        raise unknown("attention implementation", implementation, functions)
    function = functions[implementation or "portable"]

    split, _, heads_split, _ = spec_of(q)
    for leaf in jax.tree.leaves(mask):
        if isinstance(leaf, jax.Array) and leaf.ndim and spec_of(leaf)[0] != split:
            raise ValueError(
                "arrays of a mask start with the batch and must be split over the mesh like the queries' batch, "
                f"got {spec_of(leaf)[0]} for shape {leaf.shape} and {split}"
            )
    leaves, tree = jax.tree.flatten((q, k, v, mask, sinks))
    traced = [index for index, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def call(*arrays: Array) -> Array:
        filled = list(leaves)
        for index, array in zip(traced, arrays, strict=True):
            filled[index] = array
        first_head = 0 if heads_split is None else jax.lax.axis_index(heads_split) * arrays[0].shape[2]
        return function(*tree.unflatten(filled), scale, soft_cap, first_head)

    splits = [spec_of(x)[2] for x in (q, k, v)] + ([] if sinks is None else [spec_of(sinks)[0]])
    if len(set(splits)) > 1:
        raise ValueError(f"heads of q, k, v and sinks must be split alike, got {splits}")
    return locally(call, *(leaves[index] for index in traced))


def _portable(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    sinks: Array | None,
    scale: float,
    soft_cap: float | None,
    first_head: int | Array,
) -> Array:
    """The plain definition on one block of queries after another, each with the range of keys it can see."""
    queries, keys = q.shape[1], k.shape[1]
    size = max(512, -(-queries // BLOCKS))
    outputs = []
    for first in range(0, queries, size):
        last = min(first + size, queries) - 1
        low, high = mask.key_range(first, last, keys)

        def block(
            q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None, at: Any = (first_head, first, low)
        ) -> Array:
            return _reference(q, k, v, mask, sinks, scale, soft_cap, *at)

        outputs.append(jax.checkpoint(block)(q[:, first : last + 1], k[:, low:high], v[:, low:high], mask, sinks))
    return jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]


def _reference(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    sinks: Array | None,
    scale: float,
    soft_cap: float | None,
    first_head: int | Array = 0,
    first_query: int = 0,
    first_key: int = 0,
) -> Array:
    """The plain definition; holds all T x S logits. The first indices say where q and k were cut out."""
    (batch, queries, heads, size), (keys, kv_heads) = q.shape, k.shape[1:3]
    # The small arrays are transposed here, so that no product needs to transpose one of size T x S.
    group = jnp.einsum("BTKGH->BKGTH", q.reshape(batch, queries, kv_heads, heads // kv_heads, size))
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    logits = checkpoint_name(_scores(group, k), "scores") * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    visible = mask.visible(*_indices(batch, heads, kv_heads, keys, queries, first_head, first_query, first_key))
    logits = jnp.where(visible, logits, -jnp.inf)
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, 1, 1)
    highest = highest if sink is None else jnp.maximum(highest, sink)
    highest = jax.lax.stop_gradient(jnp.where(highest == -jnp.inf, 0.0, highest))
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True) + (0.0 if sink is None else jnp.exp(sink - highest))
    mixed = jnp.einsum("BKGTS,BKSV->BKGTV", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    mixed = (mixed / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)
    return jnp.einsum("BKGTV->BTKGV", mixed).reshape(batch, queries, heads, v.shape[-1])


@jax.custom_vjp
def _scores(q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"]) -> Float[Array, "B K G T S"]:
    """Products q k^T, float32. The gradient that JAX would derive transposes an array of size T x S in memory."""
    return jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)


def _scores_forward(q: Array, k: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scores(q, k), (q, k)


def _scores_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    q, k = saved
    g = g.astype(q.dtype)
    k_grad = jnp.einsum("BKGTH,BKGTS->BKHS", q, g)
    return jnp.einsum("BKGTS,BKSH->BKGTH", g, k), jnp.swapaxes(k_grad, 2, 3)


_scores.defvjp(_scores_forward, _scores_backward)


def _indices(
    batch: int,
    heads: int,
    kv_heads: int,
    keys: int,
    queries: int,
    first_head: int | Array,
    first_query: int,
    first_key: int,
) -> tuple[Array, Array, Array, Array]:
    """Index arrays that broadcast to B K G T S."""
    head = first_head + jnp.arange(heads).reshape(kv_heads, heads // kv_heads, 1, 1)
    query = first_query + jnp.arange(queries)[:, None]
    return jnp.arange(batch).reshape(batch, 1, 1, 1, 1), head, query, first_key + jnp.arange(keys)

"""The plain definition of attention, with which every other implementation must agree. It stores all T x S logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .pair_function import Value, positions
from .problem import Operands, Problem


def forward(problem: Problem, operands: Operands) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row, -inf where a query sees no key."""
    q, k, v = operands.q, operands.k, operands.v
    (batch, queries, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    group = q.reshape(batch, queries, kv_heads, heads // kv_heads, q.shape[-1])
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", group, k, preferred_element_type=jnp.float32) * problem.scale
    logits = logits.reshape(batch, heads, queries, keys)
    index = positions(problem.sizes(operands))
    hoisted = dict(zip(problem.mask.hoisted, map(jnp.asarray, problem.mask_values(operands)), strict=True))
    if problem.score is not None:
        hoisted |= dict(zip(problem.score.hoisted, operands.score_hoisted, strict=True))

    def read(value: Value) -> Array:
        if value.leaf == "score":
            return logits
        array = index[value.leaf] if value.leaf else hoisted[value]
        if value.shape or value.side == "neither":
            return array if value.shape else array[..., None]
        return array[..., None] if value.side == "query" else array[..., None, :]

    if problem.score is not None:
        (logits,) = problem.score.evaluate(read)
    (visible,) = problem.mask.evaluate(read)
    logits = jnp.where(visible, logits, -jnp.inf)
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    highest = jax.lax.stop_gradient(jnp.where(highest == -jnp.inf, 0.0, highest))
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0.0
    weights = weights / jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(jnp.where(empty, 1.0, total)))[..., 0]
    if operands.dropout_rows is not None:
        query, key = index["query"][..., None], index["key"][..., None, :]
        weights = weights * problem.dropout_factor(operands.dropout_rows[..., None], query, key)
    weights = weights.reshape(batch, kv_heads, -1, queries, keys).astype(v.dtype)
    mixed = jnp.einsum("BKGTS,BSKV->BTKGV", weights, v, preferred_element_type=jnp.float32)
    return mixed.reshape(batch, queries, heads, v.shape[-1]).astype(problem.out_dtype), lse

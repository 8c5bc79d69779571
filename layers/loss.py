"""Cross-entropy that never holds the logits of all tokens at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .sharding import einsum, gather, shards, spec_of, zeros

LOGITS_BYTES = 2**28
"""Float32 logits that exist at a time unless told otherwise: 523 tokens of a vocabulary of 128,256."""


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over all tokens of the training loss and of the plain negative log-likelihood, in nats.

    loss = nll + z_loss * log(Z)^2 (PaLM, 2204.02311, section 5), nll = log(Z) - logit of the target.
    Tokens are taken `chunk` at a time (on each device), and the gradient is computed along with the loss, so that the
    logits, B x T x V, are neither stored nor computed twice. The likelihood is for reporting: it has no gradient.

    Args:
        hidden: final hidden states; the matmuls run in their dtype, everything else in float32.
        head: the output embedding.
        targets: the next token of each position.
        weights: 0 masks a position out. They are given, not learned: they get no gradient.
        soft_cap: logits become cap tanh(logits / cap).
        z_loss: weight of the squared log-partition.
        chunk: tokens whose logits exist at a time (one of each row at least); as many as fit 256 MiB if not given.
    """
    batch, length = targets.shape
    chunk = max(1, LOGITS_BYTES // (4 * head.shape[0])) if chunk is None else chunk
    rows = -(-batch // shards(targets, 0))
    parts = max(1, -(-rows * length // chunk))
    size = -(-length // parts)
    if length % size:
        padding = ((0, 0), (0, -length % size))
        hidden = jnp.pad(hidden, (*padding, (0, 0)))
        targets, weights = jnp.pad(targets, padding), jnp.pad(weights, padding)
    return _sums(hidden, gather(head, hidden.dtype), targets, weights, soft_cap, z_loss, size)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(
    hidden: Array, head: Array, targets: Array, weights: Array, soft_cap: float | None, z_loss: float, size: int
) -> tuple[Array, Array]:
    def step(sums: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        loss, nll, _ = _piece(*piece, head, soft_cap, z_loss)
        return sums + jnp.stack([loss, nll]), None

    sums, _ = jax.lax.scan(step, jnp.zeros(2), _pieces(size, hidden, targets, weights))
    return sums[0], sums[1]


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, soft_cap: float | None, z_loss: float, size: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    # Each shard of the batch sums its own gradient of the head (axis P), so that they are added over devices once.
    split = shards(targets, 0)

    def step(carry: tuple[Array, Array], piece: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        sums, head_grad = carry
        loss, nll, logits_grad = _piece(*piece, head, soft_cap, z_loss)
        logits_grad = logits_grad.astype(hidden.dtype)
        hidden_grad = einsum("B T V, V D -> B T D", logits_grad, head)
        own_logits, own_hidden = (x.reshape(split, -1, *x.shape[1:]) for x in (logits_grad, piece[0]))
        head_grad = head_grad + einsum(
            "P B T V, P B T D -> P V D", own_logits, own_hidden, preferred_element_type=jnp.float32
        )
        return (sums + jnp.stack([loss, nll]), head_grad), hidden_grad

    pieces = _pieces(size, hidden, targets, weights)
    start = zeros((split, *head.shape), jnp.float32, (spec_of(targets)[0], *spec_of(head)))
    (sums, head_grad), hidden_grad = jax.lax.scan(step, (jnp.zeros(2), start), pieces)
    hidden_grad = jnp.moveaxis(hidden_grad, 0, 1).reshape(hidden.shape)
    return (sums[0], sums[1]), (hidden_grad, jnp.sum(head_grad, axis=0).astype(head.dtype))


def _backward(
    soft_cap: float | None, z_loss: float, size: int, saved: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    hidden_grad, head_grad = saved
    scale = cotangents[0]
    return (hidden_grad * scale.astype(hidden_grad.dtype), head_grad * scale.astype(head_grad.dtype), None, None)


_sums.defvjp(_forward, _backward)


def _pieces(size: int, *arrays: Array) -> Any:
    """Cuts B T ... into (T / size) B size ..., to be scanned over."""
    return tuple(jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0) for x in arrays)


def _piece(
    hidden: Array, targets: Array, weights: Array, head: Array, soft_cap: float | None, z_loss: float
) -> tuple[Array, Array, Array]:
    """Loss and likelihood summed over some tokens, and the gradient of the loss in the logits (before the cap)."""
    logits = einsum("B T D, V D -> B T V", hidden, head, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    log_z = highest + jnp.log(jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True))
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    nll = (log_z - jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1, keepdims=True))[..., 0] * weights
    loss = nll + z_loss * jnp.square(log_z[..., 0]) * weights
    grad = jnp.exp(logits - log_z) * (1 + 2 * z_loss * log_z) - chosen.astype(jnp.float32)
    if soft_cap is not None:
        grad = grad * (1 - jnp.square(logits / soft_cap))
    return jnp.sum(loss), jnp.sum(nll), grad * weights[..., None]

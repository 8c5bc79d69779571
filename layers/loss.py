"""Cross-entropy in chunks, so that the logits of all tokens never exist at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .sharding.axes import names_of, spec, spec_of, used_axes
from .sharding.collectives import gather_shard

LOGITS_BYTES = 2**28
"""Lower bound of the bytes of float32 logits in a chunk: 523 tokens of a vocabulary of 128,256."""


def tokens_at_a_time(vocab: int, dim: int) -> int:
    """The number of tokens in a chunk: as many as fit 256 MiB, or D / 2 if that is more.

    Each chunk reads and writes the float32 gradient of the head, which for D / 2 tokens is twice their logits.
    """
    return max(1, LOGITS_BYTES // (4 * vocab), dim // 2)


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
    Each device processes `chunk` tokens at a time and computes the gradient with the loss, so that the logits,
    B x T x V, are neither stored nor computed twice. The likelihood is for reporting and has no gradient.

    Args:
        hidden: final hidden states; the matmuls run in their dtype, everything else in float32.
        head: the output embedding.
        targets: the next token of each position.
        weights: weight of each token; 0 masks it. They have no gradient.
        soft_cap: logits become cap tanh(logits / cap).
        z_loss: weight of the squared log-partition.
        chunk: number of tokens whose logits exist at a time (at least one of each row); default `tokens_at_a_time`.
    """
    chunk = tokens_at_a_time(*head.shape) if chunk is None else chunk
    return _sums(hidden, head, targets, weights, soft_cap, z_loss, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(
    hidden: Array, head: Array, targets: Array, weights: Array, soft_cap: float | None, z_loss: float, chunk: int
) -> tuple[Array, Array]:
    def local(split: _Split, hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
        def step(sums: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
            loss, nll, _ = _piece(*piece, head, split.vocab, soft_cap, z_loss)
            return sums + jnp.stack([loss, nll]), None

        return _summed(jax.lax.scan(step, jnp.zeros(2), _pieces(chunk, hidden, targets, weights))[0], split.tokens)

    sums = _Split(hidden, head, targets).run(local, (hidden, head, targets, weights), lambda split: spec(None))
    return sums[0], sums[1]


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, soft_cap: float | None, z_loss: float, chunk: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def local(split: _Split, hidden: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, Array, Array]:
        def step(carry: tuple[Array, Array], piece: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
            sums, head_grad = carry
            loss, nll, logits_grad = _piece(*piece, head, split.vocab, soft_cap, z_loss)
            logits_grad = logits_grad.astype(hidden.dtype)
            hidden_grad = jnp.einsum("btv,vd->btd", logits_grad, head)
            head_grad = head_grad + jnp.einsum("btv,btd->vd", logits_grad, piece[0], preferred_element_type=jnp.float32)
            return (sums + jnp.stack([loss, nll]), head_grad), hidden_grad

        start = jnp.zeros(2), jnp.zeros(head.shape, jnp.float32)
        (sums, head_grad), hidden_grad = jax.lax.scan(step, start, _pieces(chunk, hidden, targets, weights))
        hidden_grad = jnp.moveaxis(hidden_grad, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
        hidden_grad = split.to_hidden(hidden_grad[:, : hidden.shape[1]])
        return _summed(sums, split.tokens), hidden_grad, split.to_head(head_grad)

    def out(split: _Split) -> Any:
        return spec(None), spec(*split.hidden), spec(*split.head)

    sums, hidden_grad, head_grad = _Split(hidden, head, targets).run(local, (hidden, head, targets, weights), out)
    return (sums[0], sums[1]), (hidden_grad, head_grad.astype(head.dtype))


def _backward(
    soft_cap: float | None, z_loss: float, chunk: int, saved: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    # The scale, often 1 / tokens, is not rounded to the dtype of the gradient: that would bias the whole gradient.
    scaled = [(gradient.astype(jnp.float32) * cotangents[0]).astype(gradient.dtype) for gradient in saved]
    return *scaled, None, None


_sums.defvjp(_forward, _backward)


class _Split:
    """The partitions of hidden states, head and tokens."""

    def __init__(self, hidden: Array, head: Array, targets: Array):
        self.hidden, self.head = spec_of(hidden), spec_of(head)
        self.head_used = tuple(map(used_axes, self.head))
        self.vocab = self.head_used[0]
        """The mesh axes that split the vocabulary: sums over it are sums over them."""
        batch, time, dim = self.hidden
        self.hidden_used = batch, tuple(name for name in names_of(time) if name not in self.vocab), dim
        self.targets = spec_of(targets)
        self.tokens = (*names_of(self.targets[0]), *names_of(self.targets[1]))
        """The mesh axes that split the tokens."""

    def run(self, local: Callable[..., Any], arrays: tuple[Array, ...], out: Callable[["_Split"], Any]) -> Any:
        """`local(self, hidden, head, targets, weights)` on each device, with hidden states and head gathered for it."""

        def gathered(hidden: Array, head: Array, targets: Array, weights: Array) -> Any:
            hidden = gather_shard(hidden, self.hidden, self.hidden_used)
            head = gather_shard(head.astype(hidden.dtype), self.head, self.head_used)
            return local(self, hidden, head, targets, weights)

        if not any(map(names_of, (*self.hidden, *self.head, *self.targets))):
            return gathered(*arrays)
        in_specs = tuple(spec(*each) for each in (self.hidden, self.head, self.targets, self.targets))
        return jax.shard_map(gathered, in_specs=in_specs, out_specs=out(self), check_vma=False)(*arrays)

    def to_hidden(self, gradient: Array) -> Array:
        """The sum over the vocabulary of the gradient of hidden states, split like them."""
        if self.hidden_used[1] == names_of(self.hidden[1]):
            return _summed(gradient, self.vocab)
        return jax.lax.psum_scatter(gradient, self.vocab, scatter_dimension=1, tiled=True)

    def to_head(self, gradient: Array) -> Array:
        """The sum over all tokens of the gradient of the head, split like the head at rest."""
        left = self.tokens
        for dim, (entry, used) in enumerate(zip(self.head, self.head_used, strict=True)):
            over = names_of(entry)[len(used) :]
            if over:
                if not set(over) <= set(left):  # each device has the total
                    gradient = gradient / jax.lax.axis_size(over)
                gradient = jax.lax.psum_scatter(gradient, over, scatter_dimension=dim, tiled=True)
                left = tuple(name for name in left if name not in over)
        return _summed(gradient, left)


def _summed(array: Array, over: tuple[str, ...]) -> Array:
    return jax.lax.psum(array, over) if over else array


def _pieces(chunk: int, *arrays: Array) -> Any:
    """Splits B T ... into P B size ... for a scan, with about `chunk` tokens each, padded with zeros."""
    batch, length = arrays[0].shape[:2]
    count = max(1, -(-batch * length // chunk))
    size = -(-length // count)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    return tuple(map(cut, arrays))


def _piece(
    hidden: Array,
    targets: Array,
    weights: Array,
    head: Array,
    vocab: tuple[str, ...],
    soft_cap: float | None,
    z_loss: float,
) -> tuple[Array, Array, Array]:
    """Loss and likelihood summed over some tokens, and the gradient of the loss in the logits (before the cap).

    `head` is a shard of the vocabulary if mesh axes split it.
    """
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    highest = jax.lax.pmax(highest, vocab) if vocab else highest
    log_z = highest + jnp.log(_summed(jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True), vocab))
    first = jax.lax.axis_index(vocab) * head.shape[0] if vocab else 0
    chosen = first + jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    of_target = _summed(jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1, keepdims=True), vocab)
    nll = (log_z - of_target)[..., 0] * weights
    loss = nll + z_loss * jnp.square(log_z[..., 0]) * weights
    grad = jnp.exp(logits - log_z) * (1 + 2 * z_loss * log_z) - chosen.astype(jnp.float32)
    if soft_cap is not None:
        grad = grad * (1 - jnp.square(logits / soft_cap))
    return jnp.sum(loss), jnp.sum(nll), grad * weights[..., None]

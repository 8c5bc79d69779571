"""Where rows of tokens are, in the course of generation."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ...layers.mixers.mixer import Positions

STRIDE = 32
"""Tokens drawn at most before the host looks at them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where the rows are, beside what is in the caches."""

    lengths: Int[Array, " B"]
    """Tokens in the caches."""
    token: Int[Array, " B"]
    """The latest token, which is not in the caches yet."""
    drawn: Int[Array, " B"]
    """How many tokens have been drawn."""
    left: Int[Array, " B"]
    """How many more may be; 0: the row is done."""
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None
    """The tokens of each row, where there is a penalty on them."""
    history: Int[Array, "B S"] | None = None
    """The tokens of each row, where drafts are looked up in them."""
    valid_until: Int[Array, " B"] | None = None
    """The greatest length at which the caches of each row are valid, where a scaling of RoPE depends on the length; a
    row pauses when it gets there."""

    @property
    def active(self) -> Bool[Array, " B"]:
        """The rows that can take one more token."""
        active = self.left > 0
        return active if self.valid_until is None else active & (self.lengths < self.valid_until)

    @property
    def room(self) -> Int[Array, " B"]:
        """How many tokens each row can take; 0 or less: none."""
        return self.left if self.valid_until is None else jnp.minimum(self.left, self.valid_until - self.lengths)

    def push(self, token: Int[Array, " B"], ends: Int[Array, " E"], active: Bool[Array, " B"]) -> "State":
        """After one more drawn token of the rows that are active; one of `ends` ends its row."""
        left = jnp.where(jnp.any(token[:, None] == ends, axis=1), 0, self.left - 1)
        row = jnp.arange(token.shape[0], dtype=jnp.int32)
        seen = self.seen if self.seen is None else self.seen.at[row, token].max(active)
        history = self.history
        if history is not None:
            history = history.at[row, jnp.where(active, self.lengths, history.shape[1])].set(token, mode="drop")
        return replace(
            self,
            token=jnp.where(active, token, self.token),
            drawn=self.drawn + active.astype(jnp.int32),
            left=jnp.where(active, left, self.left),
            seen=seen,
            history=history,
        )


def positions_from(starts: Int[Array, " B"], counts: Int[Array, " B"], width: int) -> Positions:
    """Positions of the next `counts` tokens of each row, padded on the right with its last position."""
    index = jnp.arange(width, dtype=jnp.int32)
    positions = starts[:, None] + jnp.minimum(index, jnp.maximum(counts[:, None] - 1, 0))
    return Positions(index=positions, segments=(index < counts[:, None]).astype(jnp.int32))


def log_prob_of(logits: Float[Array, "... V"], token: Int[Array, "..."]) -> Float[Array, "..."]:
    """The logarithm of the probability of a token."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

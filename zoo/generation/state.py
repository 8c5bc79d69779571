"""State of the rows of a generation session."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ...layers.mixers.mixer import Positions

STRIDE = 32
"""Most tokens that are sampled before the host reads them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What is known of each row beside its caches."""

    lengths: Int[Array, " B"]
    """Number of tokens in the caches."""
    token: Int[Array, " B"]
    """Latest token, which is not in the caches yet."""
    sampled: Int[Array, " B"]
    """Number of tokens that were sampled."""
    left: Int[Array, " B"]
    """How many more can be sampled; 0: the row is done."""
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None
    """Which tokens are in each row, if there is a repetition penalty."""
    history: Int[Array, "B S"] | None = None
    """Tokens of each row, if draft tokens are looked up in them."""
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
        """The state with one more token in each active row; one of `ends` ends its row."""
        left = jnp.where(jnp.any(token[:, None] == ends, axis=1), 0, self.left - 1)
        row = jnp.arange(token.shape[0], dtype=jnp.int32)
        seen = self.seen if self.seen is None else self.seen.at[row, token].max(active)
        history = self.history
        if history is not None:
            history = history.at[row, jnp.where(active, self.lengths, history.shape[1])].set(token, mode="drop")
        return replace(
            self,
            token=jnp.where(active, token, self.token),
            sampled=self.sampled + active.astype(jnp.int32),
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
    """Log-probability of a token."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

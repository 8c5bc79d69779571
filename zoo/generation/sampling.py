"""How the next token is chosen: which filters, in which order, and the draw."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ...layers.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Sampling(Spec):
    """Settings of the draw; each default but the temperature's does nothing.

    They apply in this order, which is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. Each
    filter sees the probabilities that the one before it left, made to sum to 1 again.
    """

    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Only so many of the most likely tokens are drawn from, and those as likely as the last of them; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability (nucleus sampling, 1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the most likely one (2407.01082)."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens of the prompt and the text so far are divided by it, negative ones multiplied
    (CTRL, 1909.05858, section 4.1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = {
            "temperature": ("at least 0", 0 <= self.temperature < math.inf),
            "top_k": ("at least 0", self.top_k >= 0),
            "top_p": ("above 0 and at most 1", 0 < self.top_p <= 1),
            "min_p": ("at least 0 and at most 1", 0 <= self.min_p <= 1),
            "repetition_penalty": ("above 0", 0 < self.repetition_penalty < math.inf),
        }
        for name, (rule, holds) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {name}={getattr(self, name)}")

    def traced(self, vocab: int) -> "Filters":
        """These settings as arrays for a vocabulary of so many tokens.

        Programs depend only on which filters there are, and on top_k's next power of 2.
        """
        drawn = self.temperature > 0
        top_k = min(self.top_k, vocab) if drawn else 0
        if top_k:
            candidates = min(vocab, 2 ** math.ceil(math.log2(top_k)))
        else:
            candidates = vocab if drawn and self.top_p < 1 else 0
        return Filters(
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(top_k or vocab),
            top_p=jnp.float32(self.top_p),
            log_min_p=jnp.float32(math.log(self.min_p) if self.min_p else -jnp.inf),
            penalty=jnp.float32(self.repetition_penalty),
            drawn=drawn,
            candidates=candidates,
            penalised=self.repetition_penalty != 1,
        )


GREEDY = Sampling(temperature=0.0)
"""Always the most likely token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filters:
    """Settings of the draw inside jit."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    log_min_p: Float[Array, ""]
    penalty: Float[Array, ""]
    drawn: bool = field(metadata={"static": True})
    """False: greedy."""
    candidates: int = field(metadata={"static": True})
    """How many of the most likely tokens top-k and top-p look at; 0: there is neither."""
    penalised: bool = field(metadata={"static": True})

    def penalise(self, logits: Float[Array, "... V"], seen: Bool[Array, "... V"] | None) -> Float[Array, "... V"]:
        """Logits after the repetition penalty on the tokens that were `seen`."""
        if not self.penalised:
            return logits
        assert seen is not None
        lowered = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return jnp.where(seen, lowered, logits)

    def filter(self, logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
        """Logarithms of the weights that are drawn from, -inf where a token is out; at temperature 0 one is left."""
        if not self.drawn:
            best = jnp.argmax(logits, axis=-1, keepdims=True)
            return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
        logits = logits / self.temperature
        highest = jnp.max(logits, axis=-1, keepdims=True)
        least = highest + self.log_min_p
        if self.candidates:
            best = jax.lax.top_k(logits, self.candidates)[0]
            last = jnp.broadcast_to(jnp.minimum(self.top_k, self.candidates) - 1, (*best.shape[:-1], 1))
            kth = jnp.take_along_axis(best, last, axis=-1)
            shares = jax.nn.softmax(jnp.where(best < kth, -jnp.inf, best), axis=-1)
            # A token is in where those before it do not reach top_p; so the most likely one always is.
            inside = (jnp.cumsum(shares, axis=-1) - shares < self.top_p) & (best >= kth)
            nucleus = jnp.min(jnp.where(inside, best, jnp.inf), axis=-1, keepdims=True)
            least = jnp.maximum(least, nucleus)
        return jnp.where(logits < least, -jnp.inf, logits)

    def choose(
        self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, keys: Key[Array, " B"]
    ) -> Int[Array, " B"]:
        """The next token of each row: penalty, filters and draw."""
        logits = self.penalise(logits, seen)
        return self.draw(self.filter(logits) if self.drawn else logits, keys)

    def draw(self, weights: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        """One token a row, by weights that `filter` left, each row with its own key."""
        if not self.drawn:
            return jnp.argmax(weights, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, weights).astype(jnp.int32)


def row_keys(keys: Key[Array, " B"], index: Int[Array, " B"], salt: int = 0) -> Key[Array, " B"]:
    """The key of each row's draw number `index`; draws for different purposes take different salts."""

    def one(key: Any, index: Any) -> Any:
        key = jax.random.fold_in(key, index)
        return jax.random.fold_in(key, salt) if salt else key

    return jax.vmap(one)(keys, index)

"""Sampling: which tokens can come next, and the choice of one of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ...layers.spec import FRACTION, NON_NEGATIVE, Range, Spec, check_ranges, ranged

LEAST_TEMPERATURE = 1e-5
"""Below it, sampling is greedy, as in vLLM: quotients of logits would not be finite, or only differ by rounding."""
FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True, kw_only=True)
class Sampling(Spec):
    """Sampling parameters. Each default except that of the temperature has no effect.

    They apply in this order, as in transformers: repetition penalty, temperature, top-k, top-p, min-p. Each filter
    renormalizes the probabilities that the one before it left.

    Raises ValueError if a value is out of its range, NaN or infinite.
    """

    temperature: float = ranged(0.8, NON_NEGATIVE)
    """Divides the logits. Below 1e-5 sampling is greedy: it takes the most likely token, and the first one of a tie."""
    top_k: int = ranged(0, NON_NEGATIVE)
    """Keeps only the N most likely tokens, and those as likely as the last of them; 0 keeps all."""
    top_p: float = ranged(1.0, Range(0, 1, above=True))
    """Keeps only the most likely tokens whose probabilities add up to this value, and those as likely as the last of
    them (nucleus sampling, 1904.09751)."""
    min_p: float = ranged(0.0, FRACTION)
    """Keeps only tokens at least this many times as likely as the most likely one (2407.01082)."""
    repetition_penalty: float = ranged(1.0, Range(0, above=True))
    """Divides positive logits, and multiplies negative ones, of tokens of the prompt and the text so far
    (CTRL, 1909.05858, section 4.1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self)

    def traced(self, vocab: int) -> "Filters":
        """These parameters as arrays, for a vocabulary of this size.

        Compiled programs depend only on which filters have an effect, and on top_k rounded up to a power of 2.
        """
        sampled = self.temperature >= LEAST_TEMPERATURE
        top_k = int(min(self.top_k, vocab)) if sampled else 0
        if top_k:
            candidates = min(vocab, 2 ** math.ceil(math.log2(top_k)))
        else:
            candidates = vocab if sampled and self.top_p < 1 else 0
        return Filters(
            temperature=_float32(self.temperature),
            top_k=jnp.int32(top_k or vocab),
            top_p=_float32(self.top_p),
            log_min_p=jnp.float32(math.log(self.min_p) if self.min_p else -jnp.inf),
            penalty=_float32(self.repetition_penalty),
            sampled=sampled,
            candidates=candidates,
            penalised=self.repetition_penalty != 1,
        )


def recommended_sampling(settings: Mapping[str, float], origin: str) -> Sampling:
    """The sampling parameters that a checkpoint recommends. Errors begin with `origin`, where they are written."""
    try:
        return Sampling().replace(**settings)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _float32(value: float) -> Float[Array, ""]:
    """A number of at least 0 in float32, within the range where it and its reciprocal are normal numbers.

    XLA takes subnormal numbers for 0, and divides by multiplying with the reciprocal.
    """
    return jnp.float32(min(max(value, float(FLOAT32.tiny)), 1e37))


GREEDY = Sampling(temperature=0.0)
"""Takes the most likely token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filters:
    """Sampling parameters inside jit."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    log_min_p: Float[Array, ""]
    penalty: Float[Array, ""]
    sampled: bool = field(metadata={"static": True})
    """False: greedy."""
    candidates: int = field(metadata={"static": True})
    """Number of most likely tokens that top-k and top-p look at; 0: neither is used."""
    penalised: bool = field(metadata={"static": True})

    def penalise(self, logits: Float[Array, "... V"], seen: Bool[Array, "... V"] | None) -> Float[Array, "... V"]:
        """Logits after the repetition penalty on the `seen` tokens. Finite logits stay finite."""
        if not self.penalised:
            return logits
        assert seen is not None
        lowered = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
        lowered = jnp.clip(lowered, float(FLOAT32.min), float(FLOAT32.max))
        return jnp.where(seen, lowered, logits)

    def filter(self, logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
        """Unnormalized log-probabilities to sample from, -inf for tokens that are filtered out.

        The greatest is 0. Greedy sampling leaves a single token.
        """
        if not self.sampled:
            best = jnp.argmax(logits, axis=-1, keepdims=True)
            return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
        # The greatest logit becomes 0 first: no quotient overflows to infinity, and none to NaN.
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        least = self.log_min_p
        if self.candidates:
            best = jax.lax.top_k(logits, self.candidates)[0]
            last = jnp.broadcast_to(jnp.minimum(self.top_k, self.candidates) - 1, (*best.shape[:-1], 1))
            kth = jnp.take_along_axis(best, last, axis=-1)
            probabilities = jax.nn.softmax(jnp.where(best < kth, -jnp.inf, best), axis=-1)
            # A token is kept if those before it do not reach top_p, so the most likely one always is.
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            inside = (before < self.top_p) & (best >= kth)
            nucleus = jnp.min(jnp.where(inside, best, jnp.inf), axis=-1, keepdims=True)
            least = jnp.maximum(least, nucleus)
        return jnp.where(logits < least, -jnp.inf, logits)

    def choose(
        self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, keys: Key[Array, " B"]
    ) -> Int[Array, " B"]:
        """The next token of each row: repetition penalty, filters, sampling."""
        logits = self.penalise(logits, seen)
        return self.sample(self.filter(logits) if self.sampled else logits, keys)

    def sample(self, log_weights: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        """One token for each row, from the unnormalized log-probabilities of `filter`, with a key for each row."""
        if not self.sampled:
            return jnp.argmax(log_weights, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, log_weights).astype(jnp.int32)


def row_keys(keys: Key[Array, " B"], index: Int[Array, " B"], salt: int = 0) -> Key[Array, " B"]:
    """The key of each row for its token number `index`; uses for different purposes take different salts.

    A row's keys do not depend on the other rows of the batch.
    """

    def fold(key: Any, index: Any) -> Any:
        key = jax.random.fold_in(key, index)
        return jax.random.fold_in(key, salt) if salt else key

    return jax.vmap(fold)(keys, index)

"""Likelihoods of text under a model: log-probabilities of token windows, perplexity and bits per byte of documents."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from ...layers.sharding.collectives import replicate
from ..decoder import DecoderModel
from ..formats.tokenizer_file import prepare_tokenizer
from ..generation.session import check_vocabulary, rounded
from ..generation.state import positions_from
from ..parameters import FlatModel
from ..text_encoding import encode
from .windows import Window, adds_prefix, split_into_windows

LOGITS_BYTES = 2**26
"""Size of the logits that exist at a time."""


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds the scored tokens of a window."""

    log_prob: float
    """Sum of their log-probabilities, in nats."""
    greedy: bool
    """Whether each of them is the most likely token."""


@dataclass
class Score:
    """Totals over documents."""

    nll: float = 0.0
    """Negative log-likelihood, in nats."""
    tokens: int = 0
    bytes: int = 0
    """Size of the text in UTF-8."""
    documents: int = 0
    changed: int = 0
    """Documents that differ after encoding and decoding: some of their bytes were never predicted."""

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood of a token."""
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits, divided by bytes. Comparable between models with different tokenizers."""
        return self.nll / math.log(2) / self.bytes

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.documents + other.documents,
            self.changed + other.changed,
        )

    def to_dict(self) -> dict[str, float]:
        """All totals, perplexity and bits per byte, as JSON data."""
        return vars(self) | {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


class Scorer:
    """Computes likelihoods of text under a model.

    Args:
        model: the decoder.
        length: tokens that the model reads at once, at most.
        batch: windows in a batch.
        dtype: dtype of the computation.

    Raises ValueError if length is below 1 or above the number of positions of the model, or batch is below 1.
    """

    def __init__(self, model: DecoderModel, *, length: int = 1024, batch: int = 4, dtype: DTypeLike = jnp.float32):
        limit = model.spec.max_positions
        if length < 1 or batch < 1 or (limit and length > limit):
            raise ValueError(
                f"scoring needs a length of at least 1{f' and at most {limit}' if limit else ''} and a batch of at "
                f"least 1, got length={length}, batch={batch}"
            )
        self.length, self.batch, self.dtype = length, batch, dtype
        self._flat, self._vocab = FlatModel.of(model), model.spec.vocab

    def likelihoods(self, windows: Sequence[Window], progress: Callable[[int], None] | None = None) -> list[Likelihood]:
        """The likelihood of each window. Windows of similar length share a batch.

        `progress` is called after each batch with the number of its windows.

        Raises ValueError if a window has more than `length + 1` tokens, no token before the first scored one, or a
        token outside the vocabulary of the model.
        """
        for window in windows:
            if not 0 < window.scored < len(window.ids) <= self.length + 1:
                raise ValueError(
                    f"a window has at least one token before its scored ones and at most {self.length + 1} in all, "
                    f"got {len(window.ids)} tokens of which {window.scored} are scored"
                )
        check_vocabulary([window.ids for window in windows], self._vocab)
        results: dict[int, Likelihood] = {}
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
        for first in range(0, len(windows), self.batch):
            indices = order[first : first + self.batch]
            batch = self._batch([windows[i] for i in indices])
            results.update(zip(indices, batch, strict=True))
            if progress is not None:
                progress(len(indices))
        return [results[i] for i in range(len(windows))]

    def text(
        self,
        tokenizer: Tokenizer,
        documents: Iterable[str],
        *,
        start: int,
        stride: int | None = None,
        special_tokens: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Score:
        """The score of documents, of each on its own, in windows of `length` tokens that move by `stride` tokens.

        The first window of a document starts with the token `start`, which is not scored. If the tokenizer puts this
        token before every text by itself, as it does with BOS, every window starts with it. A document that holds the
        token itself at its start gets no second one.

        Args:
            tokenizer: tokenizer of the model.
            documents: texts.
            start: BOS, or EOS for a tokenizer that has no BOS.
            stride: from 1 to `length`; by default half of `length`.
            special_tokens: read text that spells a special token as that token; else it is plain text.
            progress: called after each document with its size in bytes.

        Raises ValueError if the stride is outside these bounds or there is no token to score.
        """
        tokenizer = prepare_tokenizer(tokenizer)
        stride = max(1, self.length // 2) if stride is None else stride
        if not 1 <= stride <= self.length:
            raise ValueError(f"stride must be at least 1 and at most the length of {self.length}, got {stride}")
        split = partial(
            split_into_windows,
            prefix=start,
            length=self.length,
            stride=stride,
            prefix_everywhere=adds_prefix(tokenizer, start),
        )
        total, waiting = Score(), []
        for document in documents:
            ids = encode(tokenizer, document, special_tokens=special_tokens)
            size = len(document.encode())
            total.documents += 1
            total.bytes += size
            total.changed += tokenizer.decode(ids, skip_special_tokens=False) != document
            scored = ids[1:] if special_tokens and ids[:1] == [start] else ids
            total.tokens += len(scored)
            waiting += split(scored)
            if len(waiting) >= 16 * self.batch:
                ready = len(waiting) // self.batch * self.batch
                total.nll -= sum(likelihood.log_prob for likelihood in self.likelihoods(waiting[:ready]))
                waiting = waiting[ready:]
            if progress is not None:
                progress(size)
        total.nll -= sum(likelihood.log_prob for likelihood in self.likelihoods(waiting))
        if not total.tokens:
            raise ValueError(f"there is no text to score in {total.documents} documents")
        return total

    def _batch(self, windows: Sequence[Window]) -> list[Likelihood]:
        width = min(rounded(max(len(window.ids) for window in windows) - 1), self.length)
        tokens, targets = np.zeros((2, self.batch, width), np.int32)
        scored = np.zeros((self.batch, width), bool)
        counts = np.zeros(self.batch, np.int32)
        for row, window in enumerate(windows):
            count = len(window.ids) - 1
            tokens[row, :count], targets[row, :count] = window.ids[:-1], window.ids[1:]
            scored[row, count - window.scored : count] = True
            counts[row] = count
        with self._flat.on_mesh():
            sums, greedy = map(np.asarray, _likelihoods(self._flat, tokens, targets, scored, counts, self.dtype))
        return [Likelihood(float(sums[row]), bool(greedy[row])) for row in range(len(windows))]


@partial(jax.jit, static_argnums=5)
def _likelihoods(
    flat: FlatModel,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    scored: Bool[Array, "B T"],
    counts: Int[Array, " B"],
    dtype: DTypeLike,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """For each row the sum of the scored targets' log-probabilities, and whether each target is the most likely token.

    Computes the logits of a few positions at a time, within LOGITS_BYTES.
    """
    batch, length = tokens.shape
    model: DecoderModel = flat.model
    hidden, _, _ = model.hidden(tokens, positions_from(counts * 0, counts, length), dtype=dtype)
    size = min(length, max(1, LOGITS_BYTES // (4 * batch * model.spec.vocab)))
    padding = -length % size

    def chunks(x: Array) -> Array:
        x = jnp.pad(replicate(x), ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    def chunk_likelihoods(inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, targets, scored = inputs
        logits = replicate(model.logits(hidden))
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_probs = target_logits - jax.nn.logsumexp(logits, axis=-1)
        is_best = jnp.argmax(logits, axis=-1) == targets
        return jnp.sum(jnp.where(scored, log_probs, 0.0), axis=1), jnp.all(is_best | ~scored, axis=1)

    sums, greedy = jax.lax.map(chunk_likelihoods, (chunks(hidden), chunks(targets), chunks(scored)))
    return jnp.sum(sums, axis=0), jnp.all(greedy, axis=0)

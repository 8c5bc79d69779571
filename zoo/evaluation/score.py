"""How likely a model finds text: perplexity and bits per byte of documents, and likelihoods of continuations."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from ...layers.sharding.axes import whole
from ..decoder import DecoderModel
from ..generation.session import check_vocabulary, rounded
from ..generation.state import positions_from
from ..parameters import FlatModel

LOGITS_BYTES = 2**26
"""Of the logits that exist at a time."""


@dataclass(frozen=True)
class Row:
    """Tokens of which some are scored."""

    ids: tuple[int, ...]
    scored: int
    """So many of the last ones, each given all before it."""


@dataclass(frozen=True)
class Likelihood:
    """Of the tokens that were scored."""

    log_prob: float
    """The sum of their log-probabilities, in nats."""
    greedy: bool
    """Whether each was the most likely one."""


@dataclass
class Score:
    """Of a text, summed up."""

    nll: float = 0.0
    """Negative log-likelihood, in nats."""
    tokens: int = 0
    bytes: int = 0
    """Of the text in UTF-8."""
    documents: int = 0
    changed: int = 0
    """Documents that the tokenizer does not give back as they were: of these, some bytes were never predicted."""

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood of a token."""
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits over bytes: it compares models whatever their tokenizers."""
        return self.nll / math.log(2) / self.bytes

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.documents + other.documents,
            self.changed + other.changed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        return vars(self) | {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


class Scorer:
    """A model that scores rows of tokens.

    Args:
        model: the decoder.
        length: tokens a row has at most; what is longer goes in windows, or is cut on the left.
        batch: rows at a time.
        dtype: what the model computes in.

    Raises ValueError where length is below 2 or more than the model has positions for.
    """

    def __init__(self, model: DecoderModel, *, length: int = 1024, batch: int = 4, dtype: Any = jnp.float32):
        limit = model.spec.max_positions
        if length < 2 or batch < 1 or (limit and length > limit):
            raise ValueError(
                f"scoring needs a length of 2 or more{f' and at most {limit}' if limit else ''} and a batch of at "
                f"least 1, got length={length}, batch={batch}"
            )
        self.length, self.batch, self.dtype = length, batch, dtype
        self._flat, self._vocab = FlatModel.of(model), model.spec.vocab

    def rows(self, rows: Sequence[Row], progress: Callable[[int], None] | None = None) -> list[Likelihood]:
        """The likelihood of each row; rows of similar length go together. `progress` is told how many more are done.

        Raises ValueError where a row is longer than `length`, has no token before the first that is scored, or has one
        that is not of the model's vocabulary.
        """
        for row in rows:
            if not 0 < row.scored < len(row.ids) <= self.length:
                raise ValueError(
                    f"a row has at least one token before those that are scored and {self.length} in all at most, "
                    f"got {len(row.ids)} of which {row.scored} are scored"
                )
        check_vocabulary([row.ids for row in rows], self._vocab)
        found: dict[int, Likelihood] = {}
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
        for first in range(0, len(rows), self.batch):
            chosen = order[first : first + self.batch]
            width = min(rounded(max(len(rows[i].ids) for i in chosen) - 1), self.length - 1)
            tokens, targets = np.zeros((2, self.batch, width), np.int32)
            scored = np.zeros((self.batch, width), bool)
            counts = np.zeros(self.batch, np.int32)
            for line, i in enumerate(chosen):
                ids, count = rows[i].ids, len(rows[i].ids) - 1
                tokens[line, :count], targets[line, :count] = ids[:-1], ids[1:]
                scored[line, count - rows[i].scored : count] = True
                counts[line] = count
            with self._flat.on_mesh():
                sums, greedy = map(np.asarray, _likelihoods(self._flat, tokens, targets, scored, counts, self.dtype))
            for line, i in enumerate(chosen):
                found[i] = Likelihood(float(sums[line]), bool(greedy[line]))
            if progress is not None:
                progress(len(chosen))
        return [found[i] for i in range(len(rows))]

    def windows(self, ids: Sequence[int], stride: int) -> Iterator[Row]:
        """A document as rows: every token but the first is scored once, given `length - stride` tokens or more before
        it, where there are so many.
        """
        done = 1
        while done < len(ids):
            end = min(len(ids), self.length if done == 1 else done + stride)
            yield Row(tuple(ids[max(0, end - self.length) : end]), end - done)
            done = end

    def text(
        self,
        tokenizer: Tokenizer,
        documents: Iterable[str],
        *,
        start: int,
        stride: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Score:
        """The score of documents, each by itself, in windows that move by `stride` tokens (half of `length`).

        Each document begins after the token `start`, which is not scored. `progress` is told how many bytes are done.

        Raises ValueError where the stride does not fit, or there is no text.
        """
        stride = self.length // 2 if stride is None else stride
        if not 1 <= stride < self.length:
            raise ValueError(f"stride must be at least 1 and below the length of {self.length}, got {stride}")
        total, waiting = Score(), []
        for document in documents:
            ids = tokenizer.encode(document, add_special_tokens=False).ids
            size = len(document.encode())
            total.documents += 1
            total.bytes += size
            total.changed += tokenizer.decode(ids, skip_special_tokens=False) != document
            total.tokens += len(ids)
            waiting += self.windows([start, *ids], stride)
            if len(waiting) >= 16 * self.batch:
                ready = len(waiting) // self.batch * self.batch
                total.nll -= sum(found.log_prob for found in self.rows(waiting[:ready]))
                waiting = waiting[ready:]
            if progress is not None:
                progress(size)
        total.nll -= sum(found.log_prob for found in self.rows(waiting))
        if not total.tokens:
            raise ValueError(f"there is no text to score in {total.documents} documents")
        return total


@partial(jax.jit, static_argnums=5)
def _likelihoods(
    flat: FlatModel,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    scored: Bool[Array, "B T"],
    counts: Int[Array, " B"],
    dtype: Any,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """For each row the sum of log-probabilities of the targets that are scored, and whether all were the most likely.

    Logits exist for some positions at a time.
    """
    batch, length = tokens.shape
    model: DecoderModel = flat.model
    hidden, _ = model.hidden(tokens, positions_from(counts * 0, counts, length), dtype=dtype)
    size = min(length, max(1, LOGITS_BYTES // (4 * batch * model.spec.vocab)))
    missing = -length % size

    def cut(x: Array) -> Array:
        x = jnp.pad(whole(x), ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    def part(inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, targets, scored = inputs
        logits = whole(model.logits(hidden))
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        logs = chosen - jax.nn.logsumexp(logits, axis=-1)
        best = jnp.argmax(logits, axis=-1) == targets
        return jnp.sum(jnp.where(scored, logs, 0.0), axis=1), jnp.all(best | ~scored, axis=1)

    sums, greedy = jax.lax.map(part, (cut(hidden), cut(targets), cut(scored)))
    return jnp.sum(sums, axis=0), jnp.all(greedy, axis=0)

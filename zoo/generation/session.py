"""Generation sessions: rows of tokens, their KV caches, and two compiled programs.

`_prefill` reads a chunk of each row into the caches. `advance` samples tokens one after another in a loop, until all
rows are done or a limit is reached. Sizes are rounded up, so that prompts of similar length share a program.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ...layers.mixers.mixer import Cache
from ...layers.positions.scaling import EVERY_LENGTH
from ...layers.sharding.collectives import replicate
from ..decoder import Caches, Decoder, DecoderModel, refuse_64_bits
from ..parameters import FlatModel
from .compiling import compiled_for
from .sampling import Filters, Sampling, row_keys
from .speculative import Speculation
from .speculative import advance as advance_speculatively
from .state import STRIDE, State, log_prob_of, positions_from

CHUNK = 512
"""Most tokens of a prompt that are read in one call, which bounds the memory that a long prompt takes."""


@dataclass
class Speed:
    """Time to the first token, and rate of the tokens after it."""

    first_token_seconds: float = 0.0
    """From the prompt to the first token."""
    tokens: int = 0
    """Number of tokens after the first of each row."""
    seconds: float = 0.0
    """Time that these took."""

    @property
    def tokens_per_second(self) -> float:
        """Rate of all rows together, after the first tokens."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return f"{self.tokens_per_second:.1f} tokens/s, first token after {self.first_token_seconds:.2f} s"


@dataclass
class NewTokens:
    """Tokens of one row from one call, and their log-probabilities."""

    ids: list[int]
    log_probs: list[float]


def check_vocabulary(rows: Sequence[Sequence[int]], vocab: int) -> None:
    """Raises ValueError if a token is not in the vocabulary; JAX would use the embedding of another token."""
    most = max((max(row) for row in rows if row), default=0)
    if most >= vocab:
        raise ValueError(f"the text has the token {most}, and the model's vocabulary has {vocab} tokens")


def equal_lengths(specs: Sequence[Decoder], length: int) -> range:
    """The range of text lengths at which caches of these models are valid that are valid at `length`."""
    ranges = [block.mixer.equal_lengths(length) for spec in specs for block in spec.all_blocks]
    return range(max(lengths.start for lengths in ranges), min(lengths.stop for lengths in ranges))


def _each_cache(caches: Any) -> list[Cache]:
    leaves = jax.tree.leaves(caches, is_leaf=lambda x: isinstance(x, Cache))
    return [cache for cache in leaves if isinstance(cache, Cache)]


def rounded(count: int, least: int = 32) -> int:
    """The next of 32, 48, 64, 96, 128, ...: few sizes to compile for, each less than 1.5 times the one before."""
    size = least
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class Session:
    """Rows of tokens with KV caches that are read and continued, on the devices of the model.

    Args:
        model: the decoder.
        batch: number of rows.
        length: most tokens of a row.
        sampling: sampling parameters.
        key: random key; each row derives its own from it.
        ends: tokens that end a row.
        log_probs: return the log-probability of each token under the model, before any filter.
        dtype: dtype of the computation.
        cache_dtype: dtype of the caches; int8 quantizes them; by default `dtype`.
        speculation: settings of speculative decoding; None: none, unless there is a draft model.
        draft: draft model of speculative decoding.

    Raises ValueError if the draft model has another vocabulary, or a cache can't discard the rejected draft tokens.
    """

    def __init__(
        self,
        model: DecoderModel,
        *,
        batch: int,
        length: int,
        sampling: Sampling,
        key: Key[Array, ""],
        ends: Sequence[int] = (),
        log_probs: bool = False,
        dtype: DTypeLike = jnp.float32,
        cache_dtype: DTypeLike | None = None,
        speculation: Speculation | None = None,
        draft: DecoderModel | None = None,
    ):
        refuse_64_bits()
        if draft is not None and draft.spec.vocab != model.spec.vocab:
            raise ValueError(
                f"a draft model must have the model's vocabulary, got {draft.spec.vocab} and {model.spec.vocab}"
            )
        self.model, self.batch, self.dtype, self.log_probs = model, batch, dtype, log_probs
        self.speculation, self.draft = (
            Speculation() if draft is not None and speculation is None else speculation,
            draft,
        )
        self.room = rounded(length)
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        """Tokens of each row: those in the caches, and the latest one."""
        self.speed = Speed()
        self._specs = [model.spec] if draft is None else [model.spec, draft.spec]
        self._valid = [EVERY_LENGTH] * batch
        """The text lengths at which the caches of each row are valid."""
        self._depends_on_length = equal_lengths(self._specs, 1) != EVERY_LENGTH
        vocab = model.spec.vocab
        self._flat = FlatModel.of(model)
        self._flat_draft = None if draft is None else FlatModel.of(draft)
        with self._flat.on_mesh():
            self.filters = sampling.traced(vocab)
            self.end_ids = jnp.asarray([*ends, -1], jnp.int32)
            kept = dtype if cache_dtype is None else cache_dtype
            self.caches: Any = empty_caches(model.spec, batch, self.room, kept)
            self.draft_caches: Any = None if draft is None else empty_caches(draft.spec, batch, self.room, kept)
            self.max_rewind = min(cache.max_rewind for cache in _each_cache((self.caches, self.draft_caches)))
            """How many of the latest tokens of a row can be discarded."""
            if self.speculation is not None and self.speculation.tokens > self.max_rewind:
                raise ValueError(
                    f"speculative decoding discards up to `tokens` rejected draft tokens, and the caches of this model "
                    f"can discard {self.max_rewind}, got Speculation(tokens={self.speculation.tokens}); use fewer "
                    "tokens, or no speculation if it is 0"
                )
            looks_up = speculation is not None and draft is None
            self.state = start(key, batch, vocab if self.filters.penalised else None, self.room if looks_up else None)
            self._keep_valid([None] * batch)

    def read(self, rows: Sequence[Sequence[int]], max_tokens: int) -> list[NewTokens]:
        """Reads more tokens of every row, at least one, and samples the first of up to `max_tokens` new ones.

        Raises ValueError where a token is not of the model's vocabulary.
        """
        check_vocabulary(rows, self.model.spec.vocab)
        began = time.perf_counter()
        cached = [ids[:length] for ids, length in zip(self.ids, np.asarray(self.state.lengths), strict=True)]
        texts = [[*before, *row] for before, row in zip(cached, rows, strict=True)]
        starts = [
            len(before) if len(text) in valid else 0
            for before, text, valid in zip(cached, texts, self._valid, strict=True)
        ]
        with self._flat.on_mesh():
            logits = self._prefill(texts, starts, [len(text) for text in texts])
            self.state = replace(self.state, left=jnp.full(self.batch, max_tokens, jnp.int32))
            self.state, token, log_prob = _first(self.state, logits, self.filters, self.end_ids)
        for ids, row in zip(self.ids, rows, strict=True):
            ids.extend(row)
        new = self._take(np.asarray(token)[:, None], np.asarray(log_prob)[:, None], np.ones(self.batch, np.int32))
        self.speed.first_token_seconds = time.perf_counter() - began
        return new

    def _prefill(self, texts: Sequence[Sequence[int]], starts: Sequence[int], lengths: Sequence[int]) -> Array:
        """Reads each row's text from a position on, and returns the logits after its last token.

        `lengths` are those of the texts that the caches are for, which may have tokens that are not read yet. A row
        whose start is its text's length reads nothing.
        """
        counts = np.array([len(text) - start for text, start in zip(texts, starts, strict=True)], np.int32)
        logits: Any = replicate(jnp.zeros((self.batch, self.model.spec.vocab)))
        for first in range(0, int(counts.max()), CHUNK):
            chunk = np.clip(counts - first, 0, CHUNK)
            begins = np.array(starts, np.int32) + first
            tokens = np.zeros((self.batch, rounded(int(chunk.max()))), np.int32)
            for line, text, begin, count in zip(tokens, texts, begins, chunk, strict=True):
                line[:count] = text[begin : begin + count]
            inputs = self.state, tokens, chunk, begins, np.array(lengths, np.int32), logits
            logits, self.caches, self.state = _prefill(self._flat, self.caches, *inputs, dtype=self.dtype)
            if self._flat_draft is not None:
                _, self.draft_caches, _ = _prefill(self._flat_draft, self.draft_caches, *inputs, dtype=self.dtype)
        self._keep_valid([length if count else None for length, count in zip(lengths, counts.tolist(), strict=True)])
        return logits

    def _keep_valid(self, lengths: Sequence[int | None]) -> None:
        """Records that caches of rows are valid at new lengths; None: as before."""
        if self._depends_on_length:
            self._valid = [
                valid if length is None else equal_lengths(self._specs, length)
                for valid, length in zip(self._valid, lengths, strict=True)
            ]
            last = np.array([valid.stop - 1 for valid in self._valid], np.int32)
            self.state = replace(self.state, valid_until=jnp.asarray(last))

    def _reread(self) -> None:
        """Reads the texts again whose next token changes the frequencies of RoPE for all of their tokens."""
        cached = np.asarray(self.state.lengths).tolist()
        texts = [ids[:length] for ids, length in zip(self.ids, cached, strict=True)]
        rows = zip(self.active, cached, self._valid, strict=True)
        starts = [0 if active and length + 1 not in valid else length for active, length, valid in rows]
        self._prefill(texts, starts, [length + 1 for length in cached])

    def rewind(self, ids: Sequence[int]) -> int:
        """Discards the tokens of the only row from where they differ from `ids`; returns how many are left.

        At least one token of `ids` is left to read. All are discarded if the caches can't rewind far enough.
        """
        assert self.batch == 1, self.batch
        self.speed = Speed()
        (own,), (held,) = self.ids, np.asarray(self.state.lengths).tolist()
        shared = 0
        while shared < min(held, len(own), len(ids) - 1) and own[shared] == ids[shared]:
            shared += 1
        # Rejected draft tokens are written, too: they have replaced as many more in a ring.
        discarded = held - shared + (self.speculation.tokens if self.speculation else 0)
        if len(ids) not in self._valid[0] or discarded > self.max_rewind:
            shared = 0
        self.ids = [list(ids[:shared])]
        with self._flat.on_mesh():
            seen = self.state.seen
            if seen is not None:
                seen = (seen & False).at[0, jnp.asarray(ids[:shared], jnp.int32)].set(True)
            self.state = replace(self.state, lengths=self.state.lengths * 0 + shared, seen=seen)
        return shared

    def advance(self, limit: int = STRIDE) -> list[NewTokens]:
        """Samples up to `limit` more tokens of each row that is not done."""
        began = time.perf_counter()
        with self._flat.on_mesh():
            if self._depends_on_length:
                self._reread()
            rest = self.state, self.filters, self.end_ids, jnp.int32(min(limit, STRIDE))
            if self.speculation is None:
                self.caches, self.state, *out = advance(self._flat.platform)(
                    self._flat, self.caches, *rest, log_probs=self.log_probs, dtype=self.dtype
                )
            else:
                self.caches, self.draft_caches, self.state, *out = advance_speculatively(self._flat.platform)(
                    self._flat,
                    self._flat_draft,
                    self.caches,
                    self.draft_caches,
                    *rest,
                    speculation=self.speculation,
                    dtype=self.dtype,
                )
        new = self._take(*map(np.asarray, out))
        self.speed.tokens += sum(len(row.ids) for row in new)
        self.speed.seconds += time.perf_counter() - began
        return new

    @property
    def active(self) -> list[bool]:
        """Which rows are not done."""
        return (np.asarray(self.state.left) > 0).tolist()

    def end(self, row: int) -> None:
        """Ends a row: no more tokens are sampled."""
        with self._flat.on_mesh():
            self.state = replace(self.state, left=self.state.left.at[row].set(0))

    def _take(self, tokens: np.ndarray, log_probs: np.ndarray, counts: np.ndarray) -> list[NewTokens]:
        new = [
            NewTokens(row[:count].tolist(), probs[:count].tolist())
            for row, probs, count in zip(tokens, log_probs, counts, strict=True)
        ]
        for ids, row in zip(self.ids, new, strict=True):
            ids.extend(row.ids)
        return new


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_caches(spec: Decoder, batch: int, length: int, dtype: DTypeLike) -> Caches:
    """Empty caches for a batch of rows of up to `length` tokens."""
    return spec.cache(batch, length, dtype)


@partial(jax.jit, static_argnums=(1, 2, 3))
def start(key: Key[Array, ""], batch: int, penalised: int | None, looked_up: int | None) -> State:
    """Rows without tokens.

    `penalised` is the size of the vocabulary if there is a repetition penalty; `looked_up` is the length of the rows if
    draft tokens are looked up in them.
    """
    zeros = jnp.zeros(batch, jnp.int32)
    return State(
        lengths=zeros,
        token=zeros,
        sampled=zeros,
        left=zeros,
        keys=jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch)),
        seen=None if penalised is None else jnp.zeros((batch, penalised), bool),
        history=None if looked_up is None else jnp.zeros((batch, looked_up), jnp.int32),
    )


@partial(jax.jit, static_argnames="dtype", donate_argnames="caches")
def _prefill(
    flat: FlatModel,
    caches: Caches,
    state: State,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    logits: Float[Array, "B V"],
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B V"], Caches, State]:
    """Reads right-padded chunks of rows, whose texts have `lengths`.

    Returns the logits after the last token of each row that has one in this chunk, the caches and the state.
    """
    model: DecoderModel = flat.model
    some = counts > 0
    positions = positions_from(jnp.where(some, starts, state.lengths), counts, tokens.shape[1])
    positions = replace(positions, lengths=jnp.broadcast_to(lengths[:, None], tokens.shape))
    real = positions.segments > 0
    hidden, after, _ = model.hidden(tokens, positions, caches, dtype=dtype)
    assert after is not None
    last = jnp.take_along_axis(replicate(hidden), jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    logits = jnp.where(some[:, None], replicate(model.logits(last)[:, 0]), logits)
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    seen, history = state.seen, state.history
    if seen is not None:
        seen = seen.at[row, tokens].max(real)
    if history is not None:
        history = history.at[row, jnp.where(real, positions.index, history.shape[1])].set(tokens, mode="drop")
    read = jnp.where(some, starts + counts, state.lengths)
    return logits, after, replace(state, lengths=read, seen=seen, history=history)


@jax.jit
def _first(
    state: State, logits: Float[Array, "B V"], filters: Filters, ends: Int[Array, " E"]
) -> tuple[State, Int[Array, " B"], Float[Array, " B"]]:
    token = filters.choose(logits, state.seen, row_keys(state.keys, state.sampled))
    return state.push(token, ends, state.left > 0), token, log_prob_of(logits, token)


@compiled_for(static_argnames=("log_probs", "dtype"), donate_argnames="caches")
def advance(
    flat: FlatModel,
    caches: Caches,
    state: State,
    filters: Filters,
    ends: Int[Array, " E"],
    limit: Int[Array, ""],
    *,
    log_probs: bool,
    dtype: DTypeLike,
) -> tuple[Caches, State, Int[Array, "B C"], Float[Array, "B C"], Int[Array, " B"]]:
    """Samples up to `limit` tokens of each row that is not done.

    Returns caches, state, tokens, log-probabilities, and the number of tokens of each row.
    """
    batch = state.token.shape[0]
    model: DecoderModel = flat.model

    def step(carry: Any) -> Any:
        step, caches, state, tokens, logs, counts = carry
        active = state.active
        positions = positions_from(state.lengths, active.astype(jnp.int32), 1)
        logits, caches = model(state.token[:, None], positions, caches, dtype=dtype)
        logits = replicate(logits[:, 0])
        state = replace(state, lengths=state.lengths + active.astype(jnp.int32))
        token = filters.choose(logits, state.seen, row_keys(state.keys, state.sampled))
        tokens = tokens.at[:, step].set(token)
        logs = logs.at[:, step].set(log_prob_of(logits, token)) if log_probs else logs
        return step + 1, caches, state.push(token, ends, active), tokens, logs, counts + active.astype(jnp.int32)

    def unfinished(carry: Any) -> Any:
        step, _, state, *_ = carry
        return (step < limit) & jnp.any(state.active)

    start = (
        jnp.int32(0),
        caches,
        state,
        jnp.zeros((batch, STRIDE), jnp.int32),
        jnp.zeros((batch, STRIDE)),
        state.left * 0,
    )
    _, caches, state, tokens, logs, counts = jax.lax.while_loop(unfinished, step, start)
    return caches, state, tokens, logs, counts

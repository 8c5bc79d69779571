"""The machinery under generation: rows of tokens that grow, their caches, and two compiled programs.

`_prefill` reads a stretch of every row into the caches; `advance` draws tokens one after another, inside one loop,
until all rows are done or so many are drawn. Sizes are rounded up, so that prompts of similar length share programs.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ...layers.mixers.caches import KeyValueCache
from ...layers.positions.scaling import EVERY_LENGTH
from ...layers.sharding.axes import whole
from ..decoder import Caches, Decoder, DecoderModel
from ..parameters import FlatModel
from .compiling import compiled_for
from .sampling import Filters, Sampling, row_keys
from .speculative import Speculation
from .speculative import advance as _advance_by_guesses
from .state import STRIDE, State, log_prob_of, positions_from

CHUNK = 512
"""Tokens of a prompt that are read at once: so many bound the memory of a long one."""


@dataclass
class Speed:
    """How long it took."""

    first_token_seconds: float = 0.0
    """From the prompt to the first token."""
    tokens: int = 0
    """Drawn after the first ones."""
    seconds: float = 0.0
    """That these took."""

    @property
    def tokens_per_second(self) -> float:
        """Drawn after the first ones, of all rows together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return f"{self.tokens_per_second:.1f} tokens/s, first token after {self.first_token_seconds:.2f} s"


@dataclass
class NewTokens:
    """Tokens of one row that were drawn in one go."""

    ids: list[int]
    log_probs: list[float]


def check_vocabulary(rows: Sequence[Sequence[int]], vocab: int) -> None:
    """Raises ValueError where a token is none of the vocabulary: JAX would take another one's embedding for it."""
    most = max((max(row) for row in rows if row), default=0)
    if most >= vocab:
        raise ValueError(f"the text has the token {most}, and the model's vocabulary has {vocab} tokens")


def equal_lengths(specs: Sequence[Decoder], length: int) -> range:
    """The range of text lengths at which caches of these models are valid that are valid at `length`."""
    ranges = [block.mixer.equal_lengths(length) for spec in specs for block in spec.all_blocks]
    return range(max(lengths.start for lengths in ranges), min(lengths.stop for lengths in ranges))


def rounded(count: int, least: int = 32) -> int:
    """The next of 32, 48, 64, 96, 128, ...: at most half is wasted, and few sizes are compiled for."""
    size = least
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class Session:
    """Rows that go on from what they have read, on the devices the model is on.

    Args:
        model: the decoder.
        batch: how many rows.
        length: tokens a row may come to.
        sampling: how tokens are drawn.
        key: of the draws; each row has its own stream.
        ends: tokens that end a row.
        log_probs: whether the logarithm of each drawn token's probability is kept, by the model before any filter.
        dtype: what the model computes in.
        cache_dtype: of the caches; int8 quantizes them; None: as `dtype`.
        speculation: how tokens are guessed ahead; None: they are not, but with a draft model.
        draft: a model that guesses.
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
        dtype: Any = jnp.float32,
        cache_dtype: Any = None,
        speculation: Speculation | None = None,
        draft: DecoderModel | None = None,
    ):
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
        """The tokens of each row; those in the caches, and the latest one."""
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
            looks_up = speculation is not None and draft is None
            self.state = start(key, batch, vocab if self.filters.penalised else None, self.room if looks_up else None)
            self._keep_valid([None] * batch)

    def read(self, rows: Sequence[Sequence[int]], max_tokens: int) -> list[NewTokens]:
        """Reads more tokens of every row, one at least, and draws the first of up to `max_tokens` new ones.

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
        found = self._taken(np.asarray(token)[:, None], np.asarray(log_prob)[:, None], np.ones(self.batch, np.int32))
        self.speed.first_token_seconds = time.perf_counter() - began
        return found

    def _prefill(self, texts: Sequence[Sequence[int]], starts: Sequence[int], lengths: Sequence[int]) -> Array:
        """Reads each row's text from a position on, and returns the logits after its last token.

        `lengths` are those of the texts that the caches are for, which may have tokens that are not read yet. A row
        whose start is its text's length reads nothing.
        """
        counts = np.array([len(text) - start for text, start in zip(texts, starts, strict=True)], np.int32)
        logits: Any = whole(jnp.zeros((self.batch, self.model.spec.vocab)))
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
        """Makes the one row go on from what it has in common with `ids`, and says how many tokens that is.

        One token of `ids` at least is left to read. Where a ring has forgotten what is needed, it is all of them.
        """
        assert self.batch == 1, self.batch
        self.speed = Speed()
        (own,), (held,) = self.ids, np.asarray(self.state.lengths).tolist()
        shared = 0
        while shared < min(held, len(own), len(ids) - 1) and own[shared] == ids[shared]:
            shared += 1
        caches = jax.tree.leaves((self.caches, self.draft_caches), is_leaf=lambda x: isinstance(x, KeyValueCache))
        # Guesses that were refused are in the caches, too: a ring has lost as many more.
        lost = held - shared + (self.speculation.tokens if self.speculation else 0)
        rings = (x.rewinds for x in caches if isinstance(x, KeyValueCache) and x.window is not None)
        if len(ids) not in self._valid[0] or lost > min(rings, default=lost):
            shared = 0
        self.ids = [list(ids[:shared])]
        with self._flat.on_mesh():
            seen = self.state.seen
            if seen is not None:
                seen = (seen & False).at[0, jnp.asarray(ids[:shared], jnp.int32)].set(True)
            self.state = replace(self.state, lengths=self.state.lengths * 0 + shared, seen=seen)
        return shared

    def advance(self, limit: int = STRIDE) -> list[NewTokens]:
        """Draws up to `limit` more tokens of each row that is not done."""
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
                self.caches, self.draft_caches, self.state, *out = _advance_by_guesses(self._flat.platform)(
                    self._flat,
                    self._flat_draft,
                    self.caches,
                    self.draft_caches,
                    *rest,
                    speculation=self.speculation,
                    dtype=self.dtype,
                )
        found = self._taken(*map(np.asarray, out))
        self.speed.tokens += sum(len(row.ids) for row in found)
        self.speed.seconds += time.perf_counter() - began
        return found

    @property
    def active(self) -> list[bool]:
        """Which rows are not done."""
        return (np.asarray(self.state.left) > 0).tolist()

    def end(self, row: int) -> None:
        """Draws no more tokens of a row."""
        with self._flat.on_mesh():
            self.state = replace(self.state, left=self.state.left.at[row].set(0))

    def _taken(self, tokens: np.ndarray, log_probs: np.ndarray, counts: np.ndarray) -> list[NewTokens]:
        found = []
        for ids, row, probs, count in zip(self.ids, tokens, log_probs, counts, strict=True):
            found.append(NewTokens(row[:count].tolist(), probs[:count].tolist()))
            ids.extend(found[-1].ids)
        return found


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_caches(spec: Decoder, batch: int, length: int, dtype: Any) -> Caches:
    """Of a batch of rows of up to a length."""
    return spec.cache(batch, length, dtype)


@partial(jax.jit, static_argnums=(1, 2, 3))
def start(key: Key[Array, ""], batch: int, penalised: int | None, looked_up: int | None) -> State:
    """Rows without tokens, of a vocabulary whose tokens are `penalised`, and of a length that is `looked_up`."""
    zeros = jnp.zeros(batch, jnp.int32)
    return State(
        lengths=zeros,
        token=zeros,
        drawn=zeros,
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
    dtype: Any,
) -> tuple[Float[Array, "B V"], Caches, State]:
    """Reads right-padded chunks of rows, whose texts have `lengths`.

    Returns the logits after the last token of each row that has one in this chunk, the caches and the state.
    """
    model: DecoderModel = flat.model
    some = counts > 0
    positions = positions_from(jnp.where(some, starts, state.lengths), counts, tokens.shape[1])
    positions = replace(positions, lengths=jnp.broadcast_to(lengths[:, None], tokens.shape))
    real = positions.segments > 0
    hidden, after = model.hidden(tokens, positions, caches, dtype=dtype)
    assert after is not None
    last = jnp.take_along_axis(whole(hidden), jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    logits = jnp.where(some[:, None], whole(model.logits(last)[:, 0]), logits)
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
    token = filters.choose(logits, state.seen, row_keys(state.keys, state.drawn))
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
    dtype: Any,
) -> tuple[Caches, State, Int[Array, "B C"], Float[Array, "B C"], Int[Array, " B"]]:
    """Draws up to `limit` tokens of each row that is not done: the tokens, their log-probabilities and how many."""
    batch = state.token.shape[0]
    model: DecoderModel = flat.model

    def step(carry: Any) -> Any:
        step, caches, state, tokens, logs, counts = carry
        active = state.active
        positions = positions_from(state.lengths, active.astype(jnp.int32), 1)
        logits, caches = model(state.token[:, None], positions, caches, dtype=dtype)
        logits = whole(logits[:, 0])
        state = replace(state, lengths=state.lengths + active.astype(jnp.int32))
        token = filters.choose(logits, state.seen, row_keys(state.keys, state.drawn))
        tokens = tokens.at[:, step].set(token)
        logs = logs.at[:, step].set(log_prob_of(logits, token)) if log_probs else logs
        return step + 1, caches, state.push(token, ends, active), tokens, logs, counts + active.astype(jnp.int32)

    def goes_on(carry: Any) -> Any:
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
    _, caches, state, tokens, logs, counts = jax.lax.while_loop(goes_on, step, start)
    return caches, state, tokens, logs, counts

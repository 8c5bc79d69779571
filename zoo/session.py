"""The machinery under generation: rows of tokens that grow, their caches, and two compiled programs.

`_prefill` reads a stretch of every row into the caches; `_advance` draws tokens one after another, inside one loop,
until all rows are done or so many are drawn. Sizes are rounded up, so that prompts of similar length share programs.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from ..layers.mixer import Places
from ..layers.sharding import whole
from .decoder import Caches, DecoderModel
from .sampling import Filters, Sampling, row_keys

CHUNK = 512
"""Tokens of a prompt that are read at once: so many bound the memory of a long one."""
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

    def push(self, token: Int[Array, " B"], ends: Int[Array, " E"]) -> "State":
        """After one more drawn token of every row that is not done; one of `ends` ends its row."""
        active = self.left > 0
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
            left=jnp.where(active, left, 0),
            seen=seen,
            history=history,
        )


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
class Drawn:
    """Tokens of one row that were drawn in one go."""

    ids: list[int]
    log_probs: list[float]


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
    ):
        self.model, self.batch, self.dtype, self.log_probs = model, batch, dtype, log_probs
        self.length = rounded(length)
        self.ends = set(ends)
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        """The tokens of each row; those in the caches, and the latest one."""
        self.speed = Speed()
        vocab = model.spec.vocab
        with self._mesh():
            self.filters = sampling.traced(vocab)
            self.end_ids = jnp.asarray([*ends, -1], jnp.int32)
            self.caches = jax.jit(
                lambda: model.spec.cache(batch, self.length, dtype if cache_dtype is None else cache_dtype)
            )()
            zeros = jnp.zeros(batch, jnp.int32)
            self.state = State(
                lengths=zeros,
                token=zeros,
                drawn=zeros,
                left=zeros,
                keys=jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch)),
                seen=jnp.zeros((batch, vocab), bool) if self.filters.penalised else None,
            )

    def read(self, rows: Sequence[Sequence[int]], max_tokens: int) -> list[Drawn]:
        """Reads more tokens of every row, one at least, and draws the first of up to `max_tokens` new ones."""
        began = time.perf_counter()
        counts = np.array([len(row) for row in rows], np.int32)
        last = np.zeros((self.batch, self.model.spec.vocab), np.float32)
        with self._mesh():
            logits: Any = whole(jnp.asarray(last))
            starts = np.asarray(self.state.lengths)
            for first in range(0, int(counts.max()), CHUNK):
                here = np.clip(counts - first, 0, CHUNK)
                tokens = np.zeros((self.batch, rounded(int(here.max()))), np.int32)
                for line, row in zip(tokens, rows, strict=True):
                    part = row[first : first + CHUNK]
                    line[: len(part)] = part
                logits, self.caches, self.state = _prefill(
                    self.model, self.caches, self.state, tokens, here, starts + first, logits, dtype=self.dtype
                )
            self.state = replace(
                self.state,
                left=jnp.full(self.batch, max_tokens, jnp.int32),
                drawn=jnp.zeros(self.batch, jnp.int32),
            )
            self.state, token, log_prob = _first(self.state, logits, self.filters, self.end_ids)
        for ids, row in zip(self.ids, rows, strict=True):
            ids.extend(row)
        found = self._taken(np.asarray(token)[:, None], np.asarray(log_prob)[:, None], np.ones(self.batch, np.int32))
        self.speed.first_token_seconds = time.perf_counter() - began
        return found

    def advance(self, limit: int = STRIDE) -> list[Drawn]:
        """Draws up to `limit` more tokens of each row that is not done."""
        began = time.perf_counter()
        with self._mesh():
            self.caches, self.state, *out = _advance(
                self.model,
                self.caches,
                self.state,
                self.filters,
                self.end_ids,
                jnp.int32(min(limit, STRIDE)),
                log_probs=self.log_probs,
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
        with self._mesh():
            self.state = replace(self.state, left=self.state.left.at[row].set(0))

    def _taken(self, tokens: np.ndarray, log_probs: np.ndarray, counts: np.ndarray) -> list[Drawn]:
        found = []
        for ids, row, probs, count in zip(self.ids, tokens, log_probs, counts, strict=True):
            found.append(Drawn(row[:count].tolist(), probs[:count].tolist()))
            ids.extend(found[-1].ids)
        return found

    def _mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The mesh the parameters live on, to compute on."""
        sharding = jax.tree.leaves(self.model)[0].sharding
        mesh = getattr(sharding, "mesh", None)
        return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()


@partial(jax.jit, static_argnames="dtype", donate_argnames="caches")
def _prefill(
    model: DecoderModel,
    caches: Caches,
    state: State,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
    starts: Int[Array, " B"],
    logits: Float[Array, "B V"],
    *,
    dtype: Any,
) -> tuple[Float[Array, "B V"], Caches, State]:
    """Reads right-padded stretches of rows; the logits after the last token of each row that has any here."""
    width, some = tokens.shape[1], counts > 0
    index = jnp.arange(width, dtype=jnp.int32)
    real = index < counts[:, None]
    # Padding stands at its row's last place: scalings of RoPE that look at the largest position do not see it.
    positions = starts[:, None] + jnp.minimum(index, jnp.maximum(counts[:, None] - 1, 0))
    places = Places(
        positions=jnp.where(some[:, None], positions, state.lengths[:, None]), segments=real.astype(jnp.int32)
    )
    hidden, after = model.hidden(tokens, places, caches, dtype=dtype)
    assert after is not None
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    logits = jnp.where(some[:, None], whole(model.logits(last)[:, 0]), logits)
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    seen, history = state.seen, state.history
    if seen is not None:
        seen = seen.at[row, tokens].max(real)
    if history is not None:
        history = history.at[row, jnp.where(real, positions, history.shape[1])].set(tokens, mode="drop")
    lengths = jnp.where(some, starts + counts, state.lengths)
    return logits, after, replace(state, lengths=lengths, seen=seen, history=history)


@jax.jit
def _first(
    state: State, logits: Float[Array, "B V"], filters: Filters, ends: Int[Array, " E"]
) -> tuple[State, Int[Array, " B"], Float[Array, " B"]]:
    token = filters.choose(logits, state.seen, row_keys(state.keys, state.drawn))
    return state.push(token, ends), token, log_prob_of(logits, token)


@partial(jax.jit, static_argnames=("log_probs", "dtype"), donate_argnames="caches")
def _advance(
    model: DecoderModel,
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

    def step(carry: Any) -> Any:
        step, caches, state, tokens, logs, counts = carry
        active = state.left > 0
        places = Places(positions=state.lengths[:, None], segments=active[:, None].astype(jnp.int32))
        logits, caches = model(state.token[:, None], places, caches, dtype=dtype)
        logits = whole(logits[:, 0])
        state = replace(state, lengths=state.lengths + active.astype(jnp.int32))
        token = filters.choose(logits, state.seen, row_keys(state.keys, state.drawn))
        tokens = tokens.at[:, step].set(token)
        logs = logs.at[:, step].set(log_prob_of(logits, token)) if log_probs else logs
        return step + 1, caches, state.push(token, ends), tokens, logs, counts + active.astype(jnp.int32)

    def goes_on(carry: Any) -> Any:
        step, _, state, *_ = carry
        return (step < limit) & jnp.any(state.left > 0)

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


def log_prob_of(logits: Float[Array, "... V"], token: Int[Array, "..."]) -> Float[Array, "..."]:
    """The logarithm of the probability of a token."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

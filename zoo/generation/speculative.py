"""Speculative decoding: several tokens are guessed; the model reads them in one go and keeps those that are its own.

What comes out is distributed as without guesses (Leviathan et al., 2211.17192, theorem A.1); greedily, it is the same.
A guess x, drawn by q where the model draws by p, is kept with probability min(1, p(x) / q(x)). In place of the first
that is not, a token is drawn by max(p - q, 0); after as many as were guessed, one by p comes for free.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...layers.mixers.caches import SLACK
from ...layers.sharding.axes import whole
from ...layers.spec import Spec
from ..decoder import Caches, DecoderModel
from ..parameters import FlatModel
from .compiling import compiled_for
from .sampling import Filters, row_keys
from .state import STRIDE, State, log_prob_of, positions_from

GUESS, KEEP, REPLACE = 1, 2, 3
"""Salts of the random draws."""


@dataclass(frozen=True, kw_only=True)
class Speculation(Spec):
    """How tokens are guessed: by a draft model, or else by looking up in the text what came after the latest tokens."""

    tokens: int = 4
    """How many are guessed at a time."""
    ngram: int = 3
    """Without a draft model: so many latest tokens are looked for in the text, or fewer where these are new."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.tokens <= SLACK:
            raise ValueError(f"speculation guesses from 1 to {SLACK} tokens, got tokens={self.tokens}")
        if self.ngram < 1:
            raise ValueError(f"ngram must be at least 1, got {self.ngram}")


@compiled_for(static_argnames=("speculation", "dtype"), donate_argnames=("caches", "draft_caches"))
def advance(
    flat: FlatModel,
    flat_draft: FlatModel | None,
    caches: Caches,
    draft_caches: Caches | None,
    state: State,
    filters: Filters,
    ends: Int[Array, " E"],
    limit: Int[Array, ""],
    *,
    speculation: Speculation,
    dtype: Any,
) -> tuple[Caches, Caches | None, State, Int[Array, "B C"], Float[Array, "B C"], Int[Array, " B"]]:
    """Draws tokens until every row that is not done has `limit` more, or somewhat more than that.

    Rows keep different numbers of guesses, so each is at a place of its own.
    """
    model: DecoderModel = flat.model
    draft: DecoderModel | None = None if flat_draft is None else flat_draft.model
    batch, count = state.token.shape[0], speculation.tokens
    width = STRIDE + count

    def step(carry: Any) -> Any:
        caches, draft_caches, state, tokens, logs, counts = carry
        if draft is None:
            guesses, shares = _looked_up(state, speculation), None
        else:
            guesses, shares, draft_caches = _drafted(draft, draft_caches, state, filters, count, dtype)
        room = jnp.minimum(count, state.room - 1)
        read = jnp.concatenate([state.token[:, None], guesses], axis=1)
        positions = positions_from(state.lengths, room + 1, count + 1)
        logits, caches = model(read, positions, caches, dtype=dtype)
        logits = whole(logits)
        weights = jax.nn.softmax(filters.filter(_penalised(filters, logits, state.seen, guesses)), axis=-1)
        kept, next_token = _judged(state, filters, guesses, shares, weights, room)
        state, found, found_logs, taken = _pushed(state, guesses, kept, next_token, logits, ends, room >= 0)
        row, column = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(count + 1, dtype=jnp.int32)
        place = jnp.where(column < taken[:, None], counts[:, None] + column, width)
        tokens = tokens.at[row, place].set(found, mode="drop")
        logs = logs.at[row, place].set(found_logs, mode="drop")
        return caches, draft_caches, state, tokens, logs, counts + taken

    def goes_on(carry: Any) -> Any:
        _, _, state, _, _, counts = carry
        # The buffer has room for one more step of the row that is ahead.
        return jnp.any(state.active & (counts < limit)) & jnp.all(counts < STRIDE)

    start = caches, draft_caches, state, jnp.zeros((batch, width), jnp.int32), jnp.zeros((batch, width)), state.left * 0
    return jax.lax.while_loop(goes_on, step, start)


def _drafted(
    draft: Any, caches: Any, state: State, filters: Filters, count: int, dtype: Any
) -> tuple[Int[Array, "B G"], Float[Array, "B G V"], Any]:
    """Guesses of a draft model, the distributions they were drawn from, and its caches with all of them."""

    def step(carry: Any, index: Array) -> Any:
        token, seen, caches = carry
        active = (index < state.left).astype(jnp.int32)  # the last guess of a row is read for its cache alone
        logits, caches = draft(token[:, None], positions_from(state.lengths + index, active, 1), caches, dtype=dtype)
        weights = filters.filter(filters.penalise(whole(logits[:, 0]), seen))
        guess = filters.sample(weights, row_keys(state.keys, state.drawn + index, GUESS))
        if seen is not None:
            seen = seen.at[jnp.arange(guess.shape[0]), guess].set(True)
        return (guess, seen, caches), (guess, jax.nn.softmax(weights, axis=-1))

    steps = jnp.arange(count + 1, dtype=jnp.int32)
    (_, _, caches), (guesses, shares) = jax.lax.scan(step, (state.token, state.seen, caches), steps)
    return guesses[:count].T, jnp.swapaxes(shares[:count], 0, 1), caches


def _looked_up(state: State, speculation: Speculation) -> Int[Array, "B G"]:
    """What followed the latest tokens where they stood before: the longest match counts, of these the latest."""
    assert state.history is not None

    def row(history: Int[Array, " S"], length: Int[Array, ""]) -> Int[Array, " G"]:
        positions = jnp.arange(history.shape[0], dtype=jnp.int32)
        # After `size` steps, `match` says for each place whether the `size` tokens up to it are the latest ones.
        best, match = jnp.int32(-1), positions < length
        for size in range(speculation.ngram):
            latest = history[jnp.maximum(length - size, 0)]
            match = match & (jnp.roll(history, size) == latest) & (positions >= size) & (length >= size)
            found = jnp.max(jnp.where(match, positions, -1))
            best = jnp.where(found >= 0, found, best)
        after = best + 1 + jnp.arange(speculation.tokens, dtype=jnp.int32)
        # Past the end of the text the guess repeats what was guessed before: the text may be a loop.
        period = jnp.maximum(length - best, 1)
        after = jnp.where(after > length, best + 1 + jnp.mod(after - best - 1, period), after)
        return history[jnp.clip(after, 0, history.shape[0] - 1)]

    return jax.vmap(row)(state.history, state.lengths)


def _penalised(
    filters: Filters, logits: Float[Array, "B U V"], seen: Bool[Array, "B V"] | None, guesses: Int[Array, "B G"]
) -> Float[Array, "B U V"]:
    """Logits with the penalty on all tokens before each of them, guesses too."""
    if seen is None:
        return logits
    hot = jax.nn.one_hot(guesses, logits.shape[-1], dtype=jnp.bool_)
    before = jax.lax.associative_scan(jnp.logical_or, hot, axis=1)
    before = jnp.concatenate([seen[:, None], seen[:, None] | before], axis=1)
    return filters.penalise(logits, before)


def _judged(
    state: State,
    filters: Filters,
    guesses: Int[Array, "B G"],
    shares: Float[Array, "B G V"] | None,
    weights: Float[Array, "B U V"],
    room: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many guesses of each row are kept, and the token that follows them.

    `shares` are the probabilities by which guesses were drawn; None: there was no choice.
    """
    count = guesses.shape[1]
    guess = guesses[..., None]
    wanted = jnp.take_along_axis(weights[:, :count], guess, axis=-1)[..., 0]
    given = 1.0 if shares is None else jnp.take_along_axis(shares, guess, axis=-1)[..., 0]
    keys = row_keys(state.keys, state.drawn, KEEP)
    chance = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    keeps = (chance * given < wanted) & (jnp.arange(count) < room[:, None])
    kept = jnp.sum(jnp.cumprod(keeps.astype(jnp.int32), axis=1), axis=1)
    at = kept[:, None, None]
    here = jnp.take_along_axis(weights, at, axis=1)[:, 0]
    refused = kept < room
    place = jnp.minimum(at, count - 1)
    if shares is None:
        chosen = jax.nn.one_hot(jnp.take_along_axis(guesses, place[..., 0], axis=1)[:, 0], here.shape[-1])
    else:
        chosen = jnp.take_along_axis(shares, place, axis=1)[:, 0]
    rest = jnp.maximum(here - chosen, 0.0)
    # Rounding may leave nothing where p and q are the same, and then a guess was refused by rounding, too.
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, here)
    left = jnp.where(refused[:, None], rest, here)
    return kept, filters.sample(jnp.log(left), row_keys(state.keys, state.drawn, REPLACE))


def _pushed(
    state: State,
    guesses: Int[Array, "B G"],
    kept: Int[Array, " B"],
    next_token: Int[Array, " B"],
    logits: Float[Array, "B U V"],
    ends: Int[Array, " E"],
    reads: Bool[Array, " B"],
) -> tuple[State, Int[Array, "B U"], Float[Array, "B U"], Int[Array, " B"]]:
    """The state after the kept guesses and the token that follows, one by one: any may end its row."""
    count = guesses.shape[1]
    index = jnp.arange(count + 1, dtype=jnp.int32)
    found = jnp.concatenate([guesses, next_token[:, None]], axis=1)
    found = jnp.where(index == kept[:, None], next_token[:, None], found)
    taken = jnp.zeros_like(kept)
    for place in range(count + 1):
        active = reads & (state.left > 0) & (place <= kept)
        state = replace(state, lengths=state.lengths + active.astype(jnp.int32)).push(found[:, place], ends, active)
        taken = taken + active.astype(jnp.int32)
    return state, found, log_prob_of(logits, found), taken

"""Speculative decoding: the model reads several draft tokens in one call and accepts a prefix of them.

The output has the same distribution as without (Leviathan et al., 2211.17192, theorem A.1); greedy output is the same.
A draft token x that was sampled from q is accepted with probability min(1, p(x) / q(x)), where p is the model's
distribution. The first rejected one is replaced by a sample from max(p - q, 0), normalized; if all are accepted, one
more token is sampled from p.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ...layers.sharding.collectives import replicate
from ...layers.spec import POSITIVE, Spec, check_ranges, ranged
from ..decoder import Caches, DecoderModel
from ..parameters import FlatModel
from .compiling import compiled_for
from .sampling import Filters, row_keys
from .state import STRIDE, State, log_prob_of, positions_from

DRAFT, ACCEPT, REPLACE = 1, 2, 3
"""Salts of the random keys."""


@dataclass(frozen=True, kw_only=True)
class Speculation(Spec):
    """Where draft tokens come from: a draft model, or the text after an earlier occurrence of the latest tokens."""

    tokens: int = ranged(4, POSITIVE)
    """Draft tokens for each call of the model, at most the `max_rewind` of its caches."""
    ngram: int = ranged(3, POSITIVE)
    """Without a draft model: number of latest tokens that are looked up in the text, or fewer if these do not occur."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self)


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
    dtype: DTypeLike,
) -> tuple[Caches, Caches | None, State, Int[Array, "B C"], Float[Array, "B C"], Int[Array, " B"]]:
    """Samples tokens until every row that is not done has at least `limit` more.

    Rows accept different numbers of draft tokens, so their lengths grow apart.
    """
    model: DecoderModel = flat.model
    draft: DecoderModel | None = None if flat_draft is None else flat_draft.model
    batch, count = state.token.shape[0], speculation.tokens
    width = STRIDE + count

    def step(carry: Any) -> Any:
        caches, draft_caches, state, tokens, logs, counts = carry
        if draft is None:
            drafts, draft_probabilities = _look_up(state, speculation), None
        else:
            drafts, draft_probabilities, draft_caches = _draft_tokens(draft, draft_caches, state, filters, count, dtype)
        room = jnp.minimum(count, state.room - 1)
        read = jnp.concatenate([state.token[:, None], drafts], axis=1)
        positions = positions_from(state.lengths, room + 1, count + 1)
        logits, caches = model(read, positions, caches, dtype=dtype)
        logits = replicate(logits)
        weights = jax.nn.softmax(filters.filter(_penalised(filters, logits, state.seen, drafts)), axis=-1)
        accepted, next_token = _accept(state, filters, drafts, draft_probabilities, weights, room)
        state, new_tokens, log_probs, taken = _append(state, drafts, accepted, next_token, logits, ends, room >= 0)
        row, column = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(count + 1, dtype=jnp.int32)
        place = jnp.where(column < taken[:, None], counts[:, None] + column, width)
        tokens = tokens.at[row, place].set(new_tokens, mode="drop")
        logs = logs.at[row, place].set(log_probs, mode="drop")
        return caches, draft_caches, state, tokens, logs, counts + taken

    def unfinished(carry: Any) -> Any:
        _, _, state, _, _, counts = carry
        # The buffer has room for one more step of the row that is ahead.
        return jnp.any(state.active & (counts < limit)) & jnp.all(counts < STRIDE)

    start = caches, draft_caches, state, jnp.zeros((batch, width), jnp.int32), jnp.zeros((batch, width)), state.left * 0
    return jax.lax.while_loop(unfinished, step, start)


def _draft_tokens(
    draft: Any, caches: Any, state: State, filters: Filters, count: int, dtype: DTypeLike
) -> tuple[Int[Array, "B G"], Float[Array, "B G V"], Any]:
    """Tokens of a draft model, the distributions they were sampled from, and its caches with all of them."""

    def step(carry: Any, index: Array) -> Any:
        token, seen, caches = carry
        active = (index < state.left).astype(jnp.int32)  # the last token of a row is read for the cache alone
        logits, caches = draft(token[:, None], positions_from(state.lengths + index, active, 1), caches, dtype=dtype)
        weights = filters.filter(filters.penalise(replicate(logits[:, 0]), seen))
        proposed = filters.sample(weights, row_keys(state.keys, state.sampled + index, DRAFT))
        if seen is not None:
            seen = seen.at[jnp.arange(proposed.shape[0]), proposed].set(True)
        return (proposed, seen, caches), (proposed, jax.nn.softmax(weights, axis=-1))

    steps = jnp.arange(count + 1, dtype=jnp.int32)
    (_, _, caches), (drafts, draft_probabilities) = jax.lax.scan(step, (state.token, state.seen, caches), steps)
    return drafts[:count].T, jnp.swapaxes(draft_probabilities[:count], 0, 1), caches


def _look_up(state: State, speculation: Speculation) -> Int[Array, "B G"]:
    """The tokens after the latest of the longest earlier occurrences of the latest tokens."""
    assert state.history is not None

    def row(history: Int[Array, " S"], length: Int[Array, ""]) -> Int[Array, " G"]:
        positions = jnp.arange(history.shape[0], dtype=jnp.int32)
        # After `size` steps, `match` is true at each position up to which the `size` tokens are the latest ones.
        best, match = jnp.int32(-1), positions < length
        for size in range(speculation.ngram):
            latest = history[jnp.maximum(length - size, 0)]
            match = match & (jnp.roll(history, size) == latest) & (positions >= size) & (length >= size)
            latest_match = jnp.max(jnp.where(match, positions, -1))
            best = jnp.where(latest_match >= 0, latest_match, best)
        after = best + 1 + jnp.arange(speculation.tokens, dtype=jnp.int32)
        # Past the end of the text the draft repeats itself: the text may be periodic.
        period = jnp.maximum(length - best, 1)
        after = jnp.where(after > length, best + 1 + jnp.mod(after - best - 1, period), after)
        return history[jnp.clip(after, 0, history.shape[0] - 1)]

    return jax.vmap(row)(state.history, state.lengths)


def _penalised(
    filters: Filters, logits: Float[Array, "B U V"], seen: Bool[Array, "B V"] | None, drafts: Int[Array, "B G"]
) -> Float[Array, "B U V"]:
    """Logits with the repetition penalty on all tokens before each position, draft tokens included."""
    if seen is None:
        return logits
    is_draft = jax.nn.one_hot(drafts, logits.shape[-1], dtype=jnp.bool_)
    before = jax.lax.associative_scan(jnp.logical_or, is_draft, axis=1)
    before = jnp.concatenate([seen[:, None], seen[:, None] | before], axis=1)
    return filters.penalise(logits, before)


def _accept(
    state: State,
    filters: Filters,
    drafts: Int[Array, "B G"],
    draft_probabilities: Float[Array, "B G V"] | None,
    weights: Float[Array, "B U V"],
    room: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many draft tokens of each row are accepted, and the token after them.

    `draft_probabilities` are those that the draft tokens were sampled from; None: they were looked up, with probability
    1.
    """
    count = drafts.shape[1]
    proposed = drafts[..., None]
    p = jnp.take_along_axis(weights[:, :count], proposed, axis=-1)[..., 0]
    q = 1.0 if draft_probabilities is None else jnp.take_along_axis(draft_probabilities, proposed, axis=-1)[..., 0]
    keys = row_keys(state.keys, state.sampled, ACCEPT)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    accepts = (uniform * q < p) & (jnp.arange(count) < room[:, None])
    accepted = jnp.sum(jnp.cumprod(accepts.astype(jnp.int32), axis=1), axis=1)
    at = accepted[:, None, None]
    model_probabilities = jnp.take_along_axis(weights, at, axis=1)[:, 0]
    rejected = accepted < room
    place = jnp.minimum(at, count - 1)
    if draft_probabilities is None:
        chosen = jax.nn.one_hot(jnp.take_along_axis(drafts, place[..., 0], axis=1)[:, 0], model_probabilities.shape[-1])
    else:
        chosen = jnp.take_along_axis(draft_probabilities, place, axis=1)[:, 0]
    residual = jnp.maximum(model_probabilities - chosen, 0.0)
    # Rounding can leave nothing if p equals q; then the rejection was due to rounding, too.
    residual = jnp.where(jnp.sum(residual, axis=-1, keepdims=True) > 0, residual, model_probabilities)
    target = jnp.where(rejected[:, None], residual, model_probabilities)
    return accepted, filters.sample(jnp.log(target), row_keys(state.keys, state.sampled, REPLACE))


def _append(
    state: State,
    drafts: Int[Array, "B G"],
    accepted: Int[Array, " B"],
    next_token: Int[Array, " B"],
    logits: Float[Array, "B U V"],
    ends: Int[Array, " E"],
    reads: Bool[Array, " B"],
) -> tuple[State, Int[Array, "B U"], Float[Array, "B U"], Int[Array, " B"]]:
    """The state after the accepted tokens and the next one. Any of them can end its row."""
    count = drafts.shape[1]
    index = jnp.arange(count + 1, dtype=jnp.int32)
    new_tokens = jnp.concatenate([drafts, next_token[:, None]], axis=1)
    new_tokens = jnp.where(index == accepted[:, None], next_token[:, None], new_tokens)
    taken = jnp.zeros_like(accepted)
    for column in range(count + 1):
        active = reads & (state.left > 0) & (column <= accepted)
        state = replace(state, lengths=state.lengths + active.astype(jnp.int32)).push(
            new_tokens[:, column], ends, active
        )
        taken = taken + active.astype(jnp.int32)
    return state, new_tokens, log_prob_of(logits, new_tokens), taken

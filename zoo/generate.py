"""Text from a model: prefill and decode inside one jitted function."""

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from tokenizers import Tokenizer

from ..layers.mixer import Places
from ..layers.sharding import whole
from .decoder import Caches, DecoderModel, plain_places


def generate(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    stop: tuple[str, ...] = ("<|endoftext|>",),
    seed: int = 0,
    key: Key[Array, ""] | None = None,
    dtype: Any = jnp.float32,
) -> list[str]:
    """Continues each prompt, and returns the continuations without their prompts.

    Prompts may differ in length; each result is what the prompt alone would have given at temperature 0, and each draws
    from its own random stream. Text ends at the first special token named in `stop`.

    Args:
        model: the decoder.
        tokenizer: turns prompts into the ids the model was trained on.
        prompts: texts; an empty one starts with the first special token in `stop` that the tokenizer has.
        max_tokens: how many tokens are generated at most.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: only so many of the most likely tokens are drawn from; 0: all.
        stop: special tokens that end a text.
        seed: of the random draws.
        key: in place of `seed`.
        dtype: what the model computes in.

    Raises:
        ValueError: on a negative temperature, no prompts, an empty prompt with no token to start from, or more tokens
            than the model has learned positions for.
    """
    if temperature < 0 or max_tokens < 1 or top_k < 0 or not prompts:
        raise ValueError(
            f"generation needs prompts, temperature >= 0, max_tokens >= 1 and top_k >= 0, got {len(prompts)} prompts, "
            f"temperature={temperature}, max_tokens={max_tokens}, top_k={top_k}"
        )
    ends = [_id(tokenizer, token) for token in stop]
    rows = [tokenizer.encode(prompt, add_special_tokens=False).ids or ends[:1] for prompt in prompts]
    if not all(rows):
        raise ValueError(f"an empty prompt needs a token to start from, and the tokenizer has none of {stop}")
    longest, limit = max(map(len, rows)) + max_tokens, model.spec.max_positions
    if limit and longest > limit:
        raise ValueError(f"prompt and continuation come to {longest} tokens, the model has {limit} positions")
    # Lengths are rounded up, so that prompts of similar length share a compiled program.
    width = -(-max(map(len, rows)) // 32) * 32
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    top_k = min(top_k, model.spec.vocab)
    with _mesh_of(model):
        lengths = jnp.asarray([len(ids) for ids in rows], jnp.int32)
        keys = jax.random.split(jax.random.key(seed) if key is None else key, len(rows))
        scale = jnp.asarray(temperature, jnp.float32)
        ids = np.asarray(_continue(model, jnp.asarray(tokens), lengths, keys, scale, max_tokens, top_k, dtype))
    return [tokenizer.decode(_until(row.tolist(), ends), skip_special_tokens=False) for row in ids]


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"stop names special tokens of the tokenizer, and it has no {token!r}")
    return found


def _mesh_of(model: DecoderModel) -> contextlib.AbstractContextManager[Any]:
    """The mesh the parameters live on, to compute on."""
    sharding = jax.tree.leaves(model)[0].sharding
    mesh = getattr(sharding, "mesh", None)
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()


def _until(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


@partial(jax.jit, static_argnames=("count", "top_k", "dtype"))
def _continue(
    model: DecoderModel,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""],
    count: int,
    top_k: int,
    dtype: Any,
) -> Int[Array, "B C"]:
    """The next `count` tokens of right-padded rows.

    Padding does no harm: its slots of the cache lie after every position that is asked about, until overwritten.
    """
    batch, width = tokens.shape
    caches = model.spec.cache(batch, width + count, dtype)
    places = plain_places(tokens)
    # Padding stands at its row's last place: scalings of RoPE that look at the largest position do not see it.
    places = Places(positions=jnp.minimum(places.positions, lengths[:, None] - 1), segments=places.segments)
    hidden, caches = model.hidden(tokens, places, caches, dtype=dtype)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    token = _draw(model.logits(last)[:, 0], keys, 0, temperature, top_k)

    def step(carry: tuple[Array, Caches], index: Array) -> tuple[tuple[Array, Any], Array]:
        token, caches = carry
        places = Places(positions=(lengths + index)[:, None], segments=jnp.ones((batch, 1), jnp.int32))
        logits, caches = model(token[:, None], places, caches, dtype=dtype)
        after = _draw(logits[:, 0], keys, index + 1, temperature, top_k)
        return (after, caches), token

    (last_token, _), drawn = jax.lax.scan(step, (token, caches), jnp.arange(count - 1, dtype=jnp.int32))
    return jnp.concatenate([drawn.T, last_token[:, None]], axis=1)


def _draw(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], index: Any, temperature: Float[Array, ""], top_k: int
) -> Int[Array, " B"]:
    """One token a row: the most likely at temperature 0, else drawn by row and index."""
    logits = whole(logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k:
        lowest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    logits = logits / jnp.maximum(temperature, 1e-6)
    draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, index), row))(keys, logits)
    return jnp.where(temperature == 0.0, greedy, draw.astype(jnp.int32))

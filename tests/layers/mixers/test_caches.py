"""Attention with each kind of cache, in pieces of any sizes, against attention to the whole at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo.layers.kernels.attention.masks import Causal
from flaxzoo.layers.mixers.attention import Attention
from flaxzoo.layers.mixers.caches import SLACK, KeyValueCache, Quantized
from flaxzoo.layers.mixers.mixer import Positions

pytestmark = pytest.mark.usefixtures("quick_compiler")
T, DIM, WINDOW = 70, 16, 5
X = jax.random.normal(jax.random.key(0), (2, T, DIM))
SPECS = {
    "plain": Attention(heads=4, kv_heads=2, head_dim=8),
    "window": Attention(heads=4, kv_heads=2, head_dim=8, window=WINDOW, soft_cap=2.0, sinks=True),
    "wide": Attention(heads=4, kv_heads=2, head_dim=8, window=40),
}


@functools.cache
def layer(name):
    return SPECS[name].build(DIM, rngs=nnx.Rngs(1))


@jax.jit
def call(layer, x, positions, cache):
    return layer(x, positions, cache)


@functools.cache
def whole(name):
    positions = Positions(index=jnp.tile(jnp.arange(T), (2, 1)), segments=jnp.ones((2, T), jnp.int32))
    return np.asarray(call(layer(name), X, positions, None)[0])


def in_pieces(name, pieces, dtype=jnp.float32):
    """The outputs of all tokens; `pieces` are how many more tokens each row reads in a call, padded on the right."""
    cache = SPECS[name].cache(2, T, dtype)
    at, out = np.zeros(2, int), np.zeros_like(whole(name))
    for counts in pieces:
        width = max(counts)
        x = np.full((2, width, DIM), 7.0, np.float32)
        for row, count in enumerate(counts):
            x[row, :count] = X[row, at[row] : at[row] + count]
        index = np.arange(width)
        positions = at[:, None] + np.minimum(index, np.maximum(np.array(counts)[:, None] - 1, 0))
        positions = Positions(
            index=jnp.asarray(positions, jnp.int32),
            segments=jnp.asarray(index < np.array(counts)[:, None], jnp.int32),
        )
        y, cache = call(layer(name), x, positions, cache)
        for row, count in enumerate(counts):
            out[row, at[row] : at[row] + count] = y[row, :count]
            at[row] += count
    assert (at == T).all()
    return out


PIECES = {
    "one by one": [(1, 1)] * T,
    "a prefill longer than the ring, then one by one": [(50, 50)] + [(1, 1)] * 20,
    "a prefill with padding": [(50, 9), *[(1, 1)] * 20, *[(0, 1)] * 41],
    "chunks": [(20, 20), (20, 3), (20, 20), (10, 27)],
    "a chunk that is all padding for a row": [(20, 3), (20, 0), (30, 67)],
    "as long as the ring allows without a copy": [(SLACK + 1, SLACK + 1)] * 4 + [(2, 2)],
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_pieces_are_the_whole(name, pieces):
    np.testing.assert_allclose(in_pieces(name, pieces), whole(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_int8_is_close_and_the_same_in_any_pieces(name):
    found = in_pieces(name, PIECES["a prefill with padding"], jnp.int8)
    np.testing.assert_allclose(in_pieces(name, PIECES["chunks"], jnp.int8), found, rtol=0, atol=1e-5)
    error = np.sqrt(np.mean((found - whole(name)) ** 2)) / whole(name).std()
    assert 1e-4 < error < 0.01  # each number is off by at most 1/254 of the largest of its vector


def test_memory():
    long, ring = (SPECS[name].cache(1, 1000, jnp.float32) for name in ("plain", "window"))
    assert (long.slots, long.window, long.max_rewind) == (1000, None, 1000)
    assert (ring.slots, ring.window, ring.max_rewind) == (WINDOW + SLACK, WINDOW, SLACK)
    assert SPECS["window"].cache(1, 20, jnp.float32).window is None
    sizes = {
        dtype: sum(x.nbytes for x in jax.tree.leaves(SPECS["plain"].cache(1, 10, dtype)))
        for dtype in ("float32", "int8")
    }
    assert sizes == {"float32": 2 * 10 * 2 * 8 * 4, "int8": 2 * 10 * 2 * (8 + 4)}


def test_quantization_rounds_to_the_nearest():
    x = np.random.default_rng(0).normal(0, 3, (2, 3, 4, 8)).astype(np.float32)
    x[0, 0] = 0
    made = Quantized.of(jnp.asarray(x))
    error = np.abs(np.asarray(made.read(jnp.float32)) - x)
    assert (error <= np.swapaxes(made.scale, 1, 2)[..., None] / 2 * 1.001).all()
    assert np.abs(np.asarray(made.values)).max(-1)[1].min() == 127


@pytest.mark.parametrize("back", [1, 5, SLACK])
@pytest.mark.parametrize("name", ["plain", "window"])
def test_tokens_are_taken_back(name, back):
    """A row goes on from an earlier position, as if what came later had never been."""
    layer_, cache = layer(name), SPECS[name].cache(1, T, jnp.float32)

    def read(x, start, cache):
        positions = jnp.arange(start, start + x.shape[1], dtype=jnp.int32)[None]
        return call(layer_, x, Positions(index=positions, segments=jnp.ones_like(positions)), cache)

    _, cache = read(X[:1, :30], 0, cache)
    for start in range(30, 30 + SLACK, 4):
        _, cache = read(jnp.ones((1, 4, DIM)), start, cache)  # a draft
    start = 30 + SLACK - back
    assert start >= 30
    x = jnp.concatenate([X[:1, :30], jnp.ones((1, start - 30, DIM)), X[:1, 30:40]], axis=1)
    wanted, _ = read(x, 0, SPECS[name].cache(1, T, jnp.float32))
    for step in range(10):
        found, cache = read(X[:1, 30 + step : 31 + step], start + step, cache)
        np.testing.assert_allclose(found[0, 0], wanted[0, start + step], atol=1e-5)


def test_a_ring_is_never_more_than_it_has_to_be():
    cache = KeyValueCache.empty(1, 100, 2, 8, jnp.float32, window=7)
    key = jnp.ones((1, 1, 2, 8))
    positions = Positions(index=jnp.zeros((1, 1), jnp.int32), segments=jnp.ones((1, 1), jnp.int32))
    _, found, _, _ = cache.extend(key, key, positions, Causal())
    assert found.shape == (1, 7 + SLACK, 2, 8)

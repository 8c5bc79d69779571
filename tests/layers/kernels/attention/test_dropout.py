"""The hash behind dropout: it keeps what it should, and nothing about one pair tells of another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.kernels.attention import dropout

B, N, LENGTH = 2, 3, 512


def kept(seed: int, rate: float) -> np.ndarray:
    """B N T S."""
    place = jnp.arange(LENGTH, dtype=jnp.int32)
    rows = dropout.rows(jnp.int32(seed), B, N)[..., None]
    return np.asarray(jax.jit(dropout.kept, static_argnums=3)(rows, place[:, None], place, rate))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -7])
def test_the_share_that_is_kept_is_that_of_independent_draws(seed, rate):
    found = kept(seed, rate)
    for axes in ((2, 3), (0, 1, 3), (0, 1, 2), (0, 1, 2, 3)):  # of a head, a query, a key, all
        draws = np.prod([found.shape[axis] for axis in axes])
        deviations = (found.mean(axes) - (1 - rate)) / np.sqrt(rate * (1 - rate) / draws)
        assert np.abs(deviations).max() < 5
        assert 0.8 < np.sqrt(np.mean(deviations**2)) < 1.2 or deviations.size < 100


def test_neighbours_heads_sequences_and_seeds_are_independent():
    one, other = (kept(seed, 0.5).astype(np.float64) - 0.5 for seed in (3, 4))
    pairs = {
        "the next key": (one[..., 1:], one[..., :-1]),
        "the next query": (one[..., 1:, :], one[..., :-1, :]),
        "the mirror image": (one, np.swapaxes(one, -1, -2) * (1 - np.eye(LENGTH))),
        "the diagonal": (one[..., 1:, 1:], one[..., :-1, :-1]),
        "the next head": (one[:, 1:], one[:, :-1]),
        "the next sequence": (one[1:], one[:-1]),
        "the next seed": (one, other),
    }
    for name, (a, b) in pairs.items():
        correlation = 4 * np.mean(a * b) * np.sqrt(a.size)
        assert abs(correlation) < 5, name


def test_no_head_is_another_some_queries_away():
    place, row = jnp.arange(LENGTH, dtype=jnp.int32), dropout.rows(jnp.int32(1), 1, 1)[0, 0]
    for shift in (1, 7, 300):
        assert np.mean(dropout.of_query(row, place + shift) == dropout.of_query(row + shift, place)) < 0.02


def mixed(x: int) -> int:
    """The mixing function on Python's integers."""
    x %= 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_the_bits_are_those_of_the_hash():
    found = kept(5, 0.3)
    for b, n, query, key in np.random.default_rng(0).integers((B, N, LENGTH, LENGTH), size=(500, 4)).tolist():
        row = mixed(n + mixed(b + mixed(5)))
        bits = mixed(mixed(mixed(query) ^ row) + mixed(key))
        assert found[b, n, query, key] == ((bits + 2**31) % 2**32 >= round(0.3 * 2**32))

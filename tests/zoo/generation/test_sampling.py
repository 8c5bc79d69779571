"""Sampling: filters against their definitions in plain numpy, in the order of transformers, and draws."""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flaxzoo.layers.random import random_key
from flaxzoo.zoo import GREEDY, Sampling
from flaxzoo.zoo.generation.sampling import row_keys
from hypothesis import given
from hypothesis import strategies as st


def plain(logits, seen, sampling):
    """Probabilities of one row, step by step as transformers' processors and warpers do it."""
    scores = np.array(logits, np.float64)
    scores = np.where(
        seen,
        np.where(scores > 0, scores / sampling.repetition_penalty, 0)
        + np.where(scores <= 0, scores * sampling.repetition_penalty, 0),
        scores,
    )
    scores = scores / sampling.temperature
    if sampling.top_k:
        scores[scores < np.sort(scores)[-min(sampling.top_k, scores.size)]] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(scores, kind="stable")
        cumulative = np.cumsum(softmax(scores[order]))
        out = cumulative <= 1 - sampling.top_p
        out[-1] = False
        scores[order[out]] = -np.inf
    if sampling.min_p:
        shares = softmax(scores)
        scores[shares < sampling.min_p * shares.max()] = -np.inf
    return softmax(scores)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def ours(logits, seen, sampling):
    filters = sampling.traced(logits.shape[-1])
    logits = filters.penalise(jnp.asarray(logits, jnp.float32), jnp.asarray(seen))
    return np.asarray(jax.nn.softmax(filters.filter(logits), axis=-1))


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=0.7, top_k=100),
    Sampling(temperature=1.3, top_p=0.6),
    Sampling(temperature=1.0, top_p=0.01),
    Sampling(temperature=1.0, min_p=0.3),
    Sampling(temperature=2.0, repetition_penalty=1.7),
    Sampling(temperature=0.9, top_k=6, top_p=0.8, min_p=0.2, repetition_penalty=1.2),
    Sampling(temperature=1.5, top_k=5, top_p=0.9),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_filters_are_their_definitions(sampling):
    random = np.random.default_rng(0)
    logits, seen = random.normal(0, 2, (20, 11)), random.random((20, 11)) < 0.4
    wanted = np.stack([plain(row, marks, sampling) for row, marks in zip(logits, seen, strict=True)])
    found = ours(logits, seen, sampling)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert ((found > 0) == (wanted > 0)).all()


@given(
    st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=9, unique=True),
    st.integers(0, 10),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
)
def test_any_filters_are_their_definitions(logits, top_k, top_p, min_p):
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    wanted = plain(np.array(logits), np.zeros(len(logits), bool), sampling)
    found = ours(np.array(logits), np.zeros(len(logits), bool), sampling)
    if ((found > 0) == (wanted > 0)).all():
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    else:  # a token on the edge of a filter, by rounding
        shares = softmax(np.array(logits))
        odd = shares[(found > 0) != (wanted > 0)]
        assert len(odd) == 1


def test_by_hand():
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    none = np.zeros(4, bool)
    np.testing.assert_allclose(ours(logits, none, Sampling(temperature=1.0, top_k=2)), [2 / 3, 1 / 3, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        ours(logits, none, Sampling(temperature=1.0, top_p=0.76)), [5 / 9, 2.5 / 9, 1.5 / 9, 0], atol=1e-6
    )
    # Of what top-k leaves, the first token has 2/3: enough for top-p.
    np.testing.assert_allclose(ours(logits, none, Sampling(temperature=1.0, top_k=2, top_p=0.6)), [1, 0, 0, 0])
    np.testing.assert_allclose(
        ours(logits, none, Sampling(temperature=1.0, min_p=0.4)), [2 / 3, 1 / 3, 0, 0], atol=1e-6
    )
    seen = np.array([True, False, False, False])
    penalised = ours(
        np.array([2.0, 1.0, -1.0]), np.array([True, False, True]), Sampling(temperature=1.0, repetition_penalty=2.0)
    )
    np.testing.assert_allclose(penalised, softmax(np.array([1.0, 1.0, -2.0])), atol=1e-6)
    assert ours(logits, seen, GREEDY).tolist() == [1, 0, 0, 0]


def test_draws_follow_the_probabilities():
    logits = jnp.tile(jnp.asarray([2.0, 1.0, 0.0, -1.0]), (4000, 1))
    keys = row_keys(jax.random.split(jax.random.key(0), 4000), jnp.zeros(4000, jnp.int32))
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=0.5), Sampling(temperature=1.0, top_k=2)):
        drawn = np.bincount(sampling.traced(4).choose(logits, None, keys), minlength=4) / 4000
        wanted = plain([2.0, 1.0, 0.0, -1.0], np.zeros(4, bool), sampling)
        np.testing.assert_allclose(drawn, wanted, atol=0.03)
        assert not drawn[wanted == 0].any()


NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        *({name: value} for name in NAMES if name != "top_k" for value in (math.nan, math.inf, -math.inf)),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be .*got "):
        Sampling(**change)


@pytest.mark.parametrize(
    "change",
    [
        *({"top_k": value} for value in (1.5, math.nan, math.inf, -math.inf)),
        {"temperature": "hot"},
    ],
    ids=str,
)
def test_what_is_of_another_type_is_refused(change, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be .*got "):
        Sampling(**change)


EXTREMES = {
    "temperature": (0.0, 5e-324, 1e-40, 1e-38, 1e-30, 1e-6, 1e-5, 1e300),
    "top_k": (1, 3, 2**40),
    "top_p": (5e-324, 1e-30, 1.0 - 1e-16),
    "min_p": (5e-324, 1.0),
    "repetition_penalty": (5e-324, 1e-30, 1e30, 1e300),
}
LOGITS = np.array(
    [[1.0, 3.0, 2.0, 3.0, -1.0], [3e38, -3e38, 0.0, 1.0, 2.0], [-3e38, -3.2e38, -3e38, -3.1e38, -3.3e38], [0.0] * 5],
    np.float32,
)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EXTREMES.items() for value in values])
def test_extreme_settings_leave_a_distribution(name, value):
    """Finite logits of any size, with ties, give finite probabilities that sum to 1."""
    temperature = {} if name == "temperature" else {"temperature": 1.0}
    sampling = Sampling(**temperature, **{name: value})
    assert EXTREMES.keys() == {*NAMES}
    found = ours(LOGITS, np.arange(5) % 2 == 0, sampling)
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-38, 1e-30, 1e-6])
def test_temperatures_near_0_are_greedy(temperature):
    """Of a tie, too, the first token is taken, with any filter."""
    keys = jax.random.split(jax.random.key(0), 4)
    for sampling in (Sampling(temperature=temperature), Sampling(temperature=temperature, top_p=0.5, top_k=3)):
        assert sampling.traced(5).choose(jnp.asarray(LOGITS), None, keys).tolist() == [1, 0, 0, 0]


def test_seeds_of_64_bits_differ():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1]
    keys = [tuple(jax.random.key_data(random_key(seed)).tolist()) for seed in seeds]
    assert len({*keys}) == len(seeds)
    assert keys[:4] == [tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in seeds[:4]]
    assert random_key(2**64 - 1) == jax.jit(lambda: random_key(2**64 - 1))()


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64, 1.5, math.nan, "1", None], ids=str)
def test_other_seeds_are_refused(seed, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    with pytest.raises(ValueError, match="a seed must be an integer of at least 0 and below"):
        random_key(seed)

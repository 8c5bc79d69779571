"""Masks against their definition in plain Python, for random expressions of all of them."""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.kernels import attend
from flaxzoo.layers.masks import Causal, Documents, Mask, Window
from hypothesis import given, settings
from hypothesis import strategies as st

B, T, S = 2, 7, 9
Sees = Callable[[int, int, int], bool]
"""Whether in this sequence, this query sees this key."""


def offsets() -> st.SearchStrategy[int | tuple[int, ...]]:
    one = st.integers(-3, S + 3)
    return one | st.tuples(*[one] * B)


def array(offset: int | tuple[int, ...]) -> int | jax.Array:
    return offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)


def at(offset: int | tuple[int, ...], batch: int) -> int:
    return offset if isinstance(offset, int) else offset[batch]


def causal(offset: int | tuple[int, ...]) -> tuple[Mask, Sees]:
    return Causal(array(offset)), lambda b, q, k: k <= q + at(offset, b)


def window(left: int, right: int, offset: int | tuple[int, ...]) -> tuple[Mask, Sees]:
    def sees(b: int, q: int, k: int) -> bool:
        return q + at(offset, b) - left < k < q + at(offset, b) + right

    return Window(left, right, array(offset)), sees


def documents(queries: list[list[int]], keys: list[list[int]]) -> tuple[Mask, Sees]:
    mask = Documents(jnp.asarray(queries, jnp.int32), jnp.asarray(keys, jnp.int32))
    return mask, lambda b, q, k: queries[b][q] == keys[b][k] != 0


def joined(parts: tuple[tuple[Mask, Sees], tuple[Mask, Sees]], both: bool) -> tuple[Mask, Sees]:
    (mask, sees), (other, other_sees) = parts
    join = operator.and_ if both else operator.or_
    return join(mask, other), lambda b, q, k: join(sees(b, q, k), other_sees(b, q, k))


def inverted(part: tuple[Mask, Sees]) -> tuple[Mask, Sees]:
    mask, sees = part
    return ~mask, lambda b, q, k: not sees(b, q, k)


def ids(length: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    return st.lists(row, min_size=B, max_size=B)


SINGLE = (
    st.builds(causal, offsets())
    | st.builds(window, st.integers(0, 6), st.integers(0, 6), offsets())
    | st.builds(documents, ids(T), ids(S))
)
MASKS = st.recursive(
    SINGLE,
    lambda inner: st.builds(joined, st.tuples(inner, inner), st.booleans()) | st.builds(inverted, inner),
    max_leaves=5,
)


def slowly(sees: Sees) -> np.ndarray:
    return np.array([[[sees(b, q, k) for k in range(S)] for q in range(T)] for b in range(B)])


def visible(mask: Mask) -> np.ndarray:
    batch = jnp.arange(B)[:, None, None]
    return np.broadcast_to(mask.visible(batch, jnp.zeros_like(batch), jnp.arange(T)[:, None], jnp.arange(S)), (B, T, S))


@settings(max_examples=60)
@given(MASKS)
def test_expressions_are_as_defined(case):
    mask, sees = case
    np.testing.assert_array_equal(visible(mask), slowly(sees))


@settings(max_examples=100)
@given(MASKS, st.integers(0, T - 1), st.integers(0, T - 1))
def test_key_range_never_excludes_a_visible_key(case, one, other):
    mask, sees = case
    first, last = min(one, other), max(one, other)
    low, high = mask.key_range(first, last, S)
    assert 0 <= low <= high <= S
    seen = np.flatnonzero(slowly(sees)[:, first : last + 1].any(axis=(0, 1)))
    assert all(low <= key < high for key in seen)


@given(MASKS)
def test_attend_gives_the_mean_of_visible_values(case):
    mask, sees = case
    seen = slowly(sees)
    values = np.random.default_rng(0).normal(size=(B, S, 1, 3)).astype(np.float32)
    wanted = np.einsum("BTS,BSH->BTH", seen, values[:, :, 0]) / np.maximum(seen.sum(-1, keepdims=True), 1)
    q, k = jnp.zeros((B, T, 2, 4)), jnp.zeros((B, S, 1, 4))
    for head in np.moveaxis(np.asarray(attend(q, k, jnp.asarray(values), mask=mask)), 2, 0):
        np.testing.assert_allclose(head, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "first", "last", "wanted"),
    [
        (Causal(), 3, 5, (0, 6)),
        (Causal(-9), 0, 5, (0, 0)),
        (Causal(50), 0, 5, (0, 20)),
        (Window(4), 8, 9, (5, 10)),
        (Window(4, 3), 8, 9, (5, 12)),
        (Window(4, offset=30), 0, 5, (20, 20)),
        (Causal() & Window(4), 8, 9, (5, 10)),
        (Causal() | Window(2, 5), 3, 5, (0, 10)),
        (~Causal(), 3, 5, (0, 20)),
    ],
    ids=str,
)
def test_key_range_is_tight(mask, first, last, wanted):
    assert mask.key_range(first, last, 20) == wanted


def test_traced_offsets_and_masks_as_arguments():
    mask = Causal(jnp.asarray([2, 0], jnp.int32)) & Window(3, offset=jnp.asarray(1, jnp.int32))
    np.testing.assert_array_equal(jax.jit(lambda mask: jnp.asarray(visible_traced(mask)))(mask), visible(mask))


def visible_traced(mask: Mask) -> jax.Array:
    batch = jnp.arange(B)[:, None, None]
    return mask.visible(batch, jnp.zeros_like(batch), jnp.arange(T)[:, None], jnp.arange(S))

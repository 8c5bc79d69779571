"""Random mask expressions, each with its definition in plain Python."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flaxzoo.layers.kernels.attention.masks import (
    BlockSparse,
    Causal,
    Chunked,
    Dense,
    Documents,
    Full,
    GlobalTokens,
    Lengths,
    Mask,
    PerHead,
    Prefix,
    Where,
    Window,
)
from hypothesis import strategies as st

Sees = Callable[[int, int, int, int], Any]
"""Whether in this sequence and head, this query sees this key."""
Case = tuple[Mask, Sees]


def array(values: Any, dtype: Any = jnp.int32) -> jax.Array:
    return jnp.asarray(values, dtype)


def documents(queries: Any, keys: Any) -> Case:
    mask = Documents(array(queries), array(keys))
    return mask, lambda b, h, q, k: queries[b][q] == keys[b][k] != 0


def lengths(queries: tuple[int, ...], keys: tuple[int, ...]) -> Case:
    return Lengths(array(queries), array(keys)), lambda b, h, q, k: q < queries[b] and k < keys[b]


def per_head(first: Case, second: Case, heads: int) -> Case:
    mask = PerHead((first[0], second[0]), tuple((1 + h) % 2 for h in range(heads)))
    return mask, lambda b, h, q, k: (second, first)[h % 2][1](b, h, q, k)


def joined(first: Case, second: Case, both: bool) -> Case:
    join = operator.and_ if both else operator.or_
    return join(first[0], second[0]), lambda b, h, q, k: join(bool(first[1](b, h, q, k)), bool(second[1](b, h, q, k)))


def single(batch: int, heads: int, queries: int, keys: int) -> st.SearchStrategy[Case]:
    """Masks of one kind, for query positions below `queries`."""

    def numbers(high: int) -> st.SearchStrategy[tuple[int, ...]]:
        return st.tuples(*[st.integers(0, high)] * batch)

    def tables(rows: int, columns: int) -> st.SearchStrategy[np.ndarray]:
        seeds = st.integers(0, 2**32 - 1)
        return seeds.map(lambda seed: np.random.default_rng(seed).random((batch, heads, rows, columns)) < 0.4)

    def ids(length: int) -> st.SearchStrategy[Any]:
        seeds = st.integers(0, 2**32 - 1)
        return seeds.map(lambda seed: np.random.default_rng(seed).integers(0, 4, (batch, length)).tolist())

    rows, columns = -(-queries // 3), -(-keys // 3)
    return st.one_of(
        st.just((Full(), lambda b, h, q, k: True)),
        st.just((Causal(), lambda b, h, q, k: k <= q)),
        st.builds(
            lambda left, right: (Window(left, right), lambda b, h, q, k: q - left < k < q + right),
            st.integers(1, max(2, queries - 1)),
            st.integers(1, max(2, keys - 3)),
        ),
        st.integers(1, max(2, queries - 2)).map(
            lambda size: (Chunked(size), lambda b, h, q, k: q // size == k // size)
        ),
        numbers(keys).map(lambda n: (Prefix(array(n)), lambda b, h, q, k: k < n[b])),
        st.builds(lengths, numbers(queries), numbers(keys)),
        st.integers(0, 4).map(lambda n: (GlobalTokens(n), lambda b, h, q, k: q < n or k < n)),
        st.builds(documents, ids(queries), ids(keys)),
        tables(queries, keys).map(lambda x: (Dense(array(x, bool)), lambda b, h, q, k: x[b, h, q, k])),
        tables(rows, columns).map(
            lambda x: (BlockSparse(array(x, bool), 3), lambda b, h, q, k: x[b, h, q // 3, k // 3])
        ),
        st.integers(2, 4).map(
            lambda n: (
                Where(lambda b, h, q, k: (q * n + k) % (h + 2) == b),
                lambda b, h, q, k: (q * n + k) % (h + 2) == b,
            )
        ),
    )


def masks(batch: int, heads: int, queries: int, keys: int) -> st.SearchStrategy[Case]:
    """Expressions of up to four masks."""
    return st.recursive(
        single(batch, heads, queries, keys),
        lambda inner: (
            st.builds(joined, inner, inner, st.booleans())
            | inner.map(lambda case: (~case[0], lambda b, h, q, k: not case[1](b, h, q, k)))
            | st.builds(per_head, inner, inner, st.just(heads))
        ),
        max_leaves=4,
    )

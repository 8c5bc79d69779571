"""Bad input to attend: one error, which names the rule and what was given."""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flaxzoo.layers.kernels.attention import attend
from flaxzoo.layers.kernels.attention.masks import (
    BlockSparse,
    Causal,
    Chunked,
    Dense,
    Documents,
    Full,
    GlobalTokens,
    Lengths,
    PerHead,
    Prefix,
    Where,
    Window,
)
from flaxzoo.layers.kernels.attention.scores import RelativeBias, SoftCap

X = jnp.zeros((2, 6, 4, 8))
IDS = jnp.ones((2, 6), jnp.int32)


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Without the tests' own type checker, which would be first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


MASKS: dict[str, tuple[Any, str]] = {
    "none": (lambda: None, r"a mask is made of those in layers/kernels/attention/masks.py.*; got None"),
    "class": (lambda: Causal, "a mask is made of those in layers/kernels/attention/masks.py"),
    "array": (lambda: jnp.ones((1, 1, 6, 6), bool), r"Dense\(array\) makes one of an array, B N T S"),
    "function": (lambda: lambda b, h, q, k: q >= k, r"Where\(function\) one of a function of batch, head, query and"),
    "mask and array": (lambda: Causal() & jnp.ones((6, 6), bool), r"Dense\(array\) makes one of an array"),
    "and": (lambda: Causal() and Window(3), "combined with &, . and ~, not with `and`"),
    "not": (lambda: not Causal(), "combined with &, . and ~, not with `and`"),
    "numbers as Dense": (lambda: Dense(jnp.ones((1, 1, 6, 6))), r"Dense\(array\) must be of type bool, got float32"),
    "integers as Dense": (lambda: ~Dense(jnp.ones((1, 1, 6, 6), int)), r"Dense\(array\) must be of type bool, got int"),
    "two axes": (lambda: Dense(jnp.ones((6, 6), bool)), r"must be B N T S, where B and N may be 1, got shape \(6, 6\)"),
    "heads of Dense": (lambda: Dense(jnp.ones((1, 3, 6, 6), bool)), r"must be 1 N T S with N 4, got shape \(1, 3"),
    "numbers as table": (lambda: BlockSparse(jnp.ones((1, 1, 3, 3)), 2), r"BlockSparse\(table\) must be of type bool"),
    "blocks of nothing": (lambda: BlockSparse(jnp.ones((1, 1, 3, 3), bool), 0), "at least 1 position, got size=0"),
    "ids of floats": (lambda: Documents(jnp.ones((2, 6))), r"Documents\(ids\) must be of type integer, got float32"),
    "ids of one row": (lambda: Documents(jnp.ones(6, int)), r"Documents\(ids\) must have the axes B T, got shape \(6,"),
    "ids of keys": (lambda: Documents(IDS, IDS[:, :5]), r"Documents\(key_ids\) must be B S with S 6, got shape \(2, 5"),
    "marks of numbers": (lambda: GlobalTokens(IDS), r"GlobalTokens\(marks\) must be of type bool, got int32"),
    "list": (lambda: Lengths([3, 4]), r"Lengths\(queries\) must be an array, got \[3, 4\]"),
    "half a token": (lambda: Prefix(2.5), r"Prefix\(lengths\) must be of type integer, got float32"),
    "other batch": (lambda: Lengths(keys=jnp.ones(3, int)), r"Lengths\(keys\) must be B with B 2, got shape \(3,\)"),
    "half a window": (lambda: Window(2.5), r"Window\(left\) must be an integer known when tracing, got 2.5"),
    "half a chunk": (lambda: Chunked(2.0), r"Chunked\(size\) must be an integer known when tracing, got 2.0"),
    "other heads": (lambda: PerHead((Causal(), Full()), (0, 1, 0)), r"PerHead\(choice\) must be N with N 4, got shape"),
    "function of numbers": (lambda: Where(lambda b, h, q, k: q - k), "to a scalar of type bool, got .* type int32"),
    "function of nothing": (
        lambda: Where(lambda b, h, q, k: None),
        "to a scalar of type bool, got a result of nothing",
    ),
    "function with and": (lambda: Where(lambda b, h, q, k: q >= k and h > 1), "is traced: use &, . and jnp.where"),
    "function with numpy": (lambda: Where(lambda b, h, q, k: np.eye(6)[q, k] > 0), "jnp.asarray of an array that it"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    make, message = MASKS[name]
    with refused(message):
        attend(X, X, X, mask=make())


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "score of bfloat16": ({"score": lambda s, *_: s.astype(jnp.bfloat16)}, "scalar of type float32, got .* bfloat16"),
    "score of its own": ({"score": lambda s, b, h, q, k: (q - k).astype(jnp.float32)}, "got one that ignores it"),
    "few buckets": ({"score": RelativeBias(jnp.ones((4, 1)))}, r"got table of shape \(4, 1\) with bidirectional=False"),
    "half a position": ({"query_offset": 0.5}, "query_offset must be of type integer, got float32"),
    "half positions": ({"query_offset": jnp.ones(2)}, "query_offset must be of type integer, got float32"),
    "before the documents": (
        {"mask": Documents(IDS), "query_offset": -1},
        "no entries for positions before 0, got query",
    ),
    "after the documents": ({"mask": Documents(IDS), "query_offset": 1}, r"B T with T at least 7, got shape \(2, 6\)"),
    "key as seed": ({"dropout_rate": 0.5, "dropout_seed": jax.random.key(0)}, "seed must be of type integer, got key"),
    "list of sinks": ({"sinks": [0.0] * 4}, "sinks must be an array, got list"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    options, message = OPTIONS[name]
    with refused(message):
        attend(X, X, X, **{"mask": Causal()} | options)


def test_soft_cap() -> None:
    with pytest.raises(ValueError, match="a soft cap is above 0, got cap=0.0"):
        SoftCap(0.0)


@pytest.mark.parametrize("empty", ["q", "k", "batch"])
def test_empty_arrays(empty: str) -> None:
    q, k = (X[:0] if empty == "batch" else X[:, :0] if name == empty else X for name in ("q", "k"))
    with pytest.raises(ValueError, match="no dimension may be empty, got"):
        attend(q, k, k, mask=Causal())


def test_lists() -> None:
    with refused("q must be an array, got list"):
        attend(X.tolist(), X, X, mask=Causal())


def test_a_traced_window_says_what_to_use() -> None:
    def traced(width: Any) -> Any:
        return attend(X, X, X, mask=Window(width))

    with refused(r"known when tracing, got .*; Where\(function\) takes traced numbers"):
        jax.jit(traced)(3)


def test_what_is_no_error() -> None:
    """Numpy arrays, of any integer type; positions before the keys; a result in and out of jit, vmap and grad."""
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 8)).astype(np.float32)
    ids = np.array([[1, 1, 1, 2, 2, 0]] * 2)
    wanted = attend(jnp.asarray(x), jnp.asarray(x), jnp.asarray(x), mask=Causal() & Documents(jnp.asarray(ids)))
    for dtype in (np.int64, np.uint8):
        mask = Causal() & Documents(ids.astype(dtype))
        np.testing.assert_array_equal(attend(x, x, x, mask=mask), wanted)
        np.testing.assert_allclose(jax.jit(lambda x, mask: attend(x, x, x, mask=mask))(x, mask), wanted, atol=1e-6)
    each = jax.vmap(lambda x, ids: attend(x[None], x[None], x[None], mask=Causal() & Documents(ids[None]))[0])
    np.testing.assert_allclose(each(x, ids.astype(np.int32)), wanted, atol=1e-6)
    early = attend(x, x, x, mask=Causal(), query_offset=np.int64(-3))
    np.testing.assert_array_equal(early[:, :3], 0.0)
    np.testing.assert_allclose(early[:, 3:], attend(x[:, 3:], x, x, mask=Causal()), atol=1e-6)

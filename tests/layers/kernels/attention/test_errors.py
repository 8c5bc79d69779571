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
from flaxzoo.layers.kernels.attention.scores import Alibi, RelativeBias, SoftCap

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
    "window beyond int32": (lambda: Window(4, 2**31), "at most 1073741824, got left=4, right=2147483648; Causal"),
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
    "positions beyond int32": ({"query_offset": 2**31 - 3}, "positions must be from -1073741824 to 1073741824, got"),
    "positions of 64 bits": ({"query_offset": np.array([0, 2**40])}, r"got query_offset=array\(\[.*for T=6 queries"),
    "seed of 64 bits": ({"dropout_rate": 0.5, "dropout_seed": 2**63}, "dropout_seed must fit 32 bits, from .*got 922"),
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
    """Numpy arrays, of any integer type; positions before the keys; unsigned seeds; jit, vmap and grad."""
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 8)).astype(np.float32)
    ids = np.array([[1, 1, 1, 2, 2, 0]] * 2)
    wanted = attend(jnp.asarray(x), jnp.asarray(x), jnp.asarray(x), mask=Causal() & Documents(jnp.asarray(ids)))
    for dtype in (np.int64, np.uint8):
        mask = Causal() & Documents(ids.astype(dtype))
        np.testing.assert_array_equal(attend(x, x, x, mask=mask), wanted)
        np.testing.assert_allclose(jax.jit(lambda x, mask: attend(x, x, x, mask=mask))(x, mask), wanted, atol=1e-6)
    each = jax.vmap(lambda x, ids: attend(x[None], x[None], x[None], mask=Causal() & Documents(ids[None]))[0])
    np.testing.assert_allclose(each(x, ids.astype(np.int32)), wanted, atol=1e-6)
    seeds = [
        attend(x, x, x, mask=Causal(), dropout_rate=0.5, dropout_seed=seed)
        for seed in (-1, 2**32 - 1, np.uint32(2**32 - 1), jnp.int32(-1))
    ]
    for other in seeds[1:]:
        np.testing.assert_array_equal(seeds[0], other)
    early = attend(x, x, x, mask=Causal(), query_offset=np.int64(-3))
    np.testing.assert_array_equal(early[:, :3], 0.0)
    np.testing.assert_allclose(early[:, 3:], attend(x[:, 3:], x, x, mask=Causal()), atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 3, 8), (2, 5, 2, 8), (2, 5, 2, 8)), "multiple of key/value heads, got N=3, K=2"),
        (((2, 5, 2, 8), (2, 5, 2, 4), (2, 5, 2, 4)), r"got \(2, 5, 2, 8\), \(2, 5, 2, 4\)"),
        (((2, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)), "must be B T N H"),
        (((2, 5, 2, 8), (2, 5, 2, 8), (2, 6, 2, 8)), "must be B T N H"),
        (((2, 5, 2, 8), (2, 5, 2, 8), (2, 5, 1, 8)), "must be B T N H"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message, request):
    if not request.config.getoption("no_jaxtyping"):
        import jaxtyping

        message = f"{message}|parameter"
        expected = (ValueError, jaxtyping.TypeCheckError)
    else:
        expected = ValueError
    with pytest.raises(expected, match=message):
        attend(*(jnp.zeros(shape) for shape in shapes), mask=Causal())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mask": Documents(jnp.ones((2, 5), jnp.int32))},
            r"Documents\(ids\) must be B T with T 6, got shape \(2, 5\)",
        ),
        (
            {"mask": Documents(jnp.ones((3, 6), jnp.int32))},
            r"Documents\(ids\) must be B T with B 2, got shape \(3, 6\)",
        ),
        ({"mask": Dense(jnp.ones((1, 1, 6, 7), bool))}, r"Dense\(array\) must be 1 1 T S with S 6"),
        ({"mask": BlockSparse(jnp.ones((1, 1, 2, 2), bool), 2)}, r"BlockSparse\(table\) must be 1 1 T S with T 3"),
        ({"mask": Causal(), "score": Alibi(jnp.ones(3))}, r"Alibi\(slopes\) must be N with N 4, got shape \(3,\)"),
        ({"mask": ~Full()}, "the mask hides every key from every query"),
        ({"mask": Causal(), "query_offset": -6}, "the mask hides every key from every query"),
        (
            {"mask": Causal(), "query_offset": jnp.zeros(3, jnp.int32)},
            r"one for each of B=2 sequences, got shape \(3,\)",
        ),
        ({"mask": Causal(), "sinks": jnp.zeros(3)}, "sinks are a logit for each of N=4 query heads"),
        ({"mask": Causal(), "dropout_rate": 1.0, "dropout_seed": 0}, "dropout_rate is at least 0 and below 1"),
        ({"mask": Causal(), "dropout_rate": 0.5}, "needs a dropout_seed"),
        (
            {"mask": Where(lambda b, h, q, k: jnp.arange(3) == q)},
            r"maps scalars to a scalar of type bool, got a result of type bool and shape \(3,\)",
        ),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(Exception, match=f"{message}|Type-check"):  # the tests' own type checker may be first
        attend(X, X, X, **options)


@pytest.mark.parametrize("dtypes", [(jnp.int32,) * 3, (jnp.float32, jnp.bfloat16, jnp.float32), (jnp.float64,) * 3])
def test_types_that_do_not_fit(dtypes):
    arrays = [np.zeros((1, 2, 2, 8), dtype) for dtype in dtypes]
    with pytest.raises(Exception, match=r"must all be float32, bfloat16 or float16|Float\[Array"):
        attend(*arrays, mask=Causal())  # pyright: ignore


def test_unknown_implementation_names_what_is_close():
    with pytest.raises(Exception, match="portable"):
        attend(X, X, X, mask=Causal(), implementation="portible")  # pyright: ignore[reportArgumentType]

"""Interval arithmetic of masks against every pair: arithmetic that wraps, rounds, overflows or is not a number."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import Case, plain
from flaxzoo.layers.kernels.attention import attend, blocks
from flaxzoo.layers.kernels.attention import pair_function as pairs
from flaxzoo.layers.kernels.attention.attend import Implementation
from flaxzoo.layers.kernels.attention.masks import Mask, Where, Window
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

pytestmark = [
    pytest.mark.usefixtures("quick_compiler"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy's, of constants
]

T, S, BLOCK = 600, 700, 64
OFFSETS = [0, -500, 2**30 - T]
Function = Callable[..., Any]

TABLE = np.sin(np.arange(T, dtype=np.float32)) * 100
TABLE[[70, 200, 201]] = np.nan, np.inf, -np.inf
INTEGERS = ("int8", "uint8", "int32", "uint32")
FLOATS = ("float16", "bfloat16", "float32")
NUMBERS = {
    "integer": (
        -40000,
        -300,
        -129,
        -1,
        0,
        1,
        2,
        3,
        64,
        127,
        128,
        200,
        255,
        30000,
        2**16,
        3000000,
        2**31 - 1,
        2**32 - 1,
    ),
    "float": (-1.5, 0.0, 0.1, 1.0, 3.0, 300.0, 65504.0, 1e30, float("inf"), float("nan")),
}


def number(value: float, dtype: str) -> np.ndarray:
    """A constant; integers wrap as in the masks."""
    with np.errstate(all="ignore"):
        return np.asarray(value).astype(jnp.dtype(dtype))


def joined(function: Function, *operands: Function) -> Function:
    return lambda *index: function(*jnp.broadcast_arrays(*(operand(*index) for operand in operands)))


@st.composite
def leaves(draw: st.DrawFn, dtype: str) -> Function:
    kind = draw(st.sampled_from(["query", "key", "query", "key", "distance", "number", "table"]))
    if kind == "number":
        constant = number(draw(st.sampled_from(NUMBERS["float" if dtype in FLOATS else "integer"])), dtype)
        return lambda q, k: jnp.asarray(constant)
    if kind == "table" and dtype == "float32":
        return lambda q, k: jnp.asarray(TABLE)[q % T]
    choose = {"key": lambda q, k: k, "distance": lambda q, k: q - k}.get(kind, lambda q, k: q)
    return lambda q, k: choose(q, k).astype(dtype)


@st.composite
def numbers(draw: st.DrawFn, dtype: str, depth: int) -> Function:
    """A function of query and key that gives numbers of a dtype."""
    if depth == 0:
        return draw(leaves(dtype))
    more = partial(numbers, depth=depth - 1)
    exact = dtype in INTEGERS
    positive = number(draw(st.sampled_from([1, 2, 3, 7, 64, 100])), dtype)
    binary = [lax.add, lax.sub, lax.mul, lax.mul, lax.min, lax.max] + [lax.bitwise_and, lax.bitwise_xor] * exact
    unary = [
        jnp.abs,
        lax.sign,
        lambda x: lax.integer_pow(x, 2),
        lambda x: lax.div(x, jnp.full_like(x, positive)),
        lax.neg,
    ]
    unary += [
        lambda x: lax.rem(x, jnp.full_like(x, positive)),
        lambda x: lax.shift_left(x, jnp.full_like(x, 3)),
    ] * exact
    match draw(st.sampled_from(["binary", "binary", "unary", "convert", "select"] + ["vector"] * exact)):
        case "binary":
            return joined(draw(st.sampled_from(binary)), draw(more(dtype)), draw(more(dtype)))
        case "unary":
            return joined(draw(st.sampled_from(unary)), draw(more(dtype)))
        case "convert":
            return joined(lambda x: x.astype(dtype), draw(more(draw(st.sampled_from(INTEGERS + FLOATS)))))
        case "select":
            return joined(jnp.where, draw(truths(0)), draw(more(dtype)), draw(more(dtype)))
    weights = np.arange(4).astype(jnp.dtype(dtype))
    return joined(lambda x: (x[..., None] * jnp.asarray(weights)).max(-1), draw(more(dtype)))


@st.composite
def truths(draw: st.DrawFn, depth: int) -> Function:
    """A comparison, or two of them combined."""
    if depth and draw(st.booleans()):
        join = draw(st.sampled_from([operator.and_, operator.or_, operator.xor, operator.ne]))
        return joined(join, draw(truths(depth - 1)), draw(truths(depth - 1)))
    dtype = draw(st.sampled_from(INTEGERS + FLOATS))
    if draw(st.integers(0, 9)) == 0:
        return joined(lambda x: x.astype(bool), draw(numbers(dtype, depth)))
    compare = draw(st.sampled_from([lax.lt, lax.le, lax.gt, lax.ge, lax.eq, lax.ne]))
    return joined(compare, draw(numbers(dtype, 2)), draw(numbers(dtype, depth)))


def every_pair(traced: pairs.PairFunction, hoisted: list[jax.Array], sizes: pairs.Sizes) -> np.ndarray:
    """T x S, evaluated as arrays, as the reference implementation does."""

    @jax.jit
    def evaluate(hoisted: list[jax.Array]) -> jax.Array:
        values, index = dict(zip(traced.hoisted, hoisted, strict=True)), pairs.positions(sizes)

        def read(value: pairs.Value) -> jax.Array:
            array = index[value.leaf] if value.leaf else values[value]
            if value.shape or value.side == "neither":
                return array if value.shape else array[..., None]
            return array[..., None] if value.side == "query" else array[..., None, :]

        (seen,) = traced.evaluate(read)
        return jnp.broadcast_to(seen, (1, 1, T, S))[0, 0]

    return np.asarray(evaluate(hoisted))


def in_blocks(seen: np.ndarray) -> list[np.ndarray]:
    """Whether all pairs, and whether any pairs, of each block are visible."""
    padding = [(0, -size % BLOCK) for size in seen.shape]
    shape = (seen.shape[0] + padding[0][1]) // BLOCK, BLOCK, -1, BLOCK
    every, some = (np.pad(seen, padding, constant_values=value).reshape(shape) for value in (True, False))
    return [every.all((1, 3)), some.any((1, 3))]


@settings(max_examples=50)
@given(truths(2), st.sampled_from(OFFSETS))
def test_bounds_hold_for_the_arithmetic_of_every_dtype(function: Function, offset: int) -> None:
    traced, sizes = pairs.trace(lambda b, h, q, k: function(q, k)), pairs.Sizes(1, 1, T, S, offset)
    hoisted = jax.jit(lambda: traced.hoisted_values(sizes))() if traced.hoisted else []
    values = dict(zip(traced.hoisted, map(np.asarray, hoisted), strict=True))
    interval, _ = blocks._visible(np, traced, values, sizes, BLOCK, BLOCK)
    always, sometimes = in_blocks(every_pair(traced, hoisted, sizes))
    assert not (interval.low & ~always).any()
    assert not (~interval.high & sometimes).any()


u32, i8, f32 = jnp.uint32, jnp.int8, jnp.float32
SHARP: dict[str, Function] = {
    "a window by one comparison": lambda q, k: (q - k).astype(u32) < 64,
    "a window by one comparison of int8": lambda q, k: lax.div(q, 64).astype(i8) - lax.div(k, 64).astype(i8) < i8(2),
    "unsigned differences": lambda q, k: q.astype(u32) - k.astype(u32) < u32(200),
    "negated unsigned numbers": lambda q, k: -k.astype(u32) >= u32(2**32 - 200),
    "all numbers wrapped alike": lambda q, k: q.astype(u32) - u32(3000) < k.astype(u32) - u32(3000),
    "negative numbers divided": lambda q, k: lax.div(k - q, 100) == 0,
    "remainders of negative numbers": lambda q, k: (lax.rem(k - 700, 64) < 0) & (k < q),
    "floats": lambda q, k: q.astype(f32) * 0.5 < k.astype(f32),
    "not a number": lambda q, k: (jnp.asarray(TABLE)[q] < 0) & (k < 300),
    "booleans": lambda q, k: (q < 100) ^ (k < 100),
    "numbers as booleans": lambda q, k: (q // 64 - k // 64).astype(bool),
}


@pytest.mark.parametrize("name", SHARP)
def test_blocks_without_a_wrap_keep_their_kinds(name: str) -> None:
    """No block is partial that is empty or full, unless values on either side of a wrap or of zero occur in it."""
    function = SHARP[name]
    traced, sizes = pairs.trace(lambda b, h, q, k: function(q, k)), pairs.Sizes(1, 1, T, S)
    hoisted = traced.hoisted_values(sizes)
    always, sometimes = in_blocks(every_pair(traced, hoisted, sizes))
    always[:, -1] = False  # a block that the keys do not fill
    assert (always | ~sometimes).any()

    def classify(hoisted: list[Any]) -> Any:
        return blocks.classify(traced, hoisted, sizes, BLOCK, BLOCK, kv_heads=1).kinds(-(-S // BLOCK))

    arrays = [np.asarray(x) for x in hoisted]
    for kinds in (classify(arrays), jax.jit(lambda *x: classify(list(x)))(*hoisted)):
        np.testing.assert_array_equal(kinds[0, 0], sometimes.astype(int) + always)


WRAPS: dict[str, Mask] = {
    "unsigned": Where(lambda b, h, q, k: (q - k).astype(jnp.uint32) < 64),
    "product": Where(lambda b, h, q, k: (q * 10_000_019 - k * 9_999_991) * 3 < 5),
    "not a number": Where(lambda b, h, q, k: ~(jnp.asarray(TABLE)[q % T] < k.astype(jnp.float32))),
}


@pytest.mark.parametrize("name", WRAPS)
def test_every_implementation_sees_the_same_pairs(name: str) -> None:
    case = Case((1100, 1100, 1, 1, 8, 8), WRAPS[name])
    inputs = {n: x[:1] for n, x in case.inputs().items()}
    wanted = plain(case, **inputs)
    implementations: tuple[Implementation, ...] = ("portable", "tpu")
    for implementation in implementations:
        attention = partial(attend, mask=case.mask, implementation=implementation)
        out = jax.jit(lambda x, attention=attention: attention(**x))(inputs)
        np.testing.assert_allclose(out, wanted[:1], rtol=1e-5, atol=1e-5, err_msg=implementation)


def test_arrays_for_each_pair_are_evaluated() -> None:
    """A choice between arrays, and a sum over one, have no interval."""
    mask = Where(lambda b, h, q, k: jnp.where(q > k, jnp.arange(8), -jnp.arange(8)).sum() > 3)
    x = jax.random.normal(jax.random.key(0), (1, 600, 1, 8))
    found = jax.jit(lambda x: attend(x, x, x, mask=mask))(x)
    np.testing.assert_allclose(found, attend(x, x, x, mask=Window(600) & ~Window(1)), rtol=1e-5, atol=1e-5)

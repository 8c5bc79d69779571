"""Products in 8 bits: what is rounded, what is exact, and that gradients are such products, too."""

import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flaxzoo.layers.linear.einsum import einsum
from flaxzoo.layers.linear.matmul import current, quantized
from jax.extend.core import jaxprs_in_params

X = np.random.default_rng(0).normal(size=(2, 24, 64)).astype(np.float32) * np.geomspace(0.01, 10, 24)[None, :, None]
WEIGHT = np.random.default_rng(1).normal(size=(64, 4, 16)).astype(np.float32)
COTANGENT = np.random.default_rng(2).normal(size=(2, 24, 4, 16)).astype(np.float32)
X = X.astype(np.float32)


def rounded(x, summed, dtype):
    """Each row scaled so that its largest number is the largest of the dtype, and rounded to it; in float64."""
    largest = 127.5 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    scale = np.abs(x).max(axis=summed, keepdims=True).astype(np.float32) / np.float32(largest)
    ratio = x / scale
    return (np.clip(np.rint(ratio), -128, 127) if dtype == np.int8 else ratio.astype(dtype)).astype(np.float64) * scale


def outcome(kind, dtype=jnp.float32):
    def product(x, weight):
        with quantized(kind):
            return einsum("B T D, D N H -> B T N H", x, weight)

    y, pull = jax.vjp(product, jnp.asarray(X, dtype), jnp.asarray(WEIGHT, dtype))
    return y, *pull(jnp.asarray(COTANGENT, dtype))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_products_are_those_of_rounded_rows(kind):
    value, of_gradient = {"int8": (np.int8, np.int8), "fp8": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}[kind]
    wanted = [
        np.einsum("btd,dnh->btnh", rounded(X, 2, value), rounded(WEIGHT, 0, value)),
        np.einsum("btnh,dnh->btd", rounded(COTANGENT, (2, 3), of_gradient), rounded(WEIGHT, (1, 2), value)),
        np.einsum("btd,btnh->dnh", rounded(X, (0, 1), value), rounded(COTANGENT, (0, 1), of_gradient)),
    ]
    for found, expected, exact in zip(outcome(kind), wanted, outcome("none"), strict=True):
        # With int8 the largest of each row lies between two integers, and may be rounded to either.
        share = np.linalg.norm(found - expected) / np.linalg.norm(exact - expected)
        assert share < (0.35 if kind == "int8" else 1e-5)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("fp8", 0.06)])
def test_the_error_is_that_of_8_bits(kind, most):
    for found, exact in zip(outcome(kind), outcome("none"), strict=True):
        error = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
        assert 1e-4 < error < most


def products_of(jaxpr):
    """The dtypes of both sides and of the result of every product in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            yield tuple(str(value.aval.dtype) for value in (*equation.invars, *equation.outvars))
        for inside in jaxprs_in_params(equation.params):
            yield from products_of(inside)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_products_are_in_8_bits(kind, dtype):
    found = list(products_of(jax.jit(lambda: outcome(kind, dtype)).trace().jaxpr.jaxpr))
    if kind == "int8":
        assert found == [("int8", "int8", "int32")] * 3
    else:
        forward, *backward = (sorted(each[:2]) for each in found)
        assert forward == ["float8_e4m3fn"] * 2
        assert backward == [["float8_e4m3fn", "float8_e5m2"]] * 2
        assert {each[2] for each in found} == {"float32"}


def test_the_setting_ends_with_its_block():
    with quantized("int8"):
        assert current() == "int8"
        with quantized("none"):
            assert current() == "none"
    assert current() == "none"


def test_without_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"products in 8 bits need qwix: pip install 'flaxzoo\[quantized\]'"):
        outcome("int8")
    outcome("none")

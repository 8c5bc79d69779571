"""Matmuls in 8 bits: what is rounded, what is exact, and that gradients are such matmuls too."""

import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flaxzoo.layers.block import Block
from flaxzoo.layers.linear.einsum import einsum
from flaxzoo.layers.mixers.attention import Attention
from flaxzoo.layers.mixers.latent import MLA
from flaxzoo.layers.mlp import MLP, GatedMLP
from flaxzoo.layers.stack import Execution
from flaxzoo.zoo.decoder import Decoder
from flaxzoo.zoo.parameters import describe
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
        return einsum("B T D, D N H -> B T N H", x, weight, kind=kind)

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


@pytest.mark.parametrize("mixer", ["gqa", "mla"])
def test_every_matmul_with_a_weight_of_a_block_has_the_kind_of_the_call(mixer):
    mixers = {
        "gqa": Attention(heads=4, kv_heads=2, head_dim=8),
        "mla": MLA(heads=4, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4, query_rank=8),
    }
    plain, gated = (Block(mixer=mixers[mixer], ffn=ffn) for ffn in (MLP(hidden=16), GatedMLP(hidden=16)))
    model = Decoder(vocab=20, dim=16, layers=3, first=(plain,), block=(gated, plain)).abstract()
    tokens = jnp.zeros((2, 8), jnp.int32)

    def in_8_bits(kind):
        program = jax.make_jaxpr(lambda model: model.hidden(tokens, execution=Execution(kind=kind)).x)(model)
        return sum("int8" in dtypes for dtypes in products_of(program.jaxpr))

    matrices = [name for name, known in describe(model).items() if known.inputs and name != "embedding.table"]
    assert in_8_bits("int8") == len(matrices)
    assert in_8_bits("none") == 0


def test_without_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"matmuls in 8 bits need qwix: pip install 'flaxzoo\[quantized\]'"):
        outcome("int8")
    outcome("none")

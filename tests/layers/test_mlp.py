"""Feed-forward layers, activations and linear maps against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo.layers.linear.embedding import Embedding
from flaxzoo.layers.linear.linear import Linear
from flaxzoo.layers.mlp import ACTIVATIONS, MLP, GatedMLP

DIM, HIDDEN = 6, 10
X = np.random.default_rng(0).normal(size=(2, 3, DIM)).astype(np.float32)
PLAIN = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def test_every_activation_is_tested():
    assert ACTIVATIONS.keys() == PLAIN.keys()


@pytest.mark.parametrize("name", PLAIN)
def test_activation(name):
    x = np.linspace(-5, 5, 101)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), PLAIN[name](x), rtol=1e-5, atol=2e-6)


def random_biases(layer, *names):
    for seed, name in enumerate(names):
        bias = getattr(layer, name).bias
        bias[...] = jax.random.normal(jax.random.key(seed), bias.shape)


def affine(linear, x):
    y = x @ np.asarray(linear.weight[...], np.float64)
    return y if linear.bias is None else y + np.asarray(linear.bias[...])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", PLAIN)
def test_mlp(activation, bias):
    layer = MLP(hidden=HIDDEN, activation=activation, bias=bias).build(DIM, rngs=nnx.Rngs(0))
    if bias:
        random_biases(layer, "up", "down")
    wanted = affine(layer.down, PLAIN[activation](affine(layer.up, X)))
    np.testing.assert_allclose(layer(jnp.asarray(X)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", PLAIN)
def test_gated_mlp(activation, bias):
    layer = GatedMLP(hidden=HIDDEN, activation=activation, bias=bias).build(DIM, rngs=nnx.Rngs(0))
    if bias:
        random_biases(layer, "gate", "up", "down")
    wanted = affine(layer.down, PLAIN[activation](affine(layer.gate, X)) * affine(layer.up, X))
    np.testing.assert_allclose(layer(jnp.asarray(X)), wanted, rtol=1e-5, atol=1e-5)


def test_gated_mlp_with_limit_and_offset():
    layer = GatedMLP(hidden=HIDDEN, activation="quick_gelu", limit=0.5, offset=1.0).build(DIM, rngs=nnx.Rngs(0))
    gate, up = affine(layer.gate, X), affine(layer.up, X)
    assert min(gate.min(), up.min()) < -0.5
    assert min(gate.max(), up.max()) > 0.5
    wanted = affine(layer.down, PLAIN["quick_gelu"](np.minimum(gate, 0.5)) * (np.clip(up, -0.5, 0.5) + 1))
    np.testing.assert_allclose(layer(jnp.asarray(X)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [MLP(hidden=HIDDEN), GatedMLP(hidden=HIDDEN)], ids=["mlp", "gated"])
def test_flops_count_two_for_each_weight(spec):
    layer = spec.build(DIM, rngs=nnx.Rngs(0))
    matrices = [x for x in jax.tree.leaves(layer) if x.ndim == 2]
    assert spec.flops(DIM) == 2 * sum(x.size for x in matrices)


def test_bfloat16_stays_and_parameters_are_float32():
    layer = MLP(hidden=HIDDEN).build(DIM, rngs=nnx.Rngs(0))
    assert layer(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(layer)} == {jnp.dtype(jnp.float32)}


def test_linear_between_named_axes():
    sizes = {"D": 6, "N": 4, "H": 5}
    split, joined = (Linear(axes, sizes, rngs=nnx.Rngs(0)) for axes in ("D -> N H", "N H -> D"))
    heads = np.einsum("BTD,DNH->BTNH", X, split.weight[...])
    np.testing.assert_allclose(split(jnp.asarray(X)), heads, rtol=1e-5, atol=1e-5)
    wanted = np.einsum("BTNH,NHD->BTD", heads, joined.weight[...])
    np.testing.assert_allclose(joined(jnp.asarray(heads)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", ["D -> F", "F -> D", "N H -> D"])
def test_weights_start_with_the_deviation_of_their_inputs(axes):
    sizes = {"D": 256, "F": 400, "N": 8, "H": 16}
    inputs = math.prod(sizes[letter] for letter in axes.split("->")[0].split())
    weight = np.asarray(Linear(axes, sizes, rngs=nnx.Rngs(0)).weight[...])
    assert weight.std() == pytest.approx(inputs**-0.5, rel=0.02)


def test_embedding_rows():
    table = Embedding("V D", 11, DIM, rngs=nnx.Rngs(0), std=0.5)
    ids = jnp.asarray([[0, 10, 3], [3, 3, 1]], jnp.int32)
    np.testing.assert_array_equal(table(ids, jnp.float32), np.asarray(table.table[...])[np.asarray(ids)])
    assert table(ids, jnp.bfloat16).dtype == jnp.bfloat16
    assert np.asarray(table.table[...]).std() == pytest.approx(0.5, rel=0.2)

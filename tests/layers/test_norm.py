"""Norms against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.norm import LayerNorm, RMSNorm

X = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, 4, 40)) * np.array([1.0, 1e-3, 1e3])[:, None, None]
SCALE, BIAS = np.random.default_rng(1).normal(size=(2, 40))
SPECS = {
    "rms": RMSNorm(),
    "rms, eps": RMSNorm(eps=0.1),
    "rms, zero-centred": RMSNorm(zero_centered=True),
    "layer": LayerNorm(),
    "layer, eps": LayerNorm(eps=0.1),
    "layer, no bias": LayerNorm(bias=False),
}


def layer(spec):
    made = spec.build("D", 40)
    made.scale[...] = jnp.asarray(SCALE, jnp.float32)
    if getattr(made, "bias", None) is not None:
        made.bias[...] = jnp.asarray(BIAS, jnp.float32)
    return made


def formula(spec, x):
    if isinstance(spec, RMSNorm):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.eps) * (SCALE + spec.zero_centered)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + spec.eps) * SCALE
    return y + BIAS * spec.bias


@pytest.mark.parametrize("name", SPECS)
def test_formula(name):
    y = layer(SPECS[name])(jnp.asarray(X, jnp.float32))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, formula(SPECS[name], X), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_starts_as_the_bare_normalisation(name):
    spec = SPECS[name]
    y = np.asarray(spec.build("D", 40)(jnp.asarray(X, jnp.float32)))
    bare = formula(spec, X) - (BIAS if getattr(spec, "bias", False) else 0.0)
    factor = SCALE + (1.0 if getattr(spec, "zero_centered", False) else 0.0)
    np.testing.assert_allclose(y, bare / factor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SPECS)
def test_low_precision_is_float32_rounded_once(name, dtype):
    x, made = jnp.asarray(X[:, :2], dtype), layer(SPECS[name])
    y = made(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, made(x.astype(jnp.float32)).astype(dtype))


@pytest.mark.parametrize("name", SPECS)
def test_a_row_of_zeros_has_a_finite_value_and_gradient(name):
    made = layer(SPECS[name])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(made(x)))(jnp.zeros((1, 40)))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_defaults_are_the_papers():
    assert RMSNorm() == RMSNorm(eps=1e-6, zero_centered=False)
    assert LayerNorm() == LayerNorm(eps=1e-5, bias=True)

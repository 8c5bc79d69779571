"""Products with the matrix of a group: blocks, XLA's ragged product and a plain loop give the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.kernels.grouped import matmul as grouped

pytestmark = pytest.mark.usefixtures("quick_compiler")
SIZES = {
    "uneven": [5, 0, 21, 1, 0, 13],
    "one group has all": [0, 0, 40, 0],
    "one row": [0, 1, 0],
    "one each": [1] * 9,
    "many blocks": [300, 2, 700],
}


def plain(x, weights, sizes):
    ends = np.cumsum(sizes)
    return np.concatenate([x[end - size : end] @ w for w, size, end in zip(weights, sizes, ends, strict=True)])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("implementation", ["blocks", "ragged"])
def test_forward_and_gradients(name, implementation, monkeypatch):
    sizes = SIZES[name]
    random = np.random.default_rng(0)
    x = random.normal(size=(sum(sizes), 7))
    weights = random.normal(size=(len(sizes), 7, 5))
    g = random.normal(size=(sum(sizes), 5))
    if implementation == "ragged":
        monkeypatch.setattr(grouped, "_blocks", grouped._ragged)
        monkeypatch.setattr(grouped, "_outer_blocks", grouped._outer_ragged)
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, weights)]
    counts = jnp.asarray(sizes, jnp.int32)
    y, pull = jax.vjp(functools.partial(grouped.grouped_product, sizes=counts), *arrays)
    x_grad, weights_grad = pull(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(y, plain(x, weights, sizes), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_grad, plain(g, weights.swapaxes(1, 2), sizes), rtol=1e-5, atol=1e-5)
    ends = np.cumsum(sizes)
    wanted = [x[end - size : end].T @ g[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    np.testing.assert_allclose(weights_grad, wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays():
    sizes = jnp.asarray(SIZES["uneven"], jnp.int32)
    x = jax.random.normal(jax.random.key(0), (40, 16), jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(1), (6, 16, 8), jnp.bfloat16)
    y, pull = jax.vjp(functools.partial(grouped.grouped_product, sizes=sizes), x, weights)
    assert {array.dtype for array in (y, *pull(y))} == {jnp.dtype(jnp.bfloat16)}
    wide = plain(np.asarray(x, np.float32), np.asarray(weights, np.float32), SIZES["uneven"])
    np.testing.assert_allclose(np.asarray(y, np.float32), wide, rtol=0.02, atol=0.02)


def test_the_cpu_multiplies_no_row_with_the_matrix_of_another_group():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 64), (64, 64, 64))]
    sizes = jax.ShapeDtypeStruct((64,), jnp.int32)

    def memory(function):
        analysis = jax.jit(function).lower(*shapes, sizes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert memory(grouped.grouped_product) < memory(jax.lax.ragged_dot) / 10  # XLA repeats the rows for each group

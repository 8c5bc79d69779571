"""The schedule of a pipeline, with functions that are not a model: what comes of it is what they compose to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.sharding import pipeline, stages
from flaxzoo.layers.sharding.deferred_gradient import DeferredGradient
from jax.sharding import AxisType, NamedSharding, PartitionSpec

pytestmark = pytest.mark.usefixtures("quick_compiler")

B, T, D, V = 4, 8, 6, 11


def enter(outer: Any, tokens: Any, micro: Any) -> Any:
    one_hot = (tokens[..., None] == jnp.arange(V, dtype=jnp.int32)).astype(jnp.float32)
    x = jnp.einsum("btv,vd->btd", one_hot, outer["table"]) + outer["shift"]
    return x, {"sum": total(x[..., 0] * x[..., 1], micro)}


def layer(weights: Any, x: Any, micro: Any) -> Any:
    inside = jnp.einsum("btd,df->btf", x, weights["up"])
    # Divides by what depends on x: where there is no micro-batch, it may not become infinite.
    hidden = inside / (jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    x = x + jnp.einsum("btf,fd->btd", hidden, weights["down"])
    return x, {"squares": total(jnp.mean(jnp.square(hidden), axis=-1), micro)}


def leave(outer: Any, x: Any, micro: Any) -> Any:
    x = x * outer["scale"]
    return x, {"last": total(x[..., 0], micro)}


def finish(outer: Any, x: Any, micro: Any) -> Any:
    logits = jnp.einsum("btd,vd->btv", x, outer["table"])
    picked = micro["targets"][..., None] == jnp.arange(V, dtype=jnp.int32)
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(picked, logits, 0.0), axis=-1)
    other = jnp.sum(jnp.max(logits, axis=-1) * micro["weights"])
    return jnp.sum(nll * micro["weights"]), jax.lax.stop_gradient(other)


def total(each: Any, micro: Any) -> Any:
    """The sum over what is no padding."""
    return jnp.sum(jnp.where(micro["segments"] != 0, each, 0.0))


PARTS = pipeline.Parts(enter, layer, leave, finish)


@functools.cache
def weights(layers: int) -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 5))
    outer = {
        "table": jax.random.normal(next(keys), (V, D)),
        "shift": jax.random.normal(next(keys), (D,)),
        "scale": jax.random.normal(next(keys), (D,)),
    }
    up, down = (jax.random.normal(next(keys), (layers, *shape)) for shape in ((D, 9), (9, D)))
    return outer, {"up": up, "down": down}


def batch(count: int) -> dict[str, np.ndarray]:
    source = np.random.default_rng(1)
    ids = {name: source.integers(0, V, (count, B, T)).astype(np.int32) for name in ("tokens", "targets")}
    segments = source.integers(0, 3, (count, B, T)).astype(np.int32)
    return ids | {"segments": segments, "weights": source.random((count, B, T)).astype(np.float32)}


def plain(outer: Any, stack: Any, micro_batches: Any, prices: Any) -> Any:
    """The same without stages: the gradient of the loss and of the prices, what there is to tell beside."""

    def one(micro: Any) -> Any:
        x, before = enter(outer, micro["tokens"], micro)
        x, of_layers = jax.lax.scan(lambda x, weights: layer(weights, x, micro), x, stack)
        x, after = leave(outer, x, micro)
        loss, other = finish(outer, x, micro)
        return pipeline.Sums(loss, other, (before, of_layers, after))

    sums = jax.tree.map(lambda each: jnp.sum(each, axis=0), jax.lax.map(one, micro_batches))
    priced = jax.tree.leaves(jax.tree.map(lambda report, price: jnp.sum(report * price), sums.reports, prices))
    return sums.loss + sum(priced), sums


PRICES: Any = {"sum": 0.3}, {"squares": 0.01}, {"last": -0.2}


@functools.cache
def expected(layers: int, count: int, priced: bool) -> Any:
    prices = jax.tree.map(lambda price: price * priced, PRICES)
    whole = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))
    (_, sums), grads = whole(*weights(layers), batch(count), prices)
    return jax.device_get((sums, grads))


def placed(layers: int, count: int, **sizes: int) -> Any:
    """A mesh, and weights and micro-batches on it; rows are split over data."""
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))
    rows = PartitionSpec(None, "data" if sizes.get("data", 1) > 1 else None)
    outer, stack = weights(layers)
    here = jax.device_put(outer, NamedSharding(mesh, PartitionSpec()))
    split = jax.device_put(stack, NamedSharding(mesh, PartitionSpec("pipeline")))
    return mesh, (here, split, jax.device_put(batch(count), NamedSharding(mesh, rows)))


def close(found: Any, wanted: Any) -> None:
    named = jax.tree.leaves_with_path(jax.device_get(found))
    for (path, one), other in zip(named, jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5 * np.abs(other).max(), err_msg=str(path))


@pytest.mark.parametrize(
    ("sizes", "layers", "count"),
    [
        pytest.param({"pipeline": 4}, 8, 2, marks=pytest.mark.slow),  # fewer micro-batches than stages
        ({"pipeline": 4, "data": 2}, 4, 9),  # more than the queue holds
        ({"pipeline": 2, "data": 1}, 4, 1),
    ],
    ids=["few", "many", "one"],
)
def test_stages_compute_what_the_layers_compose_to(sizes: dict[str, int], layers: int, count: int) -> None:
    """Also where a stage has nothing to do, and gets zeros that a layer would divide by."""
    mesh, arrays = placed(layers, count, **sizes)
    with jax.set_mesh(mesh):
        assert stages.count() == sizes["pipeline"]
        if count > 2:
            close(jax.jit(functools.partial(pipeline.forward, PARTS))(*arrays), expected(layers, count, False)[0])
        close(jax.jit(functools.partial(pipeline.gradients, PARTS))(*arrays), expected(layers, count, False))


def test_reports_have_a_price() -> None:
    layers, count = 4, 5
    mesh, arrays = placed(layers, count, pipeline=2)
    with jax.set_mesh(mesh):
        first, middle, last = jax.tree.map(jnp.asarray, PRICES)
        middle = jax.tree.map(lambda x: jnp.full(layers, x, out_sharding=PartitionSpec("pipeline")), middle)
        found = jax.jit(functools.partial(pipeline.gradients, PARTS))(*arrays, (first, middle, last))
    close(found, expected(layers, count, True))
    with pytest.raises(AssertionError):
        close(found, expected(layers, count, False))


def test_memory_does_not_grow_with_the_micro_batches() -> None:
    def temporary(count: int) -> int:
        mesh, arrays = placed(2, count, pipeline=2)
        with jax.set_mesh(mesh):
            program = jax.jit(functools.partial(pipeline.gradients, PARTS)).lower(*arrays).compile()
        found = program.memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    assert temporary(32) <= temporary(4) + 28 * B * T * 4  # at most a number for each token, and an activation has D


def test_bubble() -> None:
    assert stages.bubble(4, 12) == 3 / 15
    assert stages.bubble(1, 5) == 0
    assert stages.count() == 1


# Gradients that are taken later.


def grads_later(function: Any, weights: Any, x: Any, given: Any) -> tuple[Any, Any, list[Any]]:
    later = DeferredGradient(function, weights, x, given)
    y, kept = later.forward(weights, x, given)
    return y, later.backward(weights, given, kept, jax.tree.map(jnp.ones_like, y)), kept


def test_nothing_is_kept_that_does_not_depend_on_x() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    weight, x, angles = (jax.random.normal(key, (5, 5)) for key in keys)

    def function(weight: Any, x: Any, given: Any) -> Any:
        table = jnp.sin(given)
        return jnp.tanh(x @ weight.astype(jnp.bfloat16).astype(jnp.float32).T) * table

    def both(weight: Any, x: Any) -> Any:
        y, back = jax.vjp(lambda weight, x: function(weight, x, angles), weight, x)
        return y, back(jnp.ones_like(y))

    y, grads, kept = grads_later(function, weight, x, angles)
    jax.tree.map(np.testing.assert_array_equal, (y, grads), both(weight, x))
    assert all(np.all(each != weight.astype(jnp.bfloat16).astype(jnp.float32)) for each in kept)
    assert all(not np.array_equal(each, jnp.sin(angles)) for each in kept)


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_says_what_is_kept(saved: bool) -> None:
    policies = jax.checkpoint_policies
    policy = policies.dots_saveable if saved else policies.nothing_saveable
    weights = jnp.ones((3, 7)), jnp.ones((7, 3))

    @functools.partial(jax.checkpoint, policy=policy)
    def function(weights: Any, x: Any, given: Any) -> Any:
        return jnp.sin(jnp.sin(x @ weights[0]) @ weights[1]) * given

    _, _, kept = grads_later(function, weights, jnp.ones((2, 3)), jnp.float32(2.0))
    assert [x.shape for x in kept] == ([(2, 3), (2, 7), (2, 3)] if saved else [(2, 3)])

"""The training step: its loss and gradient do not depend on how tokens are laid out, and what it does to the state."""

import functools
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flaxzoo.configs import Optimizer, Run
from flaxzoo.layers.mixers.mixer import Positions
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.step import (
    State,
    _gradients,
    abstract_batch,
    abstract_state,
    best_parameters,
    initial_state,
    make_step,
)
from flaxzoo.zoo.parameters import Parameters, describe, merge, split

pytestmark = pytest.mark.usefixtures("quick_compiler")

Batch = dict[str, Any]
Outcome = tuple[jax.Array, jax.Array, Parameters]


def documents(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    """Documents of so many tokens and one, so that each has as many targets as its length."""
    source = np.random.default_rng(seed)
    return [source.integers(1, 300, length + 1).astype(np.int32) for length in lengths]


def rows(packed: list[list[np.ndarray]], width: int, *, left: bool = False) -> Batch:
    """Each list of documents in a row, padded to `width` on the right or on the left."""
    batch: Batch = {
        name: np.zeros((len(packed), width), np.int32) for name in ("tokens", "targets", "segments", "positions")
    }
    batch["weights"] = np.zeros((len(packed), width), np.float32)
    for row, texts in enumerate(packed):
        start = width - sum(len(text) - 1 for text in texts) if left else 0
        for index, text in enumerate(texts):
            place = (row, slice(start, start := start + len(text) - 1))
            batch["tokens"][place], batch["targets"][place] = text[:-1], text[1:]
            batch["segments"][place], batch["positions"][place] = index + 1, np.arange(len(text) - 1)
            batch["weights"][place] = 1
    return jax.tree.map(jnp.asarray, batch)


def random_batch(run: Run, seed: int = 0) -> Batch:
    return rows([[text] for text in documents(*[run.length] * run.batch, seed=seed)], run.length)


@functools.cache
def parameters_of(run: Run) -> Parameters:
    """Parameters far from their start, where everything matters."""
    fresh = split(run.model.build(rngs=nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(1), len(fresh))
    return {
        name: x + 0.03 * jax.random.normal(key, x.shape) for key, (name, x) in zip(keys, fresh.items(), strict=True)
    }


@functools.cache
def compiled(run: Run) -> Any:
    return jax.jit(functools.partial(_gradients, run, run.model.abstract()))


def gradients(run: Run, batch: Batch) -> Outcome:
    """Loss, likelihood and gradient."""
    return compiled(run)(parameters_of(run), batch)[:3]


def difference(left: Outcome, right: Outcome) -> float:
    """The largest relative difference of the losses, and of the whole gradient."""

    def relative(a: Any, b: Any) -> float:
        change = optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
        return float(change / optax.tree.norm(b))

    return max(map(relative, left, right))


# How the batch is laid out.

TOKENS = (1, 32, 3, 20, 2, 32, 0, 7)


@pytest.fixture
def uneven(tiny: Run) -> Batch:
    """Eight rows of very different numbers of tokens, one of them empty."""
    texts = documents(*TOKENS)
    return rows([[text] if len(text) > 1 else [] for text in texts], tiny.length)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulation_changes_nothing(tiny: Run, uneven: Batch, micro_batches: int) -> None:
    whole = gradients(tiny, uneven)
    assert difference(gradients(tiny.replace(accumulate=micro_batches), uneven), whole) < 2e-6


def test_accumulation_is_not_a_mean_of_means(tiny: Run, uneven: Batch) -> None:
    """The mean over micro-batches of their own means, which others have shipped, is far from it on these rows."""
    whole = gradients(tiny, uneven)
    micros = [{name: x[index::4] for name, x in uneven.items()} for index in range(4)]
    parts = [gradients(tiny.replace(batch=2), micro) for micro in micros]
    weighted = [float(jnp.sum(micro["weights"])) for micro in micros]
    assert max(weighted) > 5 * min(weighted) > 0
    total = sum(weighted)
    right = jax.tree.map(lambda *x: sum(w / total * y for w, y in zip(weighted, x, strict=True)), *parts)
    wrong = jax.tree.map(lambda *x: sum(x) / 4, *parts)
    assert difference(right, whole) < 2e-6
    assert difference(wrong, whole) > 0.05


def test_packing_changes_nothing(tiny: Run) -> None:
    texts = documents(9, 5, 18, 1, 31, 20, 12)
    packed = gradients(tiny, rows([texts[:3], texts[3:5], texts[5:]], 32))
    apart = gradients(tiny, rows([[text] for text in texts], 32))
    assert difference(packed, apart) < 3e-6
    mixed_up = rows([texts[:3], texts[3:5], texts[5:]], 32)
    mixed_up["segments"] = jnp.minimum(mixed_up["segments"], 1)
    assert difference(gradients(tiny, mixed_up), apart) > 1e-3


def test_padding_changes_nothing(tiny: Run) -> None:
    texts = documents(9, 5, 18, 12)
    tight = gradients(tiny, rows([[texts[0], texts[1]], [texts[2]], [texts[3]]], 18))
    for left in (False, True):
        loose = gradients(tiny, rows([[texts[0], texts[1]], [], [texts[2]], [], [texts[3]]], 40, left=left))
        assert difference(loose, tight) < 3e-6


def test_padding_may_hold_anything(tiny: Run) -> None:
    batch = rows([[text] for text in documents(9, 30)], 32)
    junk = dict(batch)
    masked = batch["weights"] == 0
    junk["targets"] = jnp.where(masked, 299, batch["targets"])
    junk["tokens"] = jnp.where(masked, 298, batch["tokens"])
    assert difference(gradients(tiny, junk), gradients(tiny, batch)) == 0


# What the loss is.


def plain_loss(run: Run, params: Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The weighted mean likelihood and squared log-partition, from all logits at once."""
    positions = Positions(index=batch["positions"], segments=batch["segments"])
    logits, _ = merge(run.model.abstract(), params)(batch["tokens"], positions)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    share = batch["weights"] / jnp.sum(batch["weights"])
    return -jnp.sum(chosen * share), jnp.sum(jax.nn.logsumexp(logits, -1) ** 2 * share)


def test_weights_of_labels(tiny: Run) -> None:
    """Weights weigh, zeros mask, and only their ratios matter, also where they sum to less than one."""
    run = tiny.replace(z_loss=0.5)
    batch = random_batch(run)
    drawn = jax.random.uniform(jax.random.key(3), batch["weights"].shape)
    batch["weights"] = jnp.where(drawn < 0.5, 0.0, drawn) * 1e-3
    loss, nll, found = gradients(run, batch)

    def expected(params: Parameters) -> tuple[jax.Array, jax.Array]:
        nll, squares = plain_loss(run, params, batch)
        return nll + 0.5 * squares, nll

    (loss_expected, nll_expected), wanted = jax.value_and_grad(expected, has_aux=True)(parameters_of(run))
    assert difference((loss, nll, found), (loss_expected, nll_expected, wanted)) < 1e-5
    assert loss > 1.1 * nll  # the z-loss is in the loss alone


def test_a_batch_without_targets(tiny: Run) -> None:
    batch = random_batch(tiny) | {"weights": jnp.zeros((tiny.batch, tiny.length))}
    loss, nll, found = gradients(tiny, batch)
    assert loss == nll == 0
    assert all(not np.any(x) for x in found.values())


# What happens to the state.


@functools.cache
def step_of(run: Run) -> Any:
    return make_step(run)


def started(run: Run) -> tuple[Any, State, Any]:
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        return mesh, initial_state(run, mesh), step_of(run)


def stepped(run: Run, batches: list[Batch]) -> tuple[list[Any], list[dict[str, float]]]:
    """The states (on the host) before and after each batch, and the metrics."""
    mesh, state, step = started(run)
    states, metrics = [jax.device_get(state)], []
    with jax.set_mesh(mesh):
        for batch in batches:
            state, facts = step(state, meshes.place(jax.device_get(batch), mesh))
            states.append(jax.device_get(state))
            metrics.append({name: float(value) for name, value in facts.items()})
    return states, metrics


def test_bfloat16_is_only_for_computing(tiny: Run) -> None:
    batches = [random_batch(tiny, seed) for seed in range(3)]
    states, metrics = stepped(tiny.replace(dtype="bfloat16", ema=0.9), batches)
    _, exact = stepped(tiny.replace(ema=0.9), batches)
    kinds = {str(x.dtype) for part in ("params", "optimizer", "ema") for x in jax.tree.leaves(states[-1][part])}
    assert kinds == {"float32", "int32"}  # int32: the counts of the optimizer
    losses, wanted = ([record["loss"] for record in records] for records in (metrics, exact))
    np.testing.assert_allclose(losses, wanted, rtol=5e-3)
    assert losses != wanted


def test_moving_average(tiny: Run) -> None:
    states, _ = stepped(tiny.replace(ema=0.75), [random_batch(tiny, seed) for seed in range(3)])
    average = states[0]["params"]
    for decay, state in zip((1 / 10, 2 / 11, 3 / 12), states[1:], strict=True):
        average = {name: decay * x + (1 - decay) * state["params"][name] for name, x in average.items()}
        for name, x in average.items():
            np.testing.assert_allclose(state["ema"][name], x, rtol=1e-6, atol=1e-8)
    last: Any = jax.tree.map(jnp.asarray, states[-1])
    assert best_parameters(last) is last["ema"]
    assert best_parameters(last | {"ema": {}}) is last["params"]


def test_a_step_that_is_not_finite_changes_only_counters(tiny: Run) -> None:
    run = tiny.replace(ema=0.9, accumulate=2)
    good = random_batch(tiny)
    bad = good | {"weights": good["weights"].at[3, 4].set(jnp.inf)}
    states, metrics = stepped(run, [good, bad, bad, good])
    _, first, second, third, last = states
    for name in ("params", "optimizer", "ema"):
        for kept in (second, third):
            jax.tree.map(np.testing.assert_array_equal, kept[name], first[name])
    assert any(np.any(last["params"][name] != third["params"][name]) for name in last["params"])
    assert [int(state["step"]) for state in states] == [0, 1, 2, 3, 4]
    assert [record["bad_steps"] for record in metrics] == [0, 1, 2, 0]
    assert [record["skipped"] for record in metrics] == [0, 1, 2, 2]
    assert [bool(np.isfinite(record["loss"])) for record in metrics] == [True, False, False, True]
    # As if the bad ones had never been: the same parameters, by the same learning rates.
    unharmed, calm = stepped(run, [good, good])
    jax.tree.map(np.testing.assert_array_equal, last["params"], unharmed[-1]["params"])
    assert metrics[-1]["learning_rate"] == calm[-1]["learning_rate"] != metrics[0]["learning_rate"]


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_an_update_that_is_not_finite_changes_only_counters(tiny: Run, name: str) -> None:
    """Loss and gradient are finite, and the update overflows: the parameters, the optimizer and the average stay."""
    overflowing = {"optimizer.name": name, "optimizer.learning_rate": 1e38, "optimizer.weight_decay": 1e6}
    run = tiny.replace(ema=0.9, **overflowing)
    states, metrics = stepped(run, [random_batch(tiny)] * 2)
    assert all(np.isfinite(record["loss"]) and np.isfinite(record["gradient_norm"]) for record in metrics)
    for name in ("params", "optimizer", "ema"):
        for state in states[1:]:
            jax.tree.map(np.testing.assert_array_equal, state[name], states[0][name])
    assert [record["skipped"] for record in metrics] == [1, 2]


@pytest.mark.parametrize("name", get_args(get_type_hints(Optimizer)["name"]))
def test_new_parameters_are_checked_only_where_they_can_overflow(tiny: Run, name: str) -> None:
    """The check costs a second pass over gradients and optimizer state, 3 % of a step of a 0.5B model on a v5e."""

    def checks(run: Run) -> int:
        mesh, _ = meshes.make(run)
        with jax.set_mesh(mesh):
            traced = make_step(run).trace(abstract_state(run, mesh), abstract_batch(run, mesh))
        return str(traced.jaxpr).count("is_finite")

    run = tiny.replace(**{"optimizer.name": name})
    arrays = len(describe(run.model.abstract()))
    assert checks(run) == (2 if name in ("adamw", "lion", "sgd") else 2 + arrays)  # 2: loss and norm of the gradient
    assert checks(run.replace(**{"optimizer.learning_rate": 1e38})) == 2 + arrays


def test_overfits_one_batch(tiny: Run) -> None:
    run = tiny.replace(steps=80, batch=2, **{"optimizer.schedule": "constant", "optimizer.weight_decay": 0.0})
    _, metrics = stepped(run, [random_batch(run)] * run.steps)
    assert metrics[0]["nll"] > 5
    assert metrics[-1]["nll"] < 0.1


def test_the_state_is_donated(tiny: Run) -> None:
    mesh, state, step = started(tiny.replace(ema=0.9))
    before = jax.tree.leaves(state)
    with jax.set_mesh(mesh):
        step(state, meshes.place(jax.device_get(random_batch(tiny)), mesh))
    assert all(leaf.is_deleted() for leaf in before)


def test_the_seed_makes_the_parameters(tiny: Run) -> None:
    first, again, other = (stepped(tiny.replace(seed=seed), [])[0][0]["params"] for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first["embedding.table"] != other["embedding.table"])

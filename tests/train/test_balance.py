"""Routers under training: their losses, their corrections, and runs of models with experts and latent attention."""

import functools
import io
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo import zoo
from flaxzoo.configs import Balance, Optimizer, Run
from flaxzoo.train import balance, load
from flaxzoo.train import optimizer as optimizers
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.runs import loop, metrics
from flaxzoo.train.step import _gradients, initial_state, make_step
from flaxzoo.zoo import MLA, Attention, Block, Decoder, GatedMLP, MoE, Router
from flaxzoo.zoo.parameters import Description, describe, split
from rich.console import Console

pytestmark = pytest.mark.usefixtures("quick_compiler")
EXPERTS = 8
SIGMOID = MoE(
    experts=EXPERTS,
    expert=GatedMLP(hidden=16),
    router=Router(top_k=2, score="sigmoid", correction=True),
    shared=GatedMLP(hidden=16),
)
SOFTMAX = SIGMOID.replace(router=Router(top_k=2), shared=None)
PLAIN = Block(mixer=Attention(heads=4, kv_heads=2, head_dim=8), ffn=SIGMOID)
MODEL = Decoder(vocab=300, dim=32, layers=3, block=(PLAIN, PLAIN.replace(ffn=SOFTMAX)))
WHERE = ("stack.0", "stack.1", "rest.0")
CORRECTIONS = ["rest.0.ffn.router.correction", "stack.0.ffn.router.correction"]


@pytest.fixture(scope="module")
def routed(tiny: Run) -> Run:
    return tiny.replace(model=MODEL)


def random_batch(run: Run, seed: int = 0) -> dict[str, Any]:
    """Rows of which some end in padding."""
    source = np.random.default_rng(seed)
    shape = (run.batch, run.length)
    real = np.arange(run.length) < source.integers(run.length // 4, run.length + 1, (run.batch, 1))
    batch = {name: source.integers(0, 300, shape).astype(np.int32) for name in ("tokens", "targets")}
    batch["segments"] = real.astype(np.int32)
    batch["positions"] = np.broadcast_to(np.arange(run.length, dtype=np.int32), shape)
    return batch | {"weights": real.astype(np.float32)}


@functools.cache
def gradients_of(run: Run) -> Any:
    """A function of parameters and a batch that gives loss, likelihood, gradients and routing."""
    return jax.jit(lambda parameters, batch: _gradients(run, run.model.abstract(), parameters, batch))


@functools.cache
def outcome(run: Run) -> Any:
    """Loss, likelihood, gradients and routing of a fresh model on the first random batch."""
    parameters = split(run.model.build(rngs=nnx.Rngs(run.seed)))
    return gradients_of(run)(parameters, jax.tree.map(jnp.asarray, random_batch(run)))


def test_losses_by_their_formulas(routed: Run) -> None:
    batch = random_batch(routed)
    tokens = batch["weights"].sum()
    loss, nll, _, routing = outcome(routed)
    assert set(routing) == set(WHERE)
    plain = jax.tree.map(lambda x: np.asarray(x, np.float64), routing)
    routers = [plain["rest.0"]]
    routers += [jax.tree.map(lambda x: x[0], plain[where]) for where in WHERE[:2]]  # one repeat each
    assert len(routers) == 3
    assert all(done["load"].sum() == 2 * tokens for done in routers)
    even = np.mean([EXPERTS * np.sum(d["load"] / (2 * tokens) * d["probability"] / tokens) for d in routers])
    z = np.mean([d["z"] / tokens for d in routers])
    found = jax.device_get(balance.metrics(routing, jnp.asarray(tokens)))
    assert found["balance_loss"] == pytest.approx(even, rel=1e-5)
    assert found["router_z_loss"] == pytest.approx(z, rel=1e-5)
    worst = max((d["load"].max() - d["load"].mean()) / d["load"].mean() for d in routers)
    assert found["max_violation"] == pytest.approx(worst, rel=1e-5)
    weighted, same, _, _ = outcome(routed.replace(balance=Balance(loss=0.3, router_z_loss=0.2)))
    assert float(same) == pytest.approx(float(nll), rel=1e-6)
    assert float(weighted) == pytest.approx(float(loss) + 0.3 * even + 0.2 * z, rel=1e-6)


def test_equal_loads_cost_one_and_others_more() -> None:
    tokens, equal = jnp.asarray(80.0), jnp.full(EXPERTS, 10.0)
    uneven = jnp.asarray([24.0, 16.0, 8.0, 8.0, 8.0, 8.0, 8.0, 0.0])
    for loads, wanted in ((equal, 1.0), (uneven, 8 * (0.3**2 + 0.2**2 + 5 * 0.1**2))):
        done = {"stack.0": {"load": loads, "probability": loads, "z": jnp.zeros(())}}
        assert float(balance.metrics(done, tokens)["balance_loss"]) == pytest.approx(wanted)


def test_reports_of_a_batch_of_padding(routed: Run) -> None:
    """No token is routed, and every report of a step is finite; no correction moves."""
    batch = random_batch(routed)
    batch |= {"segments": 0 * batch["segments"], "weights": 0 * batch["weights"]}
    run = routed.replace(balance=Balance(loss=0.3, router_z_loss=0.2))
    parameters = split(run.model.build(rngs=nnx.Rngs(0)))
    loss, nll, gradients, routing = gradients_of(run)(parameters, jax.tree.map(jnp.asarray, batch))
    reports = balance.metrics(routing, jnp.float32(0.0))
    assert {name: float(value) for name, value in reports.items()} == dict.fromkeys(reports, 0.0)
    assert (float(loss), float(nll)) == (0.0, 0.0)
    assert all(bool(jnp.all(gradient == 0)) for gradient in gradients.values())
    corrected = balance.corrected(Balance(bias_rate=0.01), parameters, routing)
    jax.tree.map(np.testing.assert_array_equal, corrected, parameters)


def test_metrics_of_routers_on_stages_and_outside_of_them() -> None:
    load = jnp.arange(2.0 * EXPERTS).reshape(2, EXPERTS)
    done = {"stack.0": {"load": load, "probability": load / 7, "z": jnp.ones(2)}}
    done["rest.0"] = {name: x[0] for name, x in done["stack.0"].items()}
    alone = jax.jit(balance.metrics)(done, jnp.float32(9.0))
    mesh = jax.make_mesh((2,), ("pipeline",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("pipeline"))
        done["stack.0"] = jax.device_put(done["stack.0"], place)
        done["rest.0"] = jax.device_get(done["rest.0"])
        found = jax.jit(balance.metrics)(done, np.float32(9.0))
    for name, value in alone.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_changes_nothing(routed: Run, micro_batches: int) -> None:
    run = routed.replace(balance=Balance(loss=1.0, router_z_loss=0.1))
    whole, parts = outcome(run), outcome(run.replace(accumulate=micro_batches))
    for (path, one), other in zip(jax.tree.leaves_with_path(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5 * np.abs(one).max() + 1e-7, err_msg=str(path))


@pytest.mark.parametrize("change", [{"loss": 1.0}, {"router_z_loss": 1.0}], ids=str)
def test_the_losses_reach_the_routers(routed: Run, change: dict[str, float]) -> None:
    plain, weighted = outcome(routed)[2], outcome(routed.replace(balance=Balance(**change)))[2]
    for where in WHERE:
        name = f"{where}.ffn.router.weight"
        assert np.abs(weighted[name] - plain[name]).max() > 1e-4, name


def trained(run: Run, steps: int) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Parameters and metrics after some steps on different rows."""
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        state, step = initial_state(run, mesh), make_step(run)
        told = []
        for index in range(steps):
            state, found = step(state, meshes.place(random_batch(run, index), mesh))
            told.append({name: float(value) for name, value in found.items()})
    return jax.device_get(state["params"]), told


def test_a_step_moves_corrections_against_the_loads(routed: Run) -> None:
    run = routed.replace(balance=Balance(bias_rate=0.01))
    parameters, _ = trained(run, 1)
    fresh, routing = split(run.model.build(rngs=nnx.Rngs(run.seed))), outcome(routed)[3]
    assert sorted(name for name in parameters if "correction" in name) == CORRECTIONS
    for name in CORRECTIONS:
        load = np.asarray(routing[name.removesuffix(".ffn.router.correction")]["load"])
        moved = 0.01 * np.sign(load.mean(-1, keepdims=True) - load)
        np.testing.assert_allclose(parameters[name] - fresh[name], moved, rtol=1e-5)
        assert len(np.unique(moved)) > 1


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "sgd"])
def test_no_optimizer_moves_corrections(name: str) -> None:
    """Which have no gradient."""
    known = {
        "correction": Description("L E", (2, EXPERTS), jnp.float32, 0),
        "weight": Description("D E", (4, EXPERTS), jnp.float32, 1),
    }
    made = optimizers.make(Optimizer(name=name, warmup_steps=1), 9, known)  # pyright: ignore[reportArgumentType]
    before = {name: jnp.ones(what.shape) for name, what in known.items()}
    gradients = {"correction": jnp.zeros((2, EXPERTS)), "weight": jnp.ones((4, EXPERTS))}
    after, state = optimizers.update(made, gradients, made.init(before), before)
    after, _ = optimizers.update(made, gradients, state, after)
    np.testing.assert_array_equal(after["correction"], 1.0)
    assert np.abs(after["weight"] - 1.0).max() > 0


def test_a_step_that_is_skipped_moves_no_correction(routed: Run) -> None:
    run = routed.replace(balance=Balance(bias_rate=0.01))
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        state = initial_state(run, mesh)
        state["params"]["norm.scale"] = state["params"]["norm.scale"] * jnp.nan
        state, found = make_step(run)(state, meshes.place(random_batch(run), mesh))
    assert float(found["skipped"]) == 1
    for correction in CORRECTIONS:
        np.testing.assert_array_equal(state["params"][correction], 0.0)


@pytest.mark.slow
def test_eight_devices_are_as_one(routed: Run) -> None:
    run = routed.replace(balance=Balance(loss=0.1, router_z_loss=0.01, bias_rate=0.01), accumulate=2)
    (parameters, told), (split_parameters, split_told) = (
        trained(run, 2),
        trained(run.replace(mesh="fsdp=2,tensor=2,expert=2"), 2),
    )
    for one, other in zip(told, split_told, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    for name, array in parameters.items():
        change = np.linalg.norm(split_parameters[name] - array)
        assert change <= 1e-3 * np.linalg.norm(array) + 1e-6, name


def test_the_optimizer_sees_a_matrix_for_each_expert() -> None:
    """Muon's steps are nearly orthogonal, each for itself."""
    what = describe(MODEL.abstract())["stack.0.ffn.experts.gate.weight"]
    assert (what.axes, what.inputs) == ("L E D F", 1)
    made = optimizers.make(Optimizer(name="muon", warmup_steps=1, weight_decay=0.0), 9, {"weight": what})
    before = {"weight": jnp.zeros(what.shape)}
    after, _ = optimizers.update(
        made, {"weight": jax.random.normal(jax.random.key(0), what.shape)}, made.init(before), before
    )
    for matrix in np.asarray(after["weight"]).reshape(-1, *what.shape[-2:]):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.min() > 0.3 * values.max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"balance": Balance(loss=0.1)}, "without routers has nothing to balance"),
        (
            {"model": MODEL.replace(layers=1, block=MODEL.block[1:]), "balance": Balance(bias_rate=0.1)},
            "correction=True",
        ),
    ],
    ids=str,
)
def test_what_has_nothing_to_balance_is_refused(tiny: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.replace(**change)
    with pytest.raises(ValueError, match=r"balance.loss must be at least 0, got -1.0"):
        Balance(loss=-1.0)


def test_a_run_of_experts_and_latent_attention(routed: Run, tmp_path: Path) -> None:
    """From text to text, its corrections in the checkpoint, loads in the metrics; on again where it stopped."""
    balanced = Balance(loss=1e-2, router_z_loss=1e-3, bias_rate=1e-2)
    latent = PLAIN.replace(mixer=MLA(heads=4, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8, query_rank=16))
    model = MODEL.replace(layers=2, first=(latent.replace(ffn=GatedMLP(hidden=32)),), block=(latent,))
    run = routed.replace(model=model, steps=30, save_every=15, balance=balanced, mesh="fsdp=2,tensor=2")
    shown = io.StringIO()
    result = loop.train(run, tmp_path / "run", console=Console(file=shown, width=200))
    records = [record for record in metrics.read(tmp_path / "run") if "loss" in record]
    assert records[0]["nll"] == pytest.approx(math.log(300), rel=0.1)
    assert result.loss < 0.8 * records[0]["loss"]
    assert all(math.isfinite(record["max_violation"]) for record in records)
    assert {"balance_loss", "router_z_loss"} <= records[-1].keys()
    assert " active, " in shown.getvalue()
    model, tokenizer = load(tmp_path / "run")
    assert np.abs(split(model)["stack.0.ffn.router.correction"]).max() > 0.01
    text = zoo.generate(model, tokenizer, ["the cat"], max_tokens=8, sampling=zoo.GREEDY)[0]
    assert text
    early, _ = load(tmp_path / "run", step=15)
    assert np.abs(split(early)["stack.0.ffn.router.correction"] - split(model)["stack.0.ffn.router.correction"]).max()


def test_corrections_even_out_the_loads(tiny: Run) -> None:
    """From logits that favour some experts, which the optimizer alone keeps doing for longer than this run."""
    decoder = MODEL.replace(layers=1, block=(PLAIN.replace(**{"ffn.router.bias": True}),))
    base = tiny.replace(model=decoder, batch=32, steps=30, optimizer=tiny.optimizer.replace(learning_rate=1e-3))
    spread = {}
    for name, chosen in {"none": Balance(), "bias": Balance(bias_rate=0.03)}.items():
        mesh, _ = meshes.make(run := base.replace(balance=chosen))
        with jax.set_mesh(mesh):
            state, step = initial_state(run, mesh), make_step(run)
            state["params"]["stack.0.ffn.router.bias"] += jnp.linspace(-2.0, 2.0, EXPERTS)
            told = []
            for index in range(run.steps):
                state, found = step(state, meshes.place(random_batch(run, index), mesh))
                told.append(float(found["max_violation"]))
        spread[name] = told
    assert spread["none"][0] == spread["bias"][0] > 2
    assert min(spread["none"]) > 1.5
    assert np.mean(spread["bias"][-5:]) < 0.4 * np.mean(spread["none"][-5:])

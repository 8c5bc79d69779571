"""The mesh axis pipeline, alone and with others: what is trained is what one device trains."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo.configs import Balance, Optimizer, Run
from flaxzoo.train.commands import shard
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.step import abstract_state, initial_state, make_step
from flaxzoo.zoo.parameters import describe
from sharded import B, D, Moved, T, alone, assert_same, collectives, outcome, rows, run_of

pytestmark = pytest.mark.usefixtures("quick_compiler")


def over_pipeline(moved: Moved, run: Run) -> None:
    """A micro-batch goes from stage to stage, and from the last one to all for the loss; no weight and no more moves.

    Going forward, backward, or both are loops of their own, hence twice of each.
    """
    rows, stages = B // run.accumulate, 2
    assert set(moved) == {"collective-permute", "reduce-scatter", "all-gather", "all-reduce"}
    assert moved["collective-permute"] == {(rows, T, D): 2 * 2}
    assert moved["reduce-scatter"] == {(rows, T // stages, D): 2}
    assert moved["all-gather"] == {(rows, T, D): 2}
    outside = {what.shape for name, what in describe(run.model.abstract()).items() if "stack" not in name}
    assert set(moved["all-reduce"]) == {*outside, ()}  # gradients, once, and sums
    assert moved["all-reduce"].total() == 3 + 2


MESHES = [
    "pipeline=2",
    "pipeline=2,data=4",
    "pipeline=2,fsdp=4",
    "pipeline=2,fsdp=2,tensor=2",
    "pipeline=2,context=2,tensor=2",
    "pipeline=2,expert=4",
]
QUICK = {("gqa", "pipeline=2")}
ALL = [
    (kind, mesh) for kind in ("dense", "gqa", "moe", "mla") for mesh in MESHES if kind == "moe" or "expert" not in mesh
]


@pytest.mark.parametrize(
    ("kind", "mesh"), [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in ALL]
)
def test_stages_change_nothing_and_move_what_they_must(kind: str, mesh: str) -> None:
    run = run_of(kind).replace(mesh=mesh, accumulate=4)
    found, text = outcome(run)
    assert_same(found, alone(kind))
    if (kind, mesh) == ("gqa", "pipeline=2"):
        over_pipeline(collectives(text), run)
    if mesh == "pipeline=2,data=4":
        activations = {shape for name, shapes in collectives(text).items() if name != "all-reduce" for shape in shapes}
        assert activations == {(1, T, D), (1, T // 2, D)}  # of a device's row of a micro-batch


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch"])
def test_recomputed_on_stages(remat: Any) -> None:
    run = run_of("moe").replace(mesh="pipeline=2,expert=2,tensor=2", remat=remat, accumulate=4)
    assert_same(outcome(run)[0], alone("moe"))


@functools.cache
def uneven() -> Run:
    """Blocks before and after those that repeat, routers in all but the first, and losses and corrections of routers.

    Cut into micro-batches of 4 rows.
    """
    run = run_of("moe")
    plain, mixture = run_of("gqa").model.block[0], run.model.block[0]
    mixture = mixture.replace(**{"ffn.router.correction": True, "ffn.shared": None})
    model = run.model.replace(first=(plain,), block=(mixture, plain), layers=6)
    balance = Balance(loss=0.1, router_z_loss=0.01, bias_rate=0.1)
    return run.replace(model=model, balance=balance, accumulate=4)


@pytest.mark.slow
def test_stages_with_blocks_outside_and_losses_of_routers() -> None:
    """Also what becomes of a step: metrics, and parameters with their corrections; and blocks are recomputed."""
    assert (uneven().model.repeats, len(uneven().model.rest)) == (2, 1)
    staged = uneven().replace(mesh="pipeline=2,expert=2", remat="full")
    found = [stepped(run) for run in (uneven().replace(mesh="fsdp=1"), staged)]
    (metrics, before, expected), (other, _, after) = found
    assert metrics["balance_loss"] > 0.5
    assert other == pytest.approx(metrics, rel=1e-5)
    name = "stack.0.ffn.router.correction"
    assert np.abs(expected[name]).mean() > 0.05
    for name, wanted in expected.items():
        moved = np.abs(wanted - before[name]).max()
        np.testing.assert_allclose(after[name], wanted, rtol=0, atol=1e-4 * moved, err_msg=name)


def stepped(run: Run) -> tuple[dict[str, Any], Any, Any]:
    """The metrics of a training step by plain gradient descent, and the parameters before and after it."""
    optimizer = Optimizer(name="sgd", learning_rate=1.0, warmup_steps=0, clip=0.0, weight_decay=0.0)
    run = run.replace(optimizer=optimizer)
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        state = initial_state(run, mesh)
        before = jax.device_get(state["params"])
        state, metrics = make_step(run)(state, meshes.place(rows(run), mesh))
    return {name: float(x) for name, x in metrics.items()}, before, jax.device_get(state["params"])


# What does not fit.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh": "pipeline=2,context=2", "length": 30},
            "the mesh splits each sequence 4 ways (context x pipeline), which does not divide its length of 30 tokens; "
            "the nearest lengths that fit are 28, 32",
        ),
        (
            {"mesh": "pipeline=4"},
            "mesh axis pipeline=4 does not divide L=2 of parameter stack.0.ffn.down.weight (L F D); "
            "pipeline may be 1, 2",
        ),
        (
            {"mesh": "pipeline=3", "model.layers": 3, "length": 30},
            "samples are written with the axis pipeline as a part of fsdp, and then mesh axis fsdp=3 does not divide "
            "D=32 of parameter embedding.table (V D); fsdp may be 1, 2, 4, 8, 16, 32; with sample_every=0 there are "
            "none",
        ),
    ],
    ids=["shares", "repeats", "samples"],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        meshes.make(run_of("gqa").replace(**changes))


def test_each_stage_holds_its_layers_with_their_optimizer_state() -> None:
    found = shard.layout("small", run_of("gqa").model, "pipeline=2,fsdp=2")
    layouts = {tensor.name: (tensor.layout, tensor.shards, tensor.copies) for tensor in found.parameters}
    assert layouts["stack.0.ffn.up.weight"] == ("L=2/pipeline D=32/fsdp F=64", 4, 1)
    assert layouts["stack.0.ffn_norm.scale"] == ("L=2/pipeline D=32", 2, 2)
    assert layouts["embedding.table"] == ("V=304 D=32/fsdp", 2, 2)
    run = run_of("gqa").replace(mesh="pipeline=2,fsdp=2", accumulate=4)
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        state = abstract_state(run, mesh)
    for moments in (state["optimizer"], state["params"]):
        split = [x.sharding.spec for x in jax.tree.leaves(moments) if x.shape == (2, D, 64)]
        assert split
        assert all(tuple(each) == ("pipeline", "fsdp", None) for each in split)


def test_stages_are_for_training() -> None:
    text = re.escape("mesh axis pipeline is for training, got 'pipeline=2': a token would pass stage after stage")
    with pytest.raises(ValueError, match=text):
        meshes.for_parameters(run_of("gqa").model, "pipeline=2")
    model = run_of("gqa").model.build(rngs=nnx.Rngs(0))
    mesh, line = meshes.make(run_of("gqa").replace(mesh="fsdp=2,pipeline=2", accumulate=4))
    assert line.endswith("(4 more left idle, its 2 stages wait 20% of the time with accumulate=4, less with more)")
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=re.escape("place the model on a mesh without this axis, e.g. with fsdp=2")),
    ):
        model(jnp.zeros((2, 4), jnp.int32))
    without = meshes.without_stages(mesh)
    assert dict(without.shape) == {"fsdp": 4}
    assert sorted(device.id for device in without.devices.flat) == [0, 1, 2, 3]
    assert meshes.without_stages(without) is without

"""Meshes: from text, with what they refuse, and training on 8 devices equals training on one."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.configs import Run
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.step import abstract_state, initial_state, make_evaluation, make_step
from jax.sharding import NamedSharding, PartitionSpec

pytestmark = pytest.mark.usefixtures("quick_compiler")


# From text.


def test_text_to_sizes() -> None:
    assert meshes.parse("") == {}
    assert list(meshes.parse(" tensor=2, fsdp=4,").items()) == [("tensor", 2), ("fsdp", 4)]


@pytest.mark.parametrize("text", ["fsdp", "fsdp=", "fsdp=0", "fsdp=-1", "fsdp=a", "fsdp=2,fsdp=2", "fsdp:2"])
def test_what_is_no_mesh(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"each axis once, with a size; got {text!r}")):
        meshes.parse(text)


def test_a_misspelled_axis() -> None:
    with pytest.raises(ValueError, match="unknown mesh axis 'tensr'; did you mean 'tensor'. Known: context, data, dcn"):
        meshes.parse("tensr=2")


def refused(run: Run, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        meshes.make(run.replace(**changes))
    return str(caught.value)


def test_meshes_that_do_not_fit(tiny: Run) -> None:
    assert refused(tiny, mesh="data=4,fsdp=4") == (
        "mesh data=4,fsdp=4 needs 16 devices, there are 8; lower a size, or set JAX_NUM_CPU_DEVICES=16"
    )
    assert refused(tiny, mesh="data=2,fsdp=2", batch=6) == (
        "the mesh splits the batch 4 ways (data x fsdp), which does not divide 6 sequences (batch 6 / accumulate 1); "
        "it may be split 1, 2, 3, 6 ways"
    )
    assert "does not divide 2 sequences (batch 8 / accumulate 4); it may be split 1, 2" in refused(
        tiny, mesh="fsdp=4", accumulate=4
    )
    assert refused(tiny, mesh="tensor=4") == (
        "mesh axis tensor=4 does not divide K=2 of parameter stack.0.mixer.key.weight (L D K H); tensor may be 1, 2"
    )


def test_the_mesh_of_no_text_is_the_largest_that_fits(tiny: Run) -> None:
    found = {
        batch: meshes.make(tiny.replace(mesh="", batch=batch))[1]
        for batch in (32, 12, 7)  # 7 divides the batch, but not D=32
    }
    assert found == {
        32: "fsdp=8 on 8 x cpu",
        12: "fsdp=4 on 4 x cpu (4 more left idle)",
        7: "fsdp=1 on 1 x cpu (7 more left idle)",
    }
    assert meshes.make(tiny, jax.devices()[3:4])[0].devices.tolist() == [jax.devices()[3]]


def test_a_mesh_of_parameters_alone_has_no_batch(tiny: Run) -> None:
    assert meshes.for_parameters(tiny.model, "fsdp=8").shape == {"fsdp": 8}
    with pytest.raises(ValueError, match="tensor=4 does not divide K=2"):
        meshes.for_parameters(tiny.model, "tensor=4")


# States.


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_abstract_state_is_that_of_the_real_one(tiny: Run, name: str) -> None:
    run = tiny.replace(mesh="fsdp=2,tensor=2", ema=0.9, **{"optimizer.name": name, "model.dim": 128})
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        real, shapes = initial_state(run, mesh), abstract_state(run, mesh)
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    for (path, leaf), shape in zip(jax.tree.leaves_with_path(real), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype), path
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim), path
    table = real["params"]["embedding.table"]
    assert jax.typeof(table).sharding.spec == PartitionSpec("tensor", "fsdp")
    assert {shard.data.shape for shard in table.addressable_shards} == {(150, 64)}
    # Of what there is a number for each parameter, each device holds a quarter, but for vectors.
    kept = [x for x in jax.tree.leaves((real["params"], real["optimizer"], real["ema"])) if x.size > 1000]
    assert len(kept) >= 3 * 8 - 8 * (name in ("muon", "adafactor"))
    assert all(x.addressable_shards[0].data.size == x.size // 4 for x in kept if x.shape != (2, 128))


def test_a_batch_lies_on_the_axes_of_the_batch(tiny: Run) -> None:
    mesh, _ = meshes.make(tiny.replace(mesh="data=2,fsdp=2,tensor=2"))
    rows = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    placed = meshes.place({"tokens": rows}, mesh)["tokens"]
    assert placed.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 2)
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}


# Eight devices and one.


def batches(run: Run, count: int) -> list[dict[str, np.ndarray]]:
    """Random tokens, in documents and with weights of all sorts."""
    source = np.random.default_rng(0)
    shape = (count, run.batch, run.length)
    begins = source.random(shape) < 0.1
    begins[..., 0] = True
    time = np.arange(run.length)
    named = {
        "tokens": source.integers(0, 300, shape),
        "targets": source.integers(0, 300, shape),
        "segments": np.cumsum(begins, axis=-1),
        "positions": time - np.maximum.accumulate(np.where(begins, time, 0), axis=-1),
    }
    named = {name: x.astype(np.int32) for name, x in named.items()}
    named["weights"] = (source.random(shape) < source.random((count, run.batch, 1))).astype(np.float32)
    return [{name: x[index] for name, x in named.items()} for index in range(count)]


def trained(run: Run, steps: int = 3) -> tuple[list[float], dict[str, np.ndarray], float]:
    """Losses, parameters and the likelihood of held-out rows."""
    mesh, _ = meshes.make(run)
    rows = batches(run, steps + 1)
    with jax.set_mesh(mesh):
        state, step = initial_state(run, mesh), make_step(run)
        losses = []
        for batch in rows[:-1]:
            state, metrics = step(state, meshes.place(batch, mesh))
            losses.append(float(metrics["loss"]))
        likelihood = float(make_evaluation(run)(state["params"], meshes.place(rows[-1], mesh)))
    return losses, jax.device_get(state["params"]), likelihood


MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"]
OPTIMIZERS = ["adamw", "muon", "lion", "adafactor", "sgd"]
QUICK = [("adamw", "fsdp=8"), ("muon", "data=2,fsdp=2,tensor=2")]
ALL = [(name, mesh) for name in OPTIMIZERS for mesh in MESHES]


@pytest.mark.parametrize(
    ("name", "mesh"), [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in ALL]
)
def test_eight_devices_are_as_one(tiny: Run, name: str, mesh: str) -> None:
    rate = {"lion": 1e-3, "sgd": 0.1}.get(name, 1e-2)
    run = tiny.replace(batch=16, optimizer=tiny.optimizer.replace(name=name, learning_rate=rate))
    if name == "muon":
        run = run.replace(accumulate=2, z_loss=1e-3)  # as a user would
    losses, parameters, likelihood = trained(run)
    split_losses, split_parameters, split_likelihood = trained(run.replace(mesh=mesh))
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    assert split_likelihood == pytest.approx(likelihood, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert losses[2] != losses[0]
    for parameter, array in parameters.items():
        # AdamW and Lion divide by the gradient's size: where it is nothing but rounding, so is the step.
        change = jnp.linalg.norm(jnp.ravel(split_parameters[parameter] - array))
        assert change <= 1e-3 * jnp.linalg.norm(jnp.ravel(array)), parameter

"""Optimizers and schedules by name: each learns, decays what it should, and follows its formula."""

import dataclasses
import itertools
import math
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flaxzoo.configs import Optimizer, Run
from flaxzoo.configs.run import UNUSED
from flaxzoo.layers.norm import RMSNorm
from flaxzoo.layers.sharding.axes import stacked
from flaxzoo.train import optimizer as optimizers
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.step import initial_state, make_step
from flaxzoo.zoo import LayerNorm
from flaxzoo.zoo.parameters import Description, describe, split

pytestmark = pytest.mark.usefixtures("quick_compiler")

NAMES = get_args(get_type_hints(Optimizer)["name"])
RATES = {"adamw": 1e-2, "lion": 3e-3, "muon": 1e-2, "adafactor": 1e-2, "sgd": 2.0}


def batch_of(run: Run, seed: int) -> dict[str, np.ndarray]:
    """Rows that count upwards, from anywhere: easy to learn."""
    start = np.random.default_rng(seed).integers(0, 300, (run.batch, 1))
    tokens = ((start + np.arange(run.length + 1)) % 300).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((run.batch, run.length), np.int32),
        "positions": np.tile(np.arange(run.length, dtype=np.int32), (run.batch, 1)),
        "weights": np.ones((run.batch, run.length), np.float32),
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_learns(tiny: Run, name: str) -> None:
    run = tiny.replace(steps=30, optimizer=tiny.optimizer.replace(name=name, learning_rate=RATES[name]))
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        state, step = initial_state(run, mesh), make_step(run)
        losses = []
        for index in range(run.steps):
            state, metrics = step(state, meshes.place(batch_of(run, index), mesh))
            losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert losses[-1] < losses[0] - 0.5
    kinds = {str(x.dtype) for x in jax.tree.leaves(state["optimizer"])}
    assert kinds <= {"float32", "int32"}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adafactor"])
def test_the_momentum_may_be_kept_in_bfloat16(tiny: Run, name: str) -> None:
    """That changes where a step leads by what bfloat16 rounds off; by default everything is as optax has it."""
    known, params = describe(tiny.model.abstract()), parameters_of(tiny)
    keys = jax.random.split(jax.random.key(7), len(params))
    gradients = {name: jax.random.normal(key, x.shape) for key, (name, x) in zip(keys, params.items(), strict=True)}
    found = {}
    for dtype in ("float32", "bfloat16"):
        settings = Optimizer(name=name, learning_rate=0.1, warmup_steps=0, momentum_dtype=dtype)  # pyright: ignore
        transformation = optimizers.make(settings, 10, known)
        update = jax.jit(lambda *arguments, made=transformation: optimizers.update(made, *arguments))
        state, moved = transformation.init(params), params
        for _ in range(2):
            moved, state = update(gradients, state, moved)
        sizes: dict[str, int] = dict.fromkeys(("float32", "bfloat16", "int32"), 0)
        for leaf in jax.tree.leaves(state):
            sizes[str(leaf.dtype)] += leaf.size
        numbers = sum(what.size for what in known.values())
        assert sizes["bfloat16"] == (numbers if dtype == "bfloat16" else 0)
        found[dtype] = {key: x - params[key] for key, x in moved.items()}
    for key, moved in found["float32"].items():
        np.testing.assert_allclose(found["bfloat16"][key], moved, rtol=0.2, atol=0.05 * float(jnp.max(jnp.abs(moved))))
    if name != "lion":  # whose steps are signs
        assert any(jnp.any(found["bfloat16"][key] != moved) for key, moved in found["float32"].items())


def test_the_default_is_optax_to_the_bit(tiny: Run) -> None:
    known, params = describe(tiny.model.abstract()), parameters_of(tiny)
    keys = jax.random.split(jax.random.key(7), len(params))
    gradients = {name: jax.random.normal(key, x.shape) for key, (name, x) in zip(keys, params.items(), strict=True)}
    ours = optimizers.make(Optimizer(), 10, known)
    rate = optimizers.schedule(Optimizer(), 10)
    plain = optax.adamw(rate, b2=0.95, weight_decay=0.1, mask={name: what.inputs > 0 for name, what in known.items()})

    def twice(transformation: Any) -> Any:
        state, moved = transformation.init(params), params
        update = jax.jit(lambda *arguments: optimizers.update(transformation, *arguments))
        for _ in range(2):
            moved, state = update(gradients, state, moved)
        return moved, state

    jax.tree.map(np.testing.assert_array_equal, twice(ours), twice(plain))


# Stacked parameters, and settings.

SHAPES = {
    "matrix": Description("L D F", (3, 130, 140), jnp.float32, inputs=1),
    "heads": Description("L D N H", (2, 130, 2, 140), jnp.float32, inputs=1),
    "norm": Description("L D", (128, 128), jnp.float32, inputs=0),  # as large as what Adafactor factors
    "expert": Description("L E D F", (2, 3, 130, 140), jnp.float32, inputs=1),
    "expert_bias": Description("L E F", (2, 128, 130), jnp.float32, inputs=0),
    "number": Description("L", (3,), jnp.float32, inputs=0),
    "table": Description("V D", (130, 140), jnp.float32, inputs=1),
}


def random_arrays(shapes: dict[str, Description], seed: int) -> dict[str, jax.Array]:
    """Random numbers whose scale differs by layer and expert."""
    source, arrays = np.random.default_rng(seed), {}
    for name, known in shapes.items():
        depth = stacked(known.axes)
        scale = 10.0 ** source.uniform(-2, 2, known.shape[:depth] + (1,) * (len(known.shape) - depth))
        arrays[name] = jnp.asarray(scale * source.normal(size=known.shape), jnp.float32)
    return arrays


def after_updates(
    settings: Optimizer, known: dict[str, Description], params: Any, gradients: list[Any]
) -> dict[str, jax.Array]:
    """The parameters after as many steps as there are gradients."""
    transformation = optimizers.make(settings, len(gradients), known)
    state = transformation.init(params)
    for gradient in gradients:  # not jitted: single operations are compiled once for all settings
        params, state = optimizers.update(transformation, gradient, state, params)
    return params


@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_and_experts_are_updated_as_if_each_were_alone(name: str) -> None:
    def alone(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The first two layers and experts of each array, as arrays of their own."""
        return {
            f"{key}{list(index)}": arrays[key][index]
            for key, known in SHAPES.items()
            for index in itertools.product(range(2), repeat=stacked(known.axes))
        }

    settings = Optimizer(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.1)  # pyright: ignore
    params, gradients = random_arrays(SHAPES, 0), [random_arrays(SHAPES, seed) for seed in (1, 2)]
    known = {}
    for key in alone(params):
        what = SHAPES[key.partition("[")[0]]
        depth = stacked(what.axes)
        axes = " ".join(what.axes.split()[depth:])
        known[key] = Description(axes, what.shape[depth:], what.dtype, inputs=what.inputs)
    together = alone(after_updates(settings, SHAPES, params, gradients))
    separate = after_updates(settings, known, alone(params), [alone(gradient) for gradient in gradients])
    before = alone(params)
    for key, array in separate.items():
        moved = float(jnp.max(jnp.abs(array - before[key])))
        np.testing.assert_allclose(together[key], array, rtol=1e-6, atol=1e-3 * moved, err_msg=key)


OTHER_SETTINGS = {
    "learning_rate": 0.2,
    "warmup_steps": 3,
    "decay_fraction": 0.9,
    "final_fraction": 0.5,
    "weight_decay": 0.3,
    "b1": 0.5,
    "b2": 0.5,
    "eps": 0.5,
    "schedule": "constant",
}
"""A value of each setting that is not its default. Others: `clip` and `momentum_dtype` have tests of their own."""


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_changes_all_it_names_or_is_refused(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(Optimizer)}
    assert fields == {*OTHER_SETTINGS, "name", "clip", "momentum_dtype"}
    shapes = {
        "matrix": Description("L D F", (2, 6, 8), jnp.float32, inputs=1),
        "norm": Description("L D", (2, 8), jnp.float32, inputs=0),
        "table": Description("V D", (6, 8), jnp.float32, inputs=1),
    }
    params, gradients = random_arrays(shapes, 0), [random_arrays(shapes, seed) for seed in range(1, 7)]
    base: dict[str, Any] = {"name": name, "schedule": "wsd", "learning_rate": 0.1, "warmup_steps": 1}
    base["decay_fraction"] = 0.5
    before = after_updates(Optimizer(**base), shapes, params, gradients)
    for setting, value in OTHER_SETTINGS.items():
        changed = base | {setting: value}
        if setting in UNUSED.get(name, ()):
            with pytest.raises(ValueError, match=f"{name} has no use for {setting}"):
                Optimizer(**changed)
            continue
        if setting == "schedule":
            del changed["decay_fraction"]
        after = after_updates(Optimizer(**changed), shapes, params, gradients)
        for key, array in after.items():
            named = (setting != "weight_decay" or key != "norm") and (
                setting != "b2" or name != "muon" or key != "matrix"  # Muon has no moving average of squares
            )
            assert bool(jnp.any(array != before[key])) == named, f"{setting} of {key}"


def test_the_defaults_of_b1_are_those_of_each_method() -> None:
    shapes = {"matrix": SHAPES["matrix"], "table": SHAPES["table"]}
    params, gradients = random_arrays(shapes, 0), [random_arrays(shapes, seed) for seed in (1, 2)]
    default = after_updates(Optimizer(name="muon"), shapes, params, gradients)
    given = {b1: after_updates(Optimizer(name="muon", b1=b1), shapes, params, gradients) for b1 in (0.9, 0.95)}
    np.testing.assert_array_equal(default["matrix"], given[0.95]["matrix"])
    np.testing.assert_array_equal(default["table"], given[0.9]["table"])


# Overflow.

LARGEST = float(np.finfo(np.float32).max)
GRADIENTS = [sign * size for sign in (1, -1) for size in (0.0, 1e-45, 1e-30, 1e-8, 1.0, 1e8, math.sqrt(LARGEST))]
PARAMETERS = [sign * size for sign in (1, -1) for size in (0.0, 1e-30, 1.0, 2.0**100, 2.0**104, LARGEST)]


def overflows(settings: Optimizer) -> bool:
    """Whether some finite parameter is not finite after three steps with gradients of every size in every order."""
    *gradients, params = np.array(list(itertools.product(GRADIENTS, GRADIENTS, GRADIENTS, PARAMETERS)), np.float32).T
    known = {"matrix": Description("D F", (len(params), 1), jnp.float32, inputs=1)}
    columns = [{"matrix": jnp.asarray(gradient[:, None])} for gradient in gradients]
    after = after_updates(settings, known, {"matrix": jnp.asarray(params[:, None])}, columns)
    return not np.isfinite(after["matrix"]).all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"b1": 0.9999, "b2": 0.9999, "eps": 2e-7},
        {"b1": 0.0, "b2": 0.0, "eps": 2e-11},
        {"momentum_dtype": "bfloat16"},
        {"name": "lion", "b1": 0.999999, "b2": 0.999999},
        {"name": "sgd", "b1": 0.999999},
        {"name": "sgd", "b1": 0.0, "momentum_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_settings_that_never_overflow_never_do(settings: dict[str, Any]) -> None:
    largest = {"learning_rate": 0.5, "weight_decay": 1.0, "schedule": "constant", "warmup_steps": 0}
    chosen = Optimizer(**largest, **settings)
    assert optimizers.never_overflows(chosen)
    assert not overflows(chosen)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e20},
        {"weight_decay": 1e20},
        {"b2": 0.0, "eps": 1e-30},
        {"b1": 1 - 1e-9},
        {"b2": 1 - 1e-9},
        {"name": "sgd", "learning_rate": 1e20},
        {"name": "lion", "learning_rate": 1e38},
    ],
    ids=str,
)
def test_settings_that_overflow_are_known(settings: dict[str, Any]) -> None:
    chosen = Optimizer(**{"learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0} | settings)
    assert not optimizers.never_overflows(chosen)
    assert overflows(chosen)


# Schedules.


def rates(steps: int, **options: Any) -> list[float]:
    rate = optimizers.schedule(Optimizer(learning_rate=0.5, final_fraction=0.1, **options), steps)
    return [float(jnp.asarray(rate(jnp.int32(step)))) for step in range(steps)]


def test_warmup_then_constant() -> None:
    found = rates(12, schedule="constant", warmup_steps=5)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5] + [0.5] * 7)
    assert rates(4, schedule="constant", warmup_steps=0) == pytest.approx([0.5] * 4)
    assert rates(4, schedule="constant", warmup_steps=1) == pytest.approx([0.5] * 4)
    assert rates(4, schedule="cosine", warmup_steps=100) == pytest.approx([0.125, 0.25, 0.375, 0.5])  # never above


def test_linear() -> None:
    expected = [0.25, 0.5, *(0.5 - 0.45 * step / 10 for step in range(10))]
    assert rates(12, schedule="linear", warmup_steps=2) == pytest.approx(expected)


def test_cosine() -> None:
    expected = [0.25, 0.5, *(0.05 + 0.45 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10))]
    assert rates(12, schedule="cosine", warmup_steps=2) == pytest.approx(expected)


def test_warmup_stable_decay() -> None:
    decay = [0.5 - 0.45 * step / 5 for step in range(5)]
    found = rates(20, schedule="wsd", warmup_steps=4, decay_fraction=0.25)
    assert found == pytest.approx([0.125, 0.25, 0.375, *[0.5] * 12, *decay])
    # A decay longer than what is left after the warmup takes all of that.
    found = rates(8, schedule="wsd", warmup_steps=4, decay_fraction=1.0)
    assert found == pytest.approx([0.125, 0.25, 0.375, 0.5, *(0.5 - 0.45 * step / 4 for step in range(4))])


# Decay and clipping.


def everything(run: Run) -> Run:
    """A model with every kind of parameter: biases, sinks, norms of heads, positions and a head."""
    changes = {"bias": True, "output_bias": True, "sinks": True, "qk_norm": RMSNorm()}
    model = run.model.replace(
        tied=False, max_positions=32, norm=LayerNorm(), **{f"block.0.mixer.{name}": x for name, x in changes.items()}
    )
    return run.replace(model=model)


MATRICES = ("embedding.table", "positions.table", "head.table", ".weight")


def parameters_of(run: Run) -> dict[str, jax.Array]:
    """Parameters none of which is zero."""
    fresh = split(run.model.build(rngs=nnx.Rngs(0)))
    return {name: x + 0.5 for name, x in fresh.items()}


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_vectors_do_not(tiny: Run, name: str) -> None:
    run = everything(tiny)
    changes = {"learning_rate": 0.1, "weight_decay": 0.2, "schedule": "constant", "warmup_steps": 0}
    settings = run.optimizer.replace(name=name, **changes)
    transformation = optimizers.make(settings, 10, describe(run.model.abstract()))
    params = parameters_of(run)

    @jax.jit
    def unmoved(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The parameters after a step with no gradient."""
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizers.update(transformation, zeros, transformation.init(params), params)[0]

    after = unmoved(params)
    kinds = {parameter: parameter.endswith(MATRICES) for parameter in params}
    assert sum(kinds.values()) == 3 + 4 + 3  # three tables, attention, SwiGLU
    assert sum(not matrix for matrix in kinds.values()) >= 4 + 1 + 2 + 4  # biases, sinks, head norms, norms
    for parameter, matrix in kinds.items():
        expected = params[parameter] * (1 - 0.1 * 0.2 * matrix)
        np.testing.assert_allclose(after[parameter], expected, rtol=1e-6, err_msg=parameter)


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_clipping(tiny: Run, clip: float) -> None:
    settings = Optimizer(
        name="sgd", learning_rate=1.0, b1=0.0, weight_decay=0.0, schedule="constant", warmup_steps=0, clip=clip
    )
    run = tiny.replace(optimizer=settings)
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        state, step = initial_state(run, mesh), make_step(run)
        before = jax.device_get(state["params"])
        state, metrics = step(state, meshes.place(batch_of(run, 0), mesh))
    moved = float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, jax.device_get(state["params"]), before)))
    norm = float(metrics["gradient_norm"])
    assert norm > 0.1  # of the gradient as it was
    assert moved == pytest.approx(clip if clip == 0.01 else norm, rel=1e-4)


# Muon.


def test_muon_orthogonalises_each_layer_by_itself(tiny: Run) -> None:
    run = everything(tiny)
    known = describe(run.model.abstract())
    settings = Optimizer(name="muon", learning_rate=0.1, weight_decay=0.2, schedule="constant", warmup_steps=0)
    params = parameters_of(run)
    keys = jax.random.split(jax.random.key(7), len(params))
    gradients = {name: jax.random.normal(key, x.shape) for key, (name, x) in zip(keys, params.items(), strict=True)}
    transformation = optimizers.make(settings, 10, known)
    update = jax.jit(lambda *arguments: optimizers.update(transformation, *arguments))
    found, state = params, transformation.init(params)
    for _ in range(2):
        found, state = update(gradients, state, found)

    plain = optax.contrib.muon(0.1, weight_decay=0.2, consistent_rms=0.2)
    adam = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.2, nesterov=True)

    @jax.jit
    def twice_by_muon(matrix: jax.Array, gradient: jax.Array) -> jax.Array:
        return twice(plain, matrix, gradient)

    def twice(transformation: Any, x: jax.Array, gradient: jax.Array) -> jax.Array:
        state = transformation.init(x)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(2):
                change, state = transformation.update(gradient, state, x)
                x = x + change
        return x

    hidden = 0
    for name, what in known.items():
        if name.startswith("stack.") and name.endswith(".weight"):
            hidden += 1
            rows = math.prod(what.shape[1 : 1 + what.inputs])
            for layer in range(2):
                matrix, gradient = (x[name][layer].reshape(rows, -1) for x in (params, gradients))
                expected = twice_by_muon(matrix, gradient)
                np.testing.assert_allclose(found[name][layer].reshape(rows, -1), expected, rtol=1e-4, atol=1e-5)
            step = (found[name] - params[name])[0].reshape(rows, -1)
            assert float(jnp.sqrt(jnp.mean(step**2))) < 2 * 2 * 0.1  # as large as those of AdamW
        elif name.endswith("table"):
            expected = twice(adam, params[name], gradients[name])
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            expected = twice(optax.adam(0.1, b1=0.9, b2=0.95, nesterov=True), params[name], gradients[name])
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    assert hidden == 7

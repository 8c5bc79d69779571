"""Named models and runs: published sizes, floating-point operations, JSON, and fields that all do something."""

import ast
import copy
import dataclasses
import inspect
import json
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo import configs
from flaxzoo.configs import MODELS, RUNS, Balance, Data, Optimizer, Run, get, get_model, get_run, models
from flaxzoo.layers.spec import Spec
from flaxzoo.train import optimizer as optimizers
from flaxzoo.zoo import Decoder
from flaxzoo.zoo.parameters import Description, describe

pytestmark = pytest.mark.usefixtures("quick_compiler")
ROOT = Path(__file__).parents[2]
NAMES = sorted(MODELS | RUNS)


def test_cache_of_llama_3_8b_takes_128_kib_a_token():
    caches = jax.eval_shape(lambda: models.llama3_8b().cache(1, 1, jnp.bfloat16))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches)) == 131_072


@pytest.mark.parametrize("name", ["gpt2", "llama3_8b", "llama3_70b", "qwen2_5_0_5b"])
def test_flops_are_two_a_weight_and_the_attention(name):
    decoder, length = get_model(name), 2048
    weights = sum(
        known.size for n, known in describe(decoder.abstract()).items() if known.inputs and n != "positions.table"
    )
    weights -= 0 if decoder.tied else decoder.vocab * decoder.dim  # looking up an embedding multiplies nothing
    attention = sum(
        4 * b.mixer.heads * b.mixer.head_dim * (length + 1) / 2  # pyright: ignore[reportAttributeAccessIssue]
        for b in decoder.all_blocks
    )
    assert decoder.flops(length) == pytest.approx(2 * weights + attention, rel=1e-12)


def test_flops_are_those_the_compiler_counts():
    """In an unrolled model whose attention is all visible: XLA counts hidden keys too, and what is not a matmul."""
    decoder = models.small(vocab=512, dim=128, layers=2, hidden=256)
    decoder = decoder.replace(first=decoder.block * 2)
    length = 64
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    cost = jax.jit(lambda model, tokens: model(tokens)[0]).lower(decoder.abstract(), tokens).compile().cost_analysis()
    hidden_keys = sum(
        4 * b.mixer.heads * b.mixer.head_dim * (length - 1) / 2  # pyright: ignore[reportAttributeAccessIssue]
        for b in decoder.all_blocks
    )
    assert cost is not None
    counted, ours = cost["flops"], (decoder.flops(length) + hidden_keys) * length
    assert 1.0 < counted / ours < 1.06


@pytest.mark.parametrize("name", NAMES)
def test_named_configs_travel_as_json(name):
    spec = get(name)
    text = json.dumps(spec.to_dict(), allow_nan=False)
    again = Spec.from_dict(json.loads(text))
    assert again == spec
    assert hash(again) == hash(spec)
    assert type(spec).from_dict(json.loads(text)) == spec
    assert json.loads(json.dumps(spec.flat()))["kind"] == type(spec).__name__


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_of_a_config_can_be_replaced_by_its_name(name):
    spec = get(name)
    for path, value in spec.flat().items():
        if path.rpartition(".")[2] != "kind":
            assert spec.replace(**{path: value}) == spec, path


@pytest.mark.parametrize("name", NAMES)
def test_configs_say_what_they_are(name):
    assert (MODELS | RUNS)[name].__doc__


def test_misspelled_names_get_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown model or run 'lama3_8b'; did you mean 'llama3_8b'"):
        get("lama3_8b")
    with pytest.raises(ValueError, match=r"unknown model or run 'shakespear'; did you mean 'shakespeare'\?"):
        get_run("shakespear")


@pytest.mark.parametrize(
    ("devices", "accelerator", "batch", "dtype"),
    [(1, False, 8, "float32"), (1, True, 8, "bfloat16"), (6, True, 12, "bfloat16"), (64, True, 64, "bfloat16")],
)
def test_a_model_is_a_run_with_the_usual_settings(devices, accelerator, batch, dtype):
    run = get_run("gpt2", devices=devices, accelerator=accelerator)
    assert run == Run(model=get_model("gpt2"), batch=batch, length=1024, dtype=dtype)
    limited = get_model("gpt2").replace(max_positions=256)
    assert configs.runs.from_scratch(limited).length == 256


def test_a_run_has_a_model():
    assert isinstance(get_model("shakespeare"), Decoder)
    assert get_model("shakespeare") == get_run("shakespeare").model
    assert configs.get("gpt2") == models.gpt2()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 8, "accumulate": 3}, "batch must be a multiple of accumulate, got batch=8, accumulate=3"),
        *(
            ({name: 0}, f"{name} must be at least 1, got 0")
            for name in ("steps", "length", "keep_last", "max_bad_steps")
        ),
        ({"optimizerz": Optimizer()}, "unknown field of Run 'optimizerz'; did you mean 'optimizer'"),
        ({"optimizer.learning_rat": 1.0}, "unknown field of Optimizer 'learning_rat'; did you mean 'learning_rate'"),
    ],
)
def test_impossible_runs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RUNS["shakespeare"]().replace(**change)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("field", ["learning_rate", "b1", "b2", "eps", "clip", "weight_decay", "final_fraction"])
@pytest.mark.parametrize("wrong", [NAN, INF, -INF, -0.5])
def test_numbers_of_the_optimizer_outside_their_range_are_refused(field, wrong):
    with pytest.raises(ValueError, match=rf"{field} must be (at least|above) .*, got {wrong}"):
        RUNS["shakespeare"]().replace(**{f"optimizer.{field}": wrong})


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *(("optimizer.b1", value) for value in (1.0, 1.5)),
        *(("optimizer.b2", value) for value in (1.0, 2.0)),
        ("optimizer.eps", 0.0),
        ("optimizer.eps", 1e-45),
        ("optimizer.final_fraction", 1.5),
        ("optimizer.decay_fraction", NAN),
        ("optimizer.warmup_steps", -1),
        *(
            (name, value)
            for name in ("ema", "z_loss", "balance.loss", "balance.bias_rate")
            for value in (NAN, INF, -1.0)
        ),
        ("ema", 1.0),
        *(("seed", value) for value in (-1, 2**64)),
    ],
)
def test_numbers_of_a_run_outside_their_range_are_refused(field, wrong):
    with pytest.raises(ValueError, match=rf"{field.removeprefix('optimizer.')} must be .*, got "):
        RUNS["shakespeare"]().replace(**{field: wrong})


def test_every_number_of_a_run_has_a_range():
    for kind in (Run, Optimizer, Balance):
        for field in dataclasses.fields(kind):
            number = field.type in (int, float, float | None)
            assert ("range" in field.metadata) == number, f"{kind.__name__}.{field.name}"


def test_a_count_is_a_whole_number():
    wrong = copy.copy(RUNS["shakespeare"]())
    object.__setattr__(wrong, "steps", 2.5)  # past the type checker of the tests, which users do not have
    with pytest.raises(ValueError, match="steps must be a whole number, got 2.5"):
        wrong.__post_init__()


# Variables and attributes by these names hold a Run or a Data; properties of the spec read its fields as `self`.
HOLDERS = {Run: "run", Data: "data", Balance: "balance"}


def attributes(tree: ast.AST, holder: str) -> set[str]:
    """What the code reads from any variable or attribute of this name: `run.steps`, `self.run.steps`."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {node.attr for node in nodes if getattr(node.value, "id", getattr(node.value, "attr", None)) == holder}


def fields_read(kind: type[Spec]) -> set[str]:
    """Attributes that train/ reads from this kind of spec, itself or through a property."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "train").rglob("*.py")]
    found = set().union(*(attributes(tree, HOLDERS[kind]) for tree in trees))
    for name in found & vars(kind).keys():
        if isinstance(vars(kind)[name], property):
            found |= attributes(ast.parse(textwrap.dedent(inspect.getsource(vars(kind)[name].fget))), "self")
    return found


@pytest.mark.parametrize("kind", HOLDERS, ids=lambda kind: kind.__name__)
def test_training_reads_every_field(kind):
    unread = {field.name for field in dataclasses.fields(kind)} - fields_read(kind)
    assert not unread


def test_the_scan_would_notice_a_field_that_is_not_read():
    assert {"steps", "mesh", "z_loss"} <= fields_read(Run)
    assert not {"stepss", "learning_rate", "text_field"} & fields_read(Run)


STEPS = 20
BASE = Optimizer(learning_rate=0.1, warmup_steps=3)
OPTIMIZER_CHANGES = {
    "name": (BASE, "sgd"),
    "learning_rate": (BASE, 0.05),
    "schedule": (BASE, "constant"),
    "warmup_steps": (BASE, 6),
    "decay_fraction": (BASE.replace(schedule="wsd"), 0.5),
    "final_fraction": (BASE, 0.5),
    "weight_decay": (BASE, 0.3),
    "b1": (BASE, 0.5),
    "b2": (BASE, 0.5),
    "eps": (BASE, 0.1),
    "momentum_dtype": (BASE, "bfloat16"),
}


def trained(optimizer: Optimizer) -> np.ndarray:
    """A hidden matrix and an embedding of two numbers each, after 20 steps with random gradients."""
    described = {
        name: Description(axes, (1, 2), jnp.float32, 1) for name, axes in (("hidden", "D F"), ("table", "V D"))
    }
    made = optimizers.make(optimizer, STEPS, described)

    @jax.jit
    def run(parameters, gradients):
        def step(carry, gradients):
            return optimizers.update(made, gradients, carry[1], carry[0]), None

        return jax.lax.scan(step, (parameters, made.init(parameters)), gradients)[0][0]

    keys = jax.random.split(jax.random.key(0), 2)
    gradients = {name: jax.random.normal(key, (STEPS, 1, 2)) for name, key in zip(described, keys, strict=True)}
    return np.stack(list(run({name: jnp.ones((1, 2)) for name in described}, gradients).values()))


def test_every_field_of_the_optimizer_has_a_case():
    names = {field.name for field in dataclasses.fields(Optimizer)}
    assert names - {"clip"} == OPTIMIZER_CHANGES.keys()  # the step clips
    assert "clip" in attributes(ast.parse((ROOT / "train" / "step.py").read_text()), "optimizer")


@pytest.mark.parametrize("field", OPTIMIZER_CHANGES)
def test_field_of_the_optimizer_does_something(field):
    base, value = OPTIMIZER_CHANGES[field]
    assert np.abs(trained(base.replace(**{field: value})) - trained(base)).max() > 1e-3


# What an optimizer has no use for, it may not take in silence.
IGNORED = {
    "adamw": set(),
    "lion": {"eps"},
    "muon": set(),
    "adafactor": {"b1", "b2", "eps", "momentum_dtype"},
    "sgd": {"b2", "eps"},
}


@pytest.mark.parametrize("name", IGNORED)
def test_an_optimizer_refuses_what_it_has_no_use_for(name):
    base = BASE.replace(name=name)
    plain = trained(base)
    # Whether lion steps up or down hardly ever depends on how its momentum is rounded: test_optimizer.py looks at that.
    for field in ("learning_rate", "weight_decay", "b1", "b2", "eps", *(IGNORED[name] & {"momentum_dtype"})):
        changes = {field: OPTIMIZER_CHANGES[field][1]}
        if field in IGNORED[name]:
            with pytest.raises(ValueError, match=f"{name} has no use for {field}"):
                base.replace(**changes)
        else:
            assert not np.array_equal(trained(base.replace(**changes)), plain)


@pytest.mark.parametrize(
    ("value", "name", "wrong", "message"),
    [
        (configs.Optimizer(), "name", "adam", "did you mean 'adamw'"),
        (configs.Optimizer(), "clip", -1.0, "clip must be at least 0, got -1.0"),
        (configs.get_run("shakespeare"), "dtype", "float16", "unknown Run.dtype 'float16'"),
        (configs.get_run("shakespeare"), "profile", "10:9999", "ends after the last step"),
        (configs.get_model("gpt2").block[0], "placement", "prenorm", "did you mean 'pre'"),
    ],
)
def test_values_made_in_python_are_checked_too(value, name, wrong, message):
    wrong_value = copy.copy(value)
    object.__setattr__(wrong_value, name, wrong)  # past the type checker of the tests, which users do not have
    with pytest.raises(ValueError, match=message):
        wrong_value.__post_init__()

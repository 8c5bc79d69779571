"""The form for decoding: the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.zoo import GREEDY, complete, optimize_for_decoding
from flaxzoo.zoo.parameters import describe, merge, shardings, split
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

pytestmark = pytest.mark.usefixtures("quick_compiler")
TOKENS = jax.random.randint(jax.random.key(3), (2, 9), 0, 48, jnp.int32)


@pytest.mark.parametrize("name", ["mixed", "learned", "routed"])
def test_it_is_the_same_model(name, models):
    made = optimize_for_decoding(models[name], jnp.float32)
    assert made.spec.all_blocks == models[name].spec.all_blocks
    assert made.spec.repeats == 0
    found, wanted = (jax.jit(lambda m, t: m(t)[0])(model, TOKENS) for model in (made, models[name]))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert optimize_for_decoding(made, jnp.float32) is made


@pytest.mark.parametrize("name", ["mixed", "routed"])
def test_it_generates_the_same(name, models):
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(48)}, unk_token="0"))
    options = {"max_tokens": 30, "sampling": GREEDY, "stop": (), "log_probs": True}
    plain = complete(models[name], tokenizer, [[1, 2], [3]], **options)
    for found, wanted in zip(
        complete(optimize_for_decoding(models[name], jnp.float32), tokenizer, [[1, 2], [3]], **options),
        plain,
        strict=True,
    ):
        assert found.ids == wanted.ids
        np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)


@pytest.mark.parametrize("name", ["mixed", "routed"])
def test_on_a_mesh_it_is_split_as_before(name, models):
    """And with `donate`, nothing is there twice."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    places = shardings(describe(models[name]), mesh)
    placed = {n: jax.device_put(np.asarray(x), places[n]) for n, x in split(models[name]).items()}
    model = merge(models[name].spec.abstract(), placed)
    made = optimize_for_decoding(model, jnp.float32, donate=True)
    assert {n: x.sharding for n, x in split(made).items()} == shardings(describe(made), mesh)
    stacked = {n for n in placed if n.startswith("stack.")}
    assert {n for n, x in placed.items() if x.is_deleted()} == stacked
    with jax.set_mesh(mesh):
        found = jax.jit(lambda m, t: m(t)[0])(made, TOKENS)
    np.testing.assert_allclose(found, jax.jit(lambda m, t: m(t)[0])(models[name], TOKENS), atol=2e-5)
    assert optimize_for_decoding(made, jnp.float32) is made


def test_stages_are_not_called(models):
    whole = next(model for model in models.values() if model.spec.repeats and model.spec.repeats % 2 == 0)
    mesh = jax.make_mesh((2,), ("pipeline",))
    places = shardings(describe(whole), mesh)
    placed = {n: jax.device_put(np.asarray(x), places[n]) for n, x in split(whole).items()}
    model = merge(whole.spec.abstract(), placed)
    with pytest.raises(ValueError, match="layers on the stages of a mesh with pipeline=2 can be trained, and not"):
        optimize_for_decoding(model, jnp.float32, donate=True)
    assert not any(x.is_deleted() for x in placed.values())


def test_a_copy_takes_the_place_of_what_is_donated(models):
    model = jax.tree.map(jnp.copy, models["mixed"])
    before = split(model)
    made = optimize_for_decoding(model, jnp.bfloat16, donate=True)
    known = describe(models["mixed"])
    kept = {name for name, what in known.items() if not what.inputs and not name.startswith("stack.")}
    assert {name for name, x in before.items() if not x.is_deleted()} == kept
    assert all(not x.is_deleted() for x in split(made).values())


def test_routers_stay_exact(models):
    made = split(optimize_for_decoding(models["routed"], jnp.bfloat16))
    kept = {name for name, value in made.items() if value.dtype == jnp.float32}
    routers = {name for name in made if name.endswith("router.weight")}
    assert routers <= kept
    assert all(made[name].ndim == 1 or name.endswith("bias") for name in kept - routers)


def test_bfloat16_for_few_tokens_is_as_for_many(models):
    """Sums of products in place of matmuls: as close to float32 as these are."""
    model = optimize_for_decoding(models["learned"], jnp.bfloat16)
    known = describe(model)
    assert {one.dtype for one in known.values() if one.inputs} == {jnp.dtype(jnp.bfloat16)}
    assert {one.dtype for one in known.values() if not one.inputs} == {jnp.dtype(jnp.float32)}
    call = jax.jit(lambda m, t, dtype: m(t, dtype=dtype)[0], static_argnums=2)
    wanted = call(models["learned"], TOKENS[:, :2], jnp.float32)
    few, many = call(model, TOKENS[:, :2], jnp.bfloat16), call(model, TOKENS, jnp.bfloat16)[:, :2]
    errors = [float(jnp.sqrt(jnp.mean((x - wanted) ** 2)) / jnp.std(wanted)) for x in (few, many)]
    assert errors[0] < 2 * errors[1] < 0.1

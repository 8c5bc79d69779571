"""The form for decoding: the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.zoo import GREEDY, complete, for_decoding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

pytestmark = pytest.mark.usefixtures("quick_compiler")
TOKENS = jax.random.randint(jax.random.key(3), (2, 9), 0, 48, jnp.int32)


@pytest.mark.parametrize("name", ["mixed", "learned"])
def test_it_is_the_same_model(name, models):
    made = for_decoding(models[name], jnp.float32)
    assert made.spec.all_blocks == models[name].spec.all_blocks
    assert made.spec.repeats == 0
    found, wanted = (jax.jit(lambda m, t: m(t)[0])(model, TOKENS) for model in (made, models[name]))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert for_decoding(made, jnp.float32) is made


def test_it_generates_the_same(models):
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(48)}, unk_token="0"))
    options = {"max_tokens": 30, "sampling": GREEDY, "stop": (), "log_probs": True}
    plain = complete(models["mixed"], tokenizer, [[1, 2], [3]], **options)
    for found, wanted in zip(
        complete(for_decoding(models["mixed"], jnp.float32), tokenizer, [[1, 2], [3]], **options), plain, strict=True
    ):
        assert found.ids == wanted.ids
        np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)


def test_bfloat16_for_few_tokens_is_as_for_many(models):
    """Sums of products in place of matmuls: as close to float32 as these are."""
    model = for_decoding(models["learned"], jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(model) if x.ndim > 1} == {jnp.dtype(jnp.bfloat16)}
    call = jax.jit(lambda m, t, dtype: m(t, dtype=dtype)[0], static_argnums=2)
    wanted = call(models["learned"], TOKENS[:, :2], jnp.float32)
    few, many = call(model, TOKENS[:, :2], jnp.bfloat16), call(model, TOKENS, jnp.bfloat16)[:, :2]
    errors = [float(jnp.sqrt(jnp.mean((x - wanted) ** 2)) / jnp.std(wanted)) for x in (few, many)]
    assert errors[0] < 2 * errors[1] < 0.1

"""Tiny checkpoints of transformers give its logits, loss, gradient norms and greedy text (tests/truth/README.md)."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo import zoo
from flaxzoo.layers.loss import cross_entropy
from flaxzoo.zoo.decoder import DecoderModel
from flaxzoo.zoo.formats.save import ModelSource
from flaxzoo.zoo.parameters import Parameters, merge, split
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[2] / "truth"
NAMES = sorted(path.parent.name for path in TRUTH.glob("*/truth.npz"))


@functools.cache
def truth(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(TRUTH / name / "truth.npz"))


@functools.cache
def model_of(name: str) -> DecoderModel:
    return zoo.load(TRUTH / name, dtype=jnp.float32)[0]


def family_of(name: str) -> str:
    return zoo.open_source(TRUTH / name).config["model_type"]


@functools.cache
def outcome(name: str) -> tuple[np.ndarray, float, Parameters]:
    """Logits, mean loss over the next tokens and its gradient in every parameter."""
    model, data = model_of(name), truth(name)
    decoder = model.spec
    tokens, weights = jnp.asarray(data["input_ids"]), jnp.asarray(data["attention_mask"][:, 1:], jnp.float32)

    def mean_loss(parameters: Parameters) -> tuple[jax.Array, jax.Array]:
        model = merge(decoder.abstract(), parameters)
        hidden = model.hidden(tokens).x
        loss, _ = cross_entropy(
            hidden[:, :-1], model.output_embedding, tokens[:, 1:], weights, soft_cap=decoder.soft_cap, chunk=16
        )
        return loss / jnp.sum(weights), model.logits(hidden)

    (loss, logits), gradients = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(split(model))
    return np.asarray(logits), float(loss), gradients


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_loss(name):
    data = truth(name)
    logits, loss, _ = outcome(name)
    valid = data["attention_mask"] == 1
    np.testing.assert_allclose(logits[valid], data["logits"][valid], rtol=0, atol=1e-4)  # measured: at most 1.7e-5
    assert loss == pytest.approx(float(data["loss"]), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_norms(name):
    data, gradients = truth(name), outcome(name)[2]
    by_name = ModelSource(merge(model_of(name).spec.abstract(), gradients), config={"model_type": family_of(name)})
    wanted = dict(zip(data["gradient_names"].tolist(), data["gradient_norms"].tolist(), strict=True))
    squares: dict[str, float] = {}
    for tensor in by_name.tensors:
        square = float(np.sum(by_name.read(tensor).astype(np.float64) ** 2))
        squares[in_memory(tensor)] = squares.get(in_memory(tensor), 0.0) + square
    for buffer in squares.keys() - wanted.keys():  # what has no gradient
        assert buffer.endswith("e_score_correction_bias")
        assert squares.pop(buffer) == 0
    assert {name: square**0.5 for name, square in squares.items()} == pytest.approx(wanted, rel=2e-5)


def in_memory(name: str) -> str:
    """What transformers calls a tensor while it computes: all experts are one then, gate and up too."""
    name = re.sub(r"experts\.\d+\.(gate_proj|up_proj|w1|w3)\.weight", "experts.gate_up_proj", name)
    name = re.sub(r"experts\.\d+\.(down_proj|w2)\.weight", "experts.down_proj", name)
    return name.replace("block_sparse_moe", "mlp")


def test_longrope_takes_the_short_factors_for_a_short_text():
    data = truth("phi3_longrope")
    logits, _ = jax.jit(model_of("phi3_longrope"))(jnp.asarray(data["short12_input_ids"]))
    np.testing.assert_allclose(logits, data["short12_logits"], rtol=0, atol=1e-4)


# Learned positions; windows, soft caps and patterns; keys that stay as they were when longrope changes its factors;
# latent caches and experts.
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3_longrope", "gpt_oss", "deepseek_v3"])
def test_greedy_text(name):
    ids = truth(name)["greedy_ids"][0].tolist()
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(160)}, unk_token="0"))
    found = zoo.complete(
        model_of(name), tokenizer, [ids[:10]], max_tokens=16, sampling=zoo.GREEDY, stop=(), dtype=jnp.float32
    )
    assert found[0].ids == ids[10:]

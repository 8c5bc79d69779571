"""What the routers of tiny checkpoints do, against transformers (tests/truth/README.md)."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo import zoo
from flaxzoo.layers.mixers.mixer import Positions
from flaxzoo.zoo.decoder import DecoderModel, positions_from_zero
from flaxzoo.zoo.parameters import split

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[2] / "truth"


def case(name: str) -> tuple[DecoderModel, dict[str, np.ndarray]]:
    return zoo.load(TRUTH / name, dtype=jnp.float32)[0], dict(np.load(TRUTH / name / "truth.npz"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2_limited"])
def test_router_logits(name: str) -> None:
    """Block after block."""
    model, data = case(name)
    stacks = [
        [jax.tree.map(lambda x, at=at: x[at], stack) for stack in model.stack] for at in range(model.spec.repeats)
    ]
    tokens = jnp.asarray(data["input_ids"])
    x, positions, found = model.embedding(tokens, jnp.float32), positions_from_zero(tokens), []
    blocks: Any = itertools.chain(model.first, *stacks, model.rest)
    for block in blocks:
        if block.spec.ffn.routed:
            mixed, _ = block.mixer(block.mixer_norm(x), positions)
            found.append(block.ffn.router.logits(block.ffn_norm(x + mixed)))
        x, _, _ = block(x, positions)
    valid = data["attention_mask"] == 1
    np.testing.assert_allclose(np.stack(found)[:, valid], data["router_logits"][:, valid], rtol=0, atol=1e-4)


def test_routers_stay_float32_in_a_model_that_is_not() -> None:
    model, _ = zoo.load(TRUTH / "deepseek_v3", dtype=jnp.bfloat16)
    exact = {name for name, value in split(model).items() if value.dtype == jnp.float32}
    assert exact == {"stack.0.ffn.router.weight", "stack.0.ffn.router.correction"}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_loads_and_probabilities(name: str) -> None:
    """Over all layers together they give transformers' balance loss."""
    model, data = case(name)
    tokens, mask = jnp.asarray(data["input_ids"]), jnp.asarray(data["attention_mask"])
    positions = Positions(index=positions_from_zero(tokens).index, segments=mask)
    router_stats = jax.jit(lambda model: model.hidden(tokens, positions).router_stats)(model)
    load = np.concatenate([stats["load"] for stats in router_stats.values()]).sum(axis=0)
    probability = np.concatenate([stats["probability"] for stats in router_stats.values()]).sum(axis=0)
    count = data["attention_mask"].sum() * model.spec.layers
    assert load.size * np.sum(load / count * probability / count) == pytest.approx(data["balance_loss"], rel=1e-5)

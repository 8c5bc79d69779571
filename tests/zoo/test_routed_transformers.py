"""Tiny checkpoints with experts or latent attention give the logits, router logits, loss and gradients of transformers.

See tests/truth/README.md.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.loss import cross_entropy
from flaxzoo.layers.rope import YarnScaling
from flaxzoo.zoo import MLA, Attention, Block, Decoder, GatedMLP, Groups, MoE, RMSNorm, Rope, Router
from flaxzoo.zoo.decoder import plain_places
from flaxzoo.zoo.generate import _continue
from flaxzoo.zoo.parameters import Parameters, describe, merge
from safetensors.numpy import load_file

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[1] / "truth"

EPS5 = RMSNorm(eps=1e-5)
GQA = Attention(heads=4, kv_heads=2, head_dim=16, rope=Rope(theta=1e6))
MIXTRAL = Block(mixer=GQA, ffn=MoE(experts=4, expert=GatedMLP(hidden=64), router=Router(top_k=2)), norm=EPS5)
QWEN3 = Block(
    mixer=Attention(heads=4, kv_heads=2, head_dim=24, qk_norm=RMSNorm()),
    ffn=MoE(experts=8, expert=GatedMLP(hidden=32), router=Router(top_k=2)),
)
LATENT = MLA(heads=4, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16)
V2 = Block(
    mixer=LATENT,
    ffn=MoE(experts=8, expert=GatedMLP(hidden=32), router=Router(top_k=3, normalise=False), shared=GatedMLP(hidden=64)),
)
V3_ROUTER = Router(
    top_k=3, score="sigmoid", correction=True, scale=2.5, groups=Groups(groups=4, chosen=2, judged_by="best_two")
)
V3 = Block(
    mixer=LATENT.replace(query_rank=24),
    ffn=MoE(experts=8, expert=GatedMLP(hidden=32), router=V3_ROUTER, shared=GatedMLP(hidden=32)),
)
YARN = Rope(theta=150_000.0, scaling=YarnScaling(factor=4.0, original_length=16, truncate=False))
GPT_OSS = Block(
    mixer=GQA.replace(rope=YARN, bias=True, output_bias=True, sinks=True, window=8),
    ffn=MoE(
        experts=4,
        expert=GatedMLP(hidden=48, activation="quick_gelu", bias=True, limit=7.0, offset=1.0),
        router=Router(top_k=2, bias=True),
    ),
    norm=EPS5,
)
DECODERS = {
    "mixtral": Decoder(vocab=160, dim=64, layers=3, block=(MIXTRAL,), norm=EPS5, tied=False),
    "qwen3_moe": Decoder(vocab=160, dim=64, layers=3, block=(QWEN3,), tied=False),
    "deepseek_v2": Decoder(
        vocab=160, dim=64, layers=3, first=(V2.replace(ffn=GatedMLP(hidden=96)),), block=(V2,), tied=False
    ),
    "deepseek_v3": Decoder(
        vocab=160, dim=64, layers=3, first=(V3.replace(ffn=GatedMLP(hidden=96)),), block=(V3,), tied=False
    ),
    "gpt_oss": Decoder(
        vocab=160, dim=64, layers=4, block=(GPT_OSS, GPT_OSS.replace(**{"mixer.window": None})), norm=EPS5, tied=False
    ),
}

# Our name to the checkpoint's. "{e}": one tensor for each expert; "@cut": a rule of `take` below.
NAMES = {
    "embedding.table": "model.embed_tokens.weight",
    "head.table": "lm_head.weight",
    "norm.scale": "model.norm.weight",
    "mixer_norm.scale": "input_layernorm.weight",
    "ffn_norm.scale": "post_attention_layernorm.weight",
    "mixer.query.weight": "self_attn.q_proj.weight",
    "mixer.query.bias": "self_attn.q_proj.bias",
    "mixer.key.weight": "self_attn.k_proj.weight",
    "mixer.key.bias": "self_attn.k_proj.bias",
    "mixer.value.weight": "self_attn.v_proj.weight",
    "mixer.value.bias": "self_attn.v_proj.bias",
    "mixer.output.weight": "self_attn.o_proj.weight",
    "mixer.output.bias": "self_attn.o_proj.bias",
    "mixer.sinks": "self_attn.sinks",
    "mixer.query_norm.scale": "self_attn.q_norm.weight",
    "mixer.key_norm.scale": "self_attn.k_norm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.router.correction": "mlp.gate.e_score_correction_bias",
    "ffn.experts.gate.weight": "mlp.experts.{e}.gate_proj.weight",
    "ffn.experts.up.weight": "mlp.experts.{e}.up_proj.weight",
    "ffn.experts.down.weight": "mlp.experts.{e}.down_proj.weight",
    "ffn.shared.gate.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.up.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}
LATENT_NAMES = NAMES | {
    "mixer.query_down.weight": "self_attn.q_a_proj.weight",
    "mixer.query_norm.scale": "self_attn.q_a_layernorm.weight",
    "mixer.latent.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "mixer.latent_norm.scale": "self_attn.kv_a_layernorm.weight",
    "mixer.key_value.weight": "self_attn.kv_b_proj.weight",
}
TABLES = {
    "mixtral": NAMES
    | {
        "ffn.router.weight": "block_sparse_moe.gate.weight",
        "ffn.experts.gate.weight": "block_sparse_moe.experts.{e}.w1.weight",
        "ffn.experts.up.weight": "block_sparse_moe.experts.{e}.w3.weight",
        "ffn.experts.down.weight": "block_sparse_moe.experts.{e}.w2.weight",
    },
    "qwen3_moe": NAMES,
    "deepseek_v2": LATENT_NAMES,
    "deepseek_v3": LATENT_NAMES | {"mixer.query.weight": "self_attn.q_b_proj.weight"},
    "gpt_oss": NAMES
    | {
        "ffn.router.weight": "mlp.router.weight",
        "ffn.router.bias": "mlp.router.bias",
        "ffn.experts.gate.weight": "mlp.experts.gate_up_proj@0",
        "ffn.experts.up.weight": "mlp.experts.gate_up_proj@1",
        "ffn.experts.gate.bias": "mlp.experts.gate_up_proj_bias@0",
        "ffn.experts.up.bias": "mlp.experts.gate_up_proj_bias@1",
        "ffn.experts.down.weight": "mlp.experts.down_proj@",
        "ffn.experts.down.bias": "mlp.experts.down_proj_bias@",
    },
}


def checkpoint_name(family: str, ours: str, layer: int) -> str:
    inside = re.sub(r"^(first|stack|rest)\.\d+\.", "", ours)
    return ("" if inside == ours else f"model.layers.{layer}.") + TABLES[family][inside]


def layers_of(decoder: Decoder, ours: str) -> range:
    """The layers that one of our arrays stacks; layer 0 where it stacks none."""
    stacked = re.match(r"stack\.(\d+)\.", ours)
    return range(len(decoder.first) + int(stacked[1]), decoder.layers, len(decoder.block)) if stacked else range(1)


@functools.cache
def truth(family: str) -> dict[str, np.ndarray]:
    return dict(np.load(TRUTH / family / "truth.npz"))


@functools.cache
def parameters(family: str) -> Parameters:
    """The checkpoint by our names; every one of its tensors is used."""
    decoder, tensors = DECODERS[family], load_file(TRUTH / family / "model.safetensors")
    used = set()

    def take(name: str) -> np.ndarray:
        if "{e}" in name:
            count = decoder.block[0].ffn.experts  # pyright: ignore
            return np.stack([take(name.format(e=e)) for e in range(count)])
        whole, at, part = name.partition("@")
        used.add(whole)
        if at:  # gpt-oss stores x W of all experts in one, columns of gate and up by turns
            return tensors[whole][..., int(part) :: 2] if part else tensors[whole]
        return tensors[whole] if "embed_tokens" in name or "lm_head" in name else tensors[whole].T

    found = {}
    for ours, known in describe(decoder.abstract()).items():
        layers = [take(checkpoint_name(family, ours, layer)) for layer in layers_of(decoder, ours)]
        found[ours] = jnp.asarray(np.stack(layers).reshape(known.shape))
    assert used == set(tensors)
    return found


@functools.cache
def outcome(family: str) -> tuple[np.ndarray, float, Parameters, dict[str, dict[str, np.ndarray]]]:
    """Logits, mean loss over the next tokens, its gradient in every parameter, and what the routers did."""
    decoder, data = DECODERS[family], truth(family)
    tokens, mask = jnp.asarray(data["input_ids"]), jnp.asarray(data["attention_mask"])

    def mean_loss(parameters: Parameters):
        model = merge(decoder.abstract(), parameters)
        places = plain_places(tokens)
        hidden, _, routing = model.hidden_and_routing(tokens, type(places)(places.positions, mask))
        weights = mask[:, 1:].astype(jnp.float32)
        loss, _ = cross_entropy(hidden[:, :-1], model.output_embedding, tokens[:, 1:], weights, chunk=16)
        return loss / jnp.sum(weights), (model.logits(hidden), routing)

    (loss, (logits, routing)), gradients = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(parameters(family))
    return np.asarray(logits), float(loss), gradients, jax.device_get(routing)


@pytest.mark.parametrize("family", DECODERS)
def test_logits_and_loss(family):
    data = truth(family)
    logits, loss, _, _ = outcome(family)
    valid = data["attention_mask"] == 1
    np.testing.assert_allclose(logits[valid], data["logits"][valid], rtol=0, atol=1e-4)
    assert loss == pytest.approx(float(data["loss"]), abs=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_gradient_norms(family):
    decoder, data = DECODERS[family], truth(family)
    squares: dict[str, float] = {}
    for ours, gradient in outcome(family)[2].items():
        layers = layers_of(decoder, ours)
        for layer, one in zip(layers, np.asarray(gradient, np.float64).reshape(len(layers), -1), strict=True):
            name = in_memory(checkpoint_name(family, ours, layer))
            squares[name] = squares.get(name, 0.0) + float(np.sum(one**2))
    assert all(not square for name, square in squares.items() if name.endswith("e_score_correction_bias"))
    found = {name: square**0.5 for name, square in squares.items() if not name.endswith("e_score_correction_bias")}
    wanted = dict(zip(data["gradient_names"].tolist(), data["gradient_norms"].tolist(), strict=True))
    assert found == pytest.approx(wanted, rel=2e-5)


def in_memory(name: str) -> str:
    """The name of a parameter while transformers computes: experts are one tensor, gate and up too."""
    name = name.partition("@")[0].replace("block_sparse_moe", "mlp")
    name = re.sub(r"experts\.\{e\}\.(gate_proj|up_proj|w1|w3)\.weight", "experts.gate_up_proj", name)
    return re.sub(r"experts\.\{e\}\.(down_proj|w2)\.weight", "experts.down_proj", name)


@pytest.mark.parametrize("family", [family for family in DECODERS if not family.startswith("deepseek")])
def test_router_logits(family):
    decoder, data = DECODERS[family], truth(family)
    model = merge(decoder.abstract(), parameters(family))
    tokens = jnp.asarray(data["input_ids"])
    x, places, found = model.embedding(tokens, jnp.float32), plain_places(tokens), []
    for layer in range(decoder.layers):
        stack = model.stack[layer % len(decoder.block)]
        block = jax.tree.map(lambda x, at=layer // len(decoder.block): x[at], stack)
        mixed, _ = block.mixer(block.mixer_norm(x), places)
        found.append(block.ffn.router.logits(block.ffn_norm(x + mixed)))
        x, _, _ = block(x, places)
    valid = data["attention_mask"] == 1
    np.testing.assert_allclose(np.stack(found)[:, valid], data["router_logits"][:, valid], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_loads_and_probabilities(family):
    """Over all layers together they give transformers' balance loss, which is top_k times ours."""
    data, routing = truth(family), outcome(family)[3]
    load = np.concatenate([one["load"] for one in routing.values()]).sum(axis=0)
    probability = np.concatenate([one["probability"] for one in routing.values()]).sum(axis=0)
    tokens = data["attention_mask"].sum() * DECODERS[family].layers
    found = load.size * np.sum(load / tokens * probability / tokens)
    assert found == pytest.approx(float(data["balance_loss"]), rel=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_text(family):
    ids = truth(family)["greedy_ids"]
    model = merge(DECODERS[family].abstract(), parameters(family))
    prompt = jnp.pad(jnp.asarray(ids[:, :10]), ((0, 0), (0, 3)))
    keys = jax.random.split(jax.random.key(0), 1)
    lengths, greedy = jnp.asarray([10], jnp.int32), jnp.zeros(())
    drawn = _continue(model, prompt, lengths, keys, greedy, count=16, top_k=0, dtype=jnp.float32)
    np.testing.assert_array_equal(drawn, ids[:, 10:])

"""Tiny checkpoints of transformers give its logits, loss, gradient norms and greedy text (tests/truth/README.md)."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.block import Block
from flaxzoo.layers.loss import cross_entropy
from flaxzoo.layers.rope import Llama3Scaling, LongRopeScaling
from flaxzoo.zoo import MLP, Attention, Decoder, GatedMLP, LayerNorm, RMSNorm, Rope
from flaxzoo.zoo.generate import _continue
from flaxzoo.zoo.parameters import Parameters, describe, merge
from safetensors.numpy import load_file

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[1] / "truth"

ATTENTION = Attention(heads=4, kv_heads=2, head_dim=16)
SWIGLU = GatedMLP(hidden=96)
LLAMA = Decoder(vocab=160, dim=64, layers=3, block=(Block(mixer=ATTENTION, ffn=SWIGLU),), tied=False)
EPS5 = {"block.0.norm.eps": 1e-5, "norm.eps": 1e-5}
LLAMA3 = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=16)
LONGROPE = LongRopeScaling(
    short_factors=(1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35),
    long_factors=(1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75),
    original_length=16,
    length=64,
)
CENTERED = RMSNorm(zero_centered=True)
GEGLU = GatedMLP(hidden=96, activation="gelu_tanh")
GEMMA = Block(mixer=ATTENTION.replace(head_dim=24), ffn=GEGLU, norm=CENTERED)
GEMMA_DECODER = Decoder(vocab=160, dim=64, layers=3, block=(GEMMA,), norm=CENTERED, scale_embedding=True)
GEMMA2 = GEMMA.replace(placement="sandwich", **{"mixer.soft_cap": 5.0, "mixer.scale": 16**-0.5})
GEMMA3 = GEMMA.replace(placement="sandwich", **{"mixer.qk_norm": CENTERED, "ffn.hidden": 64})

DECODERS = {
    "gpt2": Decoder(
        vocab=160,
        dim=64,
        layers=3,
        block=(
            Block(
                mixer=Attention(heads=4, kv_heads=4, head_dim=16, rope=None, bias=True, output_bias=True),
                ffn=MLP(hidden=256),
                norm=LayerNorm(),
            ),
        ),
        norm=LayerNorm(),
        max_positions=64,
    ),
    "llama": LLAMA,
    "llama3_rope": LLAMA.replace(**{"block.0.mixer.rope": Rope(theta=5e5, scaling=LLAMA3)}),
    "mistral": LLAMA.replace(**{"block.0.mixer.window": 8}),
    "qwen2": LLAMA.replace(tied=True, **{"block.0.mixer.bias": True}),
    "qwen3": LLAMA.replace(**{"block.0.mixer.qk_norm": RMSNorm(), "block.0.mixer.head_dim": 24}),
    "gemma": GEMMA_DECODER,
    "gemma2": GEMMA_DECODER.replace(layers=4, soft_cap=6.0, block=(GEMMA2.replace(**{"mixer.window": 8}), GEMMA2)),
    "gemma3_text": GEMMA_DECODER.replace(
        dim=48,
        layers=6,
        block=(GEMMA3.replace(**{"mixer.window": 8}),) * 5 + (GEMMA3.replace(**{"mixer.rope.theta": 1e6}),),
    ),
    "smollm3": LLAMA.replace(
        layers=4,
        tied=True,
        block=(LLAMA.block[0].replace(**{"mixer.rope": Rope(theta=2e6)}),) * 3
        + (LLAMA.block[0].replace(**{"mixer.rope": None}),),
    ),
    "phi3": LLAMA.replace(**EPS5),
    "phi3_longrope": LLAMA.replace(**EPS5, **{"block.0.mixer.rope": Rope(scaling=LONGROPE)}),
}

# Our name to the checkpoint's, without "model.", "layers.{i}." and ".weight"; matrices are transposed, but embeddings.
NAMES = {
    "embedding.table": "embed_tokens",
    "head.table": "lm_head",
    "norm.scale": "norm",
    "mixer_norm.scale": "input_layernorm",
    "ffn_norm.scale": "post_attention_layernorm",
    "mixer.query.weight": "self_attn.q_proj",
    "mixer.query.bias": "self_attn.q_proj.bias",
    "mixer.key.weight": "self_attn.k_proj",
    "mixer.key.bias": "self_attn.k_proj.bias",
    "mixer.value.weight": "self_attn.v_proj",
    "mixer.value.bias": "self_attn.v_proj.bias",
    "mixer.output.weight": "self_attn.o_proj",
    "mixer.query_norm.scale": "self_attn.q_norm",
    "mixer.key_norm.scale": "self_attn.k_norm",
    "ffn.gate.weight": "mlp.gate_proj",
    "ffn.up.weight": "mlp.up_proj",
    "ffn.down.weight": "mlp.down_proj",
}
SANDWICH = NAMES | {
    "mixer_output_norm.scale": "post_attention_layernorm",
    "ffn_norm.scale": "pre_feedforward_layernorm",
    "ffn_output_norm.scale": "post_feedforward_layernorm",
}
GPT2 = {
    "embedding.table": "wte",
    "positions.table": "wpe",
    "norm.scale": "ln_f",
    "norm.bias": "ln_f.bias",
    "mixer_norm.scale": "ln_1",
    "mixer_norm.bias": "ln_1.bias",
    "ffn_norm.scale": "ln_2",
    "ffn_norm.bias": "ln_2.bias",
    "mixer.query.weight": "attn.c_attn#0",
    "mixer.query.bias": "attn.c_attn.bias#0",
    "mixer.key.weight": "attn.c_attn#1",
    "mixer.key.bias": "attn.c_attn.bias#1",
    "mixer.value.weight": "attn.c_attn#2",
    "mixer.value.bias": "attn.c_attn.bias#2",
    "mixer.output.weight": "attn.c_proj",
    "mixer.output.bias": "attn.c_proj.bias",
    "ffn.up.weight": "mlp.c_fc",
    "ffn.up.bias": "mlp.c_fc.bias",
    "ffn.down.weight": "mlp.c_proj",
    "ffn.down.bias": "mlp.c_proj.bias",
}
PHI3 = NAMES | {  # "#i": part i of a fused tensor
    "mixer.query.weight": "self_attn.qkv_proj#0",
    "mixer.key.weight": "self_attn.qkv_proj#1",
    "mixer.value.weight": "self_attn.qkv_proj#2",
    "ffn.gate.weight": "mlp.gate_up_proj#0",
    "ffn.up.weight": "mlp.gate_up_proj#1",
}
TABLES = {"gpt2": GPT2, "gemma2": SANDWICH, "gemma3_text": SANDWICH, "phi3": PHI3, "phi3_longrope": PHI3}
CUTS = {"qkv_proj": [64, 96], "gate_up_proj": [96], "c_attn": [64, 128]}  # where fused tensors are cut


def checkpoint_name(family: str, ours: str, layer: int = 0) -> str:
    """The checkpoint's name of one of our arrays, "#i" at its end where it is part of a fused tensor."""
    inside = re.sub(r"^(stack|rest)\.\d+\.", "", ours)
    name, cut, part = TABLES.get(family, NAMES)[inside].partition("#")
    name += "" if name.endswith(".bias") else ".weight"
    folder, layers = ("transformer.", "h") if family == "gpt2" else ("model.", "layers")
    folder = "" if name.startswith("lm_head") else folder
    return folder + (f"{layers}.{layer}." if inside != ours else "") + name + cut + part


def layers_of(decoder: Decoder, ours: str) -> range:
    """The layers that one of our arrays stacks; layer 0 where it stacks none."""
    stacked = re.match(r"stack\.(\d+)\.", ours)
    return range(int(stacked[1]), decoder.layers, len(decoder.block)) if stacked else range(1)


@functools.cache
def truth(family: str) -> dict[str, np.ndarray]:
    return dict(np.load(TRUTH / family / "truth.npz"))


@functools.cache
def parameters(family: str) -> Parameters:
    """The checkpoint by our names; every one of its tensors is used."""
    decoder, tensors = DECODERS[family], load_file(TRUTH / family / "model.safetensors")
    used = set()

    def take(name: str) -> np.ndarray:
        whole, _, part = name.partition("#")
        used.add(whole)
        # GPT-2 stores matrices as in x W, others transposed.
        turned = "embed_tokens" in name or "lm_head" in name or family == "gpt2"
        tensor = tensors[whole] if turned else tensors[whole].T
        cuts = next((cuts for fused, cuts in CUTS.items() if fused in whole), [])
        return np.split(tensor, cuts, axis=-1)[int(part)] if part else tensor

    found = {}
    for ours, known in describe(decoder.abstract()).items():
        layers = [take(checkpoint_name(family, ours, layer)) for layer in layers_of(decoder, ours)]
        found[ours] = jnp.asarray(np.stack(layers).reshape(known.shape))
    assert used == set(tensors)
    return found


@functools.cache
def outcome(family: str) -> tuple[np.ndarray, float, Parameters]:
    """Logits, mean loss over the next tokens and its gradient in every parameter."""
    decoder, data = DECODERS[family], truth(family)
    tokens, weights = jnp.asarray(data["input_ids"]), jnp.asarray(data["attention_mask"][:, 1:], jnp.float32)

    def mean_loss(parameters: Parameters) -> tuple[jax.Array, jax.Array]:
        model = merge(decoder.abstract(), parameters)
        hidden, _ = model.hidden(tokens)
        loss, _ = cross_entropy(
            hidden[:, :-1], model.output_embedding, tokens[:, 1:], weights, soft_cap=decoder.soft_cap, chunk=16
        )
        return loss / jnp.sum(weights), model.logits(hidden)

    (loss, logits), gradients = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(parameters(family))
    return np.asarray(logits), float(loss), gradients


@pytest.mark.parametrize("family", DECODERS)
def test_logits_and_loss(family):
    data = truth(family)
    logits, loss, _ = outcome(family)
    valid = data["attention_mask"] == 1
    np.testing.assert_allclose(logits[valid], data["logits"][valid], rtol=0, atol=1e-4)  # measured: at most 1.7e-5
    assert loss == pytest.approx(float(data["loss"]), abs=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_gradient_norms(family):
    decoder, data = DECODERS[family], truth(family)
    squares: dict[str, float] = {}
    for ours, gradient in outcome(family)[2].items():
        layers = layers_of(decoder, ours)
        for layer, one in zip(layers, np.asarray(gradient, np.float64).reshape(len(layers), -1), strict=True):
            name = checkpoint_name(family, ours, layer).partition("#")[0]
            squares[name] = squares.get(name, 0.0) + float(np.sum(one**2))
    wanted = dict(zip(data["gradient_names"].tolist(), data["gradient_norms"].tolist(), strict=True))
    assert squares.keys() == wanted.keys()
    assert {name: square**0.5 for name, square in squares.items()} == pytest.approx(wanted, rel=2e-5)


def test_longrope_takes_the_short_factors_for_a_short_text():
    data = truth("phi3_longrope")
    model = merge(DECODERS["phi3_longrope"].abstract(), parameters("phi3_longrope"))
    logits, _ = jax.jit(model)(jnp.asarray(data["short12_input_ids"]))
    np.testing.assert_allclose(logits, data["short12_logits"], rtol=0, atol=1e-4)


# Learned positions; windows, soft caps and patterns; keys that stay as they were when longrope changes its factors.
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3_longrope"])
def test_greedy_text(family):
    ids = truth(family)["greedy_ids"]
    model = merge(DECODERS[family].abstract(), parameters(family))
    prompt = jnp.pad(jnp.asarray(ids[:, :10]), ((0, 0), (0, 3)))
    keys = jax.random.split(jax.random.key(0), 1)
    lengths, greedy = jnp.asarray([10], jnp.int32), jnp.zeros(())
    drawn = _continue(model, prompt, lengths, keys, greedy, count=16, top_k=0, dtype=jnp.float32)
    np.testing.assert_array_equal(drawn, ids[:, 10:])

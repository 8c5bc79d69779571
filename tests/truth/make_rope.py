"""Writes rope.json beside it: rotary embeddings as Hugging Face transformers computes them, on the CPU in float32.

    python3.11 -m venv /tmp/truth && /tmp/truth/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    /tmp/truth/bin/python tests/truth/make_rope.py

A case holds our spec (`Rope.to_dict()`), transformers' inverse frequencies and attention factor, and the shared `x`
(cut to the case's head dim) turned by transformers' modeling code at the case's positions.
"""

# pyright: reportMissingImports=false
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.phi import modeling_phi as phi
from transformers.models.phi3 import modeling_phi3 as phi3

POSITIONS = [1, 77, 4095, 131071]
SIZES = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
generator = torch.Generator().manual_seed(0)
X = torch.randint(-128, 129, (len(POSITIONS), 128), generator=generator) / 64  # T H, exact in few digits


def sizes(head_dim):
    return SIZES | {"head_dim": head_dim, "hidden_size": 2 * head_dim}


def x_of(head_dim):
    return X[None, :, None, :head_dim]  # B T N H


def digits(tensor):
    return [float(f"{value:.9g}") for value in tensor.detach().to(torch.float32).flatten().tolist()]


def case(name, rope, head_dim, inverse, factor, turned, positions):
    return {
        "name": name,
        "rope": {"kind": "Rope"} | rope,
        "head_dim": head_dim,
        "positions": positions,
        "frequencies": digits(inverse),
        "attention_factor": float(factor),
        "turned": digits(turned),
    }


def rotate_half(name, rope, head_dim, parameters, module=llama, prefix="Llama", positions=POSITIONS, **config):
    """A model whose pairs are half a head apart: its own rotary class and its own apply function."""
    settings = getattr(transformers, f"{prefix}Config")(**sizes(head_dim), rope_parameters=parameters, **config)
    embedding = getattr(module, f"{prefix}RotaryEmbedding")(settings)
    x = x_of(head_dim)
    cos, sin = embedding(x, torch.tensor([positions]))
    dim = embedding.inv_freq.shape[0] * 2
    # Phi and GPT-NeoX split off the part that passes in their attention; Phi-3 and GLM in the apply function.
    turned, _ = module.apply_rotary_pos_emb(x[..., :dim], x[..., :dim], cos, sin, unsqueeze_dim=2)
    turned = torch.cat((turned, x[..., dim:]), dim=-1)
    return case(name, rope, head_dim, embedding.inv_freq, embedding.attention_scaling, turned, positions)


def yarn(**fields):
    return {"kind": "YarnScaling"} | fields


def llama3(factor):
    ours = {"kind": "Llama3Scaling", "factor": factor, "original_length": 8192}
    ours |= {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0}
    theirs = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192}
    return ours, theirs | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def plain_cases():
    yield rotate_half("Llama 2", {}, 128, {"rope_type": "default", "rope_theta": 10000.0})
    yield rotate_half("Llama 3", {"theta": 500000.0}, 128, {"rope_type": "default", "rope_theta": 500000.0})
    yield rotate_half("Qwen 3", {"theta": 1e6}, 96, {"rope_type": "default", "rope_theta": 1e6})
    partial = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}
    yield rotate_half("Phi 2, partial", {"fraction": 0.4}, 80, partial, phi, "Phi")
    partial = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    yield rotate_half("GPT-NeoX, partial", {"fraction": 0.25}, 96, partial, neox, "GPTNeoX")


def scaled_cases():
    linear = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    rope = {"theta": 1e6, "scaling": {"kind": "LinearScaling", "factor": 8.0}}
    yield rotate_half("Gemma 3 global, linear", rope, 128, linear)

    proportional = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    rope = {"theta": 1e6, "scaling": {"kind": "ProportionalScaling", "fraction": 0.25}}
    yield rotate_half("Gemma 4 global, proportional", rope, 128, proportional)

    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    rope = {"scaling": {"kind": "DynamicNTKScaling", "factor": 2.0, "original_length": 4096}}
    for name, positions in ("unscaled", [1, 77, 2048, 4095]), ("scaled", [1, 77, 4095, 16383]):
        yield rotate_half(f"dynamic NTK, {name}", rope, 64, dynamic, positions=positions, max_position_embeddings=4096)

    theirs = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = {"theta": 1e6, "scaling": yarn(factor=4.0, original_length=32768)}
    yield rotate_half("Qwen 2.5, yarn", rope, 128, theirs, max_position_embeddings=131072)

    theirs = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    theirs |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    rope = {"theta": 150000.0, "scaling": yarn(factor=32.0, original_length=4096, truncate=False)}
    yield rotate_half("gpt-oss, yarn untruncated", rope, 64, theirs, gpt_oss, "GptOss", max_position_embeddings=131072)

    theirs = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
    theirs |= {"mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": None}
    rope = {"scaling": yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.5)}
    yield rotate_half("yarn, two mscales", rope, 64, theirs, max_position_embeddings=163840)

    for factor in 8.0, 32.0:
        ours, theirs = llama3(factor)
        rope = {"theta": 500000.0, "scaling": ours}
        name = {8.0: "Llama 3.1", 32.0: "Llama 3.2"}[factor]
        yield rotate_half(
            name, rope, {8.0: 128, 32.0: 64}[factor], theirs | {"rope_theta": 500000.0}, max_position_embeddings=131072
        )

    # The shape of Phi-3-mini-128k: 48 pairs, short factors near 1 to 3, long ones up to 65; made up, of few digits.
    short = [round(1.05 + 0.04 * i, 3) for i in range(48)]
    long = [round(1.08 + 0.028 * i**2, 3) for i in range(48)]
    theirs = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    ours = {"kind": "LongRopeScaling", "short_factors": short, "long_factors": long}
    ours |= {"original_length": 4096, "length": 131072}
    for name, positions in ("short", [1, 77, 2048, 4095]), ("long", [1, 77, 2048, 4096]), ("longest", POSITIONS):
        yield rotate_half(
            f"Phi 3, longrope {name}",
            {"scaling": ours},
            96,
            theirs,
            phi3,
            "Phi3",
            positions,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            pad_token_id=0,
        )


def interleaved_cases():
    at = torch.tensor([POSITIONS])
    x = x_of(64)
    table = gptj.create_sinusoidal_positions(max(POSITIONS) + 1, 32)[at]
    sin, cos = torch.split(table, 16, dim=-1)
    turned = torch.cat((gptj.apply_rotary_pos_emb(x[..., :32], sin, cos), x[..., 32:]), dim=-1)
    inverse = 1.0 / (10000 ** (torch.arange(0, 32, 2, dtype=torch.int64) / 32))  # create_sinusoidal_positions
    yield case("GPT-J", {"interleaved": True, "fraction": 0.5}, 64, inverse, 1.0, turned, POSITIONS)

    ours, theirs = llama3(16.0)
    config = transformers.Llama4TextConfig(**sizes(128), rope_parameters=theirs | {"rope_theta": 500000.0})
    embedding = llama4.Llama4TextRotaryEmbedding(config)
    turned, _ = llama4.apply_rotary_emb(x_of(128), x_of(128), embedding(x_of(128), at))
    rope = {"theta": 500000.0, "interleaved": True, "scaling": ours}
    yield case("Llama 4", rope, 128, embedding.inv_freq, embedding.attention_scaling, turned, POSITIONS)

    theirs = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
    theirs |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = transformers.DeepseekV3Config(qk_rope_head_dim=64, rope_parameters=theirs, max_position_embeddings=163840)
    embedding = deepseek.DeepseekV3RotaryEmbedding(config)
    cos, sin = embedding(x, at)
    turned, _ = deepseek.apply_rotary_pos_emb_interleave(x, x, cos, sin, unsqueeze_dim=2)
    turned = torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2)  # it leaves the pairs half a head apart
    scaling = yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
    rope = {"interleaved": True, "scaling": scaling}
    yield case("DeepSeek V3", rope, 64, embedding.inv_freq, embedding.attention_scaling, turned, POSITIONS)


if __name__ == "__main__":
    truth = {
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}, {sys.platform}",
        "x": [digits(row) for row in X],
        "yarn_mscale": [[f, m, deepseek.yarn_get_mscale(f, m)] for f in (0.5, 1.0, 4.0, 40.0) for m in (0.707, 1.0)],
        "cases": [*plain_cases(), *scaled_cases(), *interleaved_cases()],
    }
    rows = ",\n".join(json.dumps(item, separators=(",", ":")) for item in truth.pop("cases"))
    head = ",\n".join(f'"{name}":{json.dumps(value, separators=(",", ":"))}' for name, value in truth.items())
    Path(__file__).with_name("rope.json").write_text(f'{{{head},\n"cases":[\n{rows}\n]}}\n')

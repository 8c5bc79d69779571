"""Makes tiny checkpoints with random weights, and what transformers computes from them.

    python -m venv /tmp/truth && /tmp/truth/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/truth/bin/python tests/truth/make_checkpoints.py olmo2 ministral     # or --all; --into FOLDER

Written for each: config.json, config_v4.json (the style of transformers 4, which most of the hub has),
model.safetensors and truth.npz (README.md says what is in it). Weights are rounded to bfloat16 and stored so, which
halves the files; everything is computed from them in float32. The tests need neither torch nor transformers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).parent
LENGTH, VALID, PROMPT, NEW = 24, (24, 17), 10, 16
SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1 + 0.05 * i for i in range(8)],
    "long_factor": [1 + 0.25 * i for i in range(8)],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}
GEMMA = {"head_dim": 24, "tie_word_embeddings": True}
GPT2 = {name: SHAPE[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2 | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "llama": ("llama", SHAPE),
    "llama3_rope": (
        "llama",
        SHAPE | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 16}},
    ),
    "mistral": ("mistral", SHAPE | {"sliding_window": 8, "head_dim": 16}),
    "ministral": (
        "ministral",
        SHAPE
        | {
            "sliding_window": 8,
            "head_dim": 16,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "gemma": ("gemma", SHAPE | GEMMA),
    "gemma2": (
        "gemma2",
        SHAPE
        | GEMMA
        | {
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        SHAPE | GEMMA | {"num_hidden_layers": 6, "hidden_size": 48, "intermediate_size": 64, "sliding_window": 8},
    ),
    "phi3": ("phi3", SHAPE),
    "phi3_longrope": ("phi3", SHAPE | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "qwen2": ("qwen2", SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", SHAPE | {"head_dim": 24}),
    "smollm3": ("smollm3", SHAPE | {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", SHAPE),
    "mixtral": ("mixtral", SHAPE | {"intermediate_size": 64, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", SHAPE | EXPERTS | {"head_dim": 24, "norm_topk_prob": True, "num_experts": 8}),
    "deepseek_v2": ("deepseek_v2", SHAPE | EXPERTS | LATENT | {"q_lora_rank": None, "num_experts_per_tok": 3}),
    "deepseek_v2_limited": (
        "deepseek_v2",
        SHAPE
        | EXPERTS
        | LATENT
        | {
            "q_lora_rank": 24,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        SHAPE | EXPERTS | LATENT | {"q_lora_rank": 24, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
    ),
    "gpt_oss": (
        "gpt_oss",
        SHAPE
        | {"num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 48, "sliding_window": 8}
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN | {"truncate": False}},
    ),
    "stablelm": ("stablelm", SHAPE | {"use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    "stablelm_parallel": ("stablelm", SHAPE | {"use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", SHAPE | {"sliding_window": 8, "tie_word_embeddings": True}),
}


def model_of(name: str) -> Any:
    """The model in float32, its weights drawn by the name's place in the list: new ones come at its end."""
    kind, fields = CHECKPOINTS[name]
    generator = torch.Generator().manual_seed(1000 + list(CHECKPOINTS).index(name))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **fields), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in label or label.endswith(("wte.weight", "wpe.weight")):
                drawn = 0.5 * noise
            elif parameter.ndim > 1:
                fan_in = parameter.shape[0] if kind == "gpt2" else parameter.shape[-1]
                drawn = 1.2 / fan_in**0.5 * noise
            else:  # norms start where the model has them: at 1, or at 0 where it adds the 1
                drawn = parameter + 0.2 * noise
            parameter.copy_(drawn.to(torch.bfloat16).to(torch.float32))
        for label, buffer in model.named_buffers():
            if label.endswith("e_score_correction_bias"):
                noise = 0.2 * torch.randn(buffer.shape, generator=generator)
                buffer.copy_(noise.to(torch.bfloat16).to(torch.float32))
    return model


def truth_of(model: Any) -> dict[str, np.ndarray]:
    """What truth.npz holds; leaves the gradients of the loss in the model."""
    random = np.random.default_rng(7)
    ids = torch.tensor(random.integers(3, model.config.vocab_size, (2, LENGTH)))
    mask = torch.tensor([[1] * valid + [0] * (LENGTH - valid) for valid in VALID])
    ids = torch.where(mask == 1, ids, 0)
    routed = {"output_router_logits": True} if hasattr(model.config, "num_experts_per_tok") else {}
    output = model(input_ids=ids, attention_mask=mask, **routed)
    logits = output.logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    nll, weights = losses.view(2, -1), mask[:, 1:].float()
    loss = (nll * weights).sum() / weights.sum()
    loss.backward()
    norms = {label: float(p.grad.double().norm()) for label, p in model.named_parameters()}
    text = ids[:1, :PROMPT]
    with torch.no_grad():
        for _ in range(NEW):
            text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    told = {}
    if getattr(output, "router_logits", None):
        told["router_logits"] = torch.stack(output.router_logits).detach().view(-1, 2, LENGTH, routers(model)).numpy()
    if getattr(output, "aux_loss", None) is not None:
        told["balance_loss"] = np.asarray(output.aux_loss.detach(), np.float32)
    return told | {
        "input_ids": ids.numpy().astype(np.int32),
        "attention_mask": mask.numpy().astype(np.int32),
        "logits": logits.detach().numpy(),
        "loss": np.asarray(loss.detach()),
        "nll": (nll * weights).detach().numpy(),
        "greedy_ids": text.numpy().astype(np.int32),
        "gradient_names": np.asarray(list(norms)),
        "gradient_norms": np.asarray(list(norms.values())),
    }


def routers(model: Any) -> int:
    """How many experts a router chooses from."""
    config = model.config.to_dict()
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    return next(config[name] for name in names if name in config)


def older(config: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers 4 wrote it."""
    fields = {name: value for name, value in config.items() if name not in ("transformers_version", "dtype")}
    fields["torch_dtype"] = config["dtype"]
    rope = fields.pop("rope_parameters", None)
    if rope and "full_attention" in rope:
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope:
        fields["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        fields["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
        if "partial_rotary_factor" in rope:
            fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return fields


def write(name: str, folder: Path) -> None:
    """Writes one checkpoint and its truth."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model_of(name)
    arrays: dict[str, Any] = truth_of(model)
    np.savez_compressed(folder / "truth.npz", **arrays)
    model.to(torch.bfloat16).save_pretrained(folder)  # with the hub's names: a tensor for each expert
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    for file, fields in (("config.json", config), ("config_v4.json", older(config))):
        (folder / file).write_text(json.dumps(dict(sorted(fields.items())), indent=2) + "\n")
    print(name, sum(p.numel() for p in model.parameters()), sorted(p.name for p in folder.iterdir()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CHECKPOINTS], metavar="NAME")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--into", type=Path, default=HERE)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    for each in CHECKPOINTS if wanted.all else wanted.names:
        write(each, wanted.into / each)

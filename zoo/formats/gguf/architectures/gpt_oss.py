"""GPT-OSS."""

import numpy as np

from ..architecture import Architecture
from ..config import Config, Field, Metadata
from ..rope import write_rope
from ..rules import TURNED, Joined, Pair, linear
from .parts import DENSE, EXPERTS, SILU, WINDOW, attention, norms, read_layer_types, top, with_head, write_layer_types


def interleave(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Gate and up in turn along the last dimension."""
    return np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)


def interleaved(gguf: str, hf: str, turned: bool) -> Joined:
    """The rule for GPT-OSS's gates, which Hugging Face mixes with what they gate; matrices are turned besides."""

    def turn(x: np.ndarray) -> np.ndarray:
        return x.swapaxes(-1, -2) if turned else x

    def shape(gate: tuple[int, ...], up: tuple[int, ...]) -> tuple[int, ...]:
        if gate != up or len(gate) != 2 + turned:
            raise ValueError(f"gates and what they gate have one shape of {2 + turned} dimensions, got {gate} and {up}")
        return (gate[0], gate[2], 2 * gate[1]) if turned else (gate[0], 2 * gate[1])

    return Joined(
        (f"ffn_gate_exps.{gguf}", f"ffn_up_exps.{gguf}"),
        hf,
        shape,
        lambda gate, up: interleave(turn(gate), turn(up)),
        lambda x, _: (turn(x[..., ::2]), turn(x[..., 1::2])),
    )


def read_gpt_oss(metadata: Metadata, config: Config) -> Config:
    """RoPE, and which layers have a window."""
    fields = with_head(metadata, config)
    if "rope_scaling" in fields:
        fields["rope_scaling"] = {**fields["rope_scaling"], "truncate": False}
    return {**fields, "layer_types": read_layer_types(metadata, config, 2)}


def write_gpt_oss(config: Config) -> dict[str, object]:
    """The inverse of `read_gpt_oss`."""
    return {
        **write_rope(config),
        **write_layer_types(config, 2),
        **dict.fromkeys(("attention.key_length", "attention.value_length"), config["head_dim"]),
    }


GPT_OSS = Architecture(
    name="gpt-oss",
    context_length=131072,
    without_effect=("feed_forward_length",),  # every layer has experts
    model_type="gpt_oss",
    model_class="GptOssForCausalLM",
    fields=(
        *(field for field in DENSE if field.name != "intermediate_size"),
        Field("expert_feed_forward_length", "intermediate_size"),
        Field("expert_count", "num_local_experts"),
        EXPERTS,
        WINDOW,
    ),
    implied={**SILU, "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    rules=top(),
    layer_rules=(
        *norms({"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}),
        *attention(),
        Pair("attn_sinks.weight", "self_attn.sinks"),
        *linear("ffn_gate_inp", "mlp.router"),
        interleaved("weight", "mlp.experts.gate_up_proj", turned=True),
        interleaved("bias", "mlp.experts.gate_up_proj_bias", turned=False),
        Pair("ffn_down_exps.weight", "mlp.experts.down_proj", TURNED),
        Pair("ffn_down_exps.bias", "mlp.experts.down_proj_bias"),
    ),
    read=read_gpt_oss,
    write=write_gpt_oss,
)

"""What many architectures have in common."""

from collections.abc import Mapping
from typing import Any

from ..config import Config, Field, Metadata, read_rope, write_rope
from ..rules import SAME, Change, Pair, Rule, Stacked, linear, paired

SIZES = (
    Field("context_length", "max_position_embeddings"),
    Field("embedding_length", "hidden_size"),
    Field("block_count", "num_hidden_layers"),
    Field("attention.head_count", "num_attention_heads"),
)
DENSE = (
    *SIZES,
    Field("feed_forward_length", "intermediate_size"),
    Field("attention.head_count_kv", "num_key_value_heads"),
    Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
)
EXPERTS = Field("expert_used_count", "num_experts_per_tok")
WINDOW = Field("attention.sliding_window", "sliding_window")
NO_WINDOW = {"sliding_window": (None,)}
SILU = {"hidden_act": "silu"}
GELU = {"hidden_activation": "gelu_pytorch_tanh"}


def top(change: Change = SAME) -> tuple[Rule, ...]:
    """The rules outside of layers; `change` is of the final norm."""
    return (
        Pair("token_embd.weight", "model.embed_tokens.weight"),
        Pair("output_norm.weight", "model.norm.weight", change),
        Pair("output.weight", "lm_head.weight"),
    )


def attention(query: Change = SAME, key: Change = SAME) -> tuple[Rule, ...]:
    """The rules for the projections of attention."""
    return (
        *linear("attn_q", "self_attn.q_proj", query),
        *linear("attn_k", "self_attn.k_proj", key),
        *linear("attn_v", "self_attn.v_proj"),
        *linear("attn_output", "self_attn.o_proj"),
    )


def norms(names: Mapping[str, str], change: Change = SAME) -> tuple[Rule, ...]:
    """The rules for norms, by their names in GGUF."""
    return tuple(Pair(f"{gguf}.weight", f"{hf}.weight", change) for gguf, hf in names.items())


QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
OUTPUT_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
SANDWICH = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **OUTPUT_NORMS}
PAIRED = (paired("num_attention_heads"), paired("num_key_value_heads"))
GATED: tuple[Rule, ...] = (
    *linear("ffn_gate", "mlp.gate_proj"),
    *linear("ffn_up", "mlp.up_proj"),
    *linear("ffn_down", "mlp.down_proj"),
)


def experts(module: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The rules for a router and its experts."""
    return (
        Pair("ffn_gate_inp.weight", f"{module}.gate.weight"),
        Stacked("ffn_gate_exps.weight", f"{module}.experts.{{expert}}.{gate}.weight"),
        Stacked("ffn_up_exps.weight", f"{module}.experts.{{expert}}.{up}.weight"),
        Stacked("ffn_down_exps.weight", f"{module}.experts.{{expert}}.{down}.weight"),
    )


def head(config: Config) -> dict[str, Any]:
    """RoPE's keys, and the size of a head."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {**write_rope(config), "attention.key_length": width, "attention.value_length": width}


def with_head(metadata: Metadata, config: Config) -> Config:
    """RoPE's fields, and the size of a head."""
    return {**read_rope(metadata), "head_dim": metadata.head_dim}

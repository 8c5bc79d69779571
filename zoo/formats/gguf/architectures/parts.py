"""What many architectures have in common."""

from collections.abc import Mapping

import numpy as np

from ..config import Config, Field, Metadata
from ..rope import read_rope, write_rope
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
WINDOW_PATTERN = "attention.sliding_window_pattern"
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


def head(config: Config) -> dict[str, object]:
    """RoPE's keys, and the size of a head."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {**write_rope(config), "attention.key_length": width, "attention.value_length": width}


def with_head(metadata: Metadata, config: Config) -> Config:
    """RoPE's fields, and the size of a head."""
    return {**read_rope(metadata), "head_dim": head_dim(metadata)}


def head_dim(metadata: Metadata) -> int:
    """The size of a head. Raises ValueError where that of its values is another."""
    keys, values = metadata.head_dim, metadata.get("attention.value_length", default=metadata.head_dim)
    if values != keys:
        raise ValueError(
            f"heads whose values have another size are not supported: key_length {keys}, value_length {values}"
        )
    return keys


def layer_types(layers: int, period: int) -> list[str]:
    """Every `period`-th layer sees everything, the others a window."""
    return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]


def read_layer_types(metadata: Metadata, config: Config, period: int) -> list[str]:
    """The kind of attention of each layer: a pattern with this period where the metadata have no other.

    The key holds the period, or for each layer whether it has a window.
    """
    pattern, layers = metadata.raw(WINDOW_PATTERN), config["num_hidden_layers"]
    if config["sliding_window"] is None:
        return ["full_attention"] * layers
    if pattern is None:
        return layer_types(layers, period)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 0:
        return layer_types(layers, pattern) if pattern else ["sliding_attention"] * layers
    if isinstance(pattern, np.ndarray) and pattern.shape == (layers,) and np.isin(pattern, (0, 1)).all():
        return ["sliding_attention" if window else "full_attention" for window in pattern]
    raise ValueError(f"{WINDOW_PATTERN} must be a period, or 0 or 1 for each of {layers} layers, got {pattern!r:.100}")


def write_layer_types(config: Config, period: int) -> dict[str, object]:
    """The inverse of `read_layer_types`. Raises ValueError where the layers have no period."""
    layers, kinds = config["num_hidden_layers"], config["layer_types"]
    for own in (period, *range(1, layers + 2)):
        if kinds == layer_types(layers, own):
            return {} if own == period else {WINDOW_PATTERN: own}
    raise ValueError(
        "GGUF can say that every n-th layer has no window and the others have one, and the layer_types of this "
        f"{config['model_type']} model follow no such pattern: {kinds!r:.200}"
    )

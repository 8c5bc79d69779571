"""Gemma 1, 2 and 3."""

from typing import Any

from ..architecture import Architecture
from ..config import Config, Field, Metadata, check_fields, read_rope
from ..rules import ONE_MORE
from .parts import DENSE, GATED, GELU, QK_NORMS, SANDWICH, TWO_NORMS, WINDOW, attention, head, norms, top, with_head

GEMMA = Architecture(
    name="gemma",
    model_type="gemma",
    model_class="GemmaForCausalLM",
    fields=DENSE,
    implied={"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"},
    allowed={"hidden_activation": ("gelu_pytorch_tanh", None), "hidden_act": ("gelu_pytorch_tanh", "gelu")},
    rules=top(ONE_MORE),
    layer_rules=(*norms(TWO_NORMS, ONE_MORE), *attention(), *GATED),
    read=with_head,
    write=head,
)


def query_scale(config: Config, big: int) -> int:
    """The 27B models, told by their depth, scale queries by the width per head, all others by the size of a head."""
    if config["num_hidden_layers"] == big:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def layer_types(layers: int, period: int) -> list[str]:
    """Every `period`-th layer sees everything, the others a window."""
    return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]


def read_gemma2(metadata: Metadata, config: Config) -> Config:
    """The fields GGUF leaves out: the scale of queries, and a window on every other layer."""
    config = {**config, **with_head(metadata, config)}
    scale = query_scale(config, 46)
    return {**config, "query_pre_attn_scalar": scale, "layer_types": layer_types(config["num_hidden_layers"], 2)}


def write_gemma2(config: Config) -> dict[str, Any]:
    """The inverse of `read_gemma2`."""
    layers = config["num_hidden_layers"]
    check_fields(
        config, {"query_pre_attn_scalar": (query_scale(config, 46),), "layer_types": (layer_types(layers, 2),)}
    )
    return head(config)


GEMMA2 = Architecture(
    name="gemma2",
    model_type="gemma2",
    model_class="Gemma2ForCausalLM",
    fields=(
        *DENSE,
        WINDOW,
        Field("attn_logit_softcapping", "attn_logit_softcapping", float),
        Field("final_logit_softcapping", "final_logit_softcapping", float),
    ),
    implied=GELU,
    rules=top(ONE_MORE),
    layer_rules=(*norms(SANDWICH, ONE_MORE), *attention(), *GATED),
    read=read_gemma2,
    write=write_gemma2,
)


def read_gemma3(metadata: Metadata, config: Config) -> Config:
    """The fields GGUF leaves out: the scale of queries, five layers with a window to one without, their RoPE."""
    config = {**config, "head_dim": metadata.head_dim}
    found, local = read_rope(metadata), metadata.get("rope.freq_base_swa", float, 10000.0)
    full = {"rope_type": "default", **found.get("rope_scaling", {}), "rope_theta": found["rope_theta"]}
    return {
        **config,
        "query_pre_attn_scalar": query_scale(config, 62),
        "rope_local_base_freq": local,
        "sliding_window_pattern": 6,
        "layer_types": layer_types(config["num_hidden_layers"], 6),
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def write_gemma3(config: Config) -> dict[str, Any]:
    """The inverse of `read_gemma3`."""
    check_fields(
        config,
        {
            "query_pre_attn_scalar": (query_scale(config, 62),),
            "layer_types": (layer_types(config["num_hidden_layers"], 6),),
            "sliding_window_pattern": (6,),
        },
    )
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
    return {**head(config), "rope.freq_base_swa": float(local or config.get("rope_local_base_freq", 10000.0))}


GEMMA3 = Architecture(
    name="gemma3",
    model_type="gemma3_text",
    model_class="Gemma3ForCausalLM",
    fields=(*DENSE, WINDOW, Field("final_logit_softcapping", "final_logit_softcapping", float, None)),
    implied=GELU,
    allowed={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
    rules=top(ONE_MORE),
    layer_rules=(*norms(SANDWICH | QK_NORMS, ONE_MORE), *attention(), *GATED),
    read=read_gemma3,
    write=write_gemma3,
)

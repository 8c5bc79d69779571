"""Gemma 1, 2 and 3."""

from dataclasses import replace

from ..architecture import Architecture
from ..config import Config, Field, Metadata, check_fields
from ..rope import read_rope
from ..rules import ONE_MORE
from .parts import (
    DENSE,
    GATED,
    GELU,
    QK_NORMS,
    SANDWICH,
    TWO_NORMS,
    WINDOW,
    attention,
    head,
    head_dim,
    layer_types,
    norms,
    read_layer_types,
    top,
    with_head,
    write_layer_types,
)

GEMMA = Architecture(
    name="gemma",
    context_length=8192,
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


def read_gemma2(metadata: Metadata, config: Config) -> Config:
    """The fields GGUF leaves out: the scale of queries, and a window on every other layer."""
    config = {**config, **with_head(metadata, config)}
    scale = query_scale(config, 46)
    kinds = read_layer_types(metadata, config, 2)
    return {**config, "query_pre_attn_scalar": scale, "layer_types": kinds}


def write_gemma2(config: Config) -> dict[str, object]:
    """The inverse of `read_gemma2`."""
    check_fields(config, {"query_pre_attn_scalar": (query_scale(config, 46),)})
    return {**head(config), **write_layer_types(config, 2)}


GEMMA2 = Architecture(
    name="gemma2",
    context_length=8192,
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
    config = {**config, "head_dim": head_dim(metadata)}
    rope, local = read_rope(metadata), metadata.get("rope.freq_base_swa", float, 10000.0)
    kinds = read_layer_types(metadata, config, 6)
    full = {"rope_type": "default", **rope.get("rope_scaling", {}), "rope_theta": rope["rope_theta"]}
    return {
        **config,
        "query_pre_attn_scalar": query_scale(config, 62),
        "rope_local_base_freq": local,
        "layer_types": kinds,
        **({"sliding_window_pattern": 6} if kinds == layer_types(config["num_hidden_layers"], 6) else {}),
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def write_gemma3(config: Config) -> dict[str, object]:
    """The inverse of `read_gemma3`."""
    check_fields(config, {"query_pre_attn_scalar": (query_scale(config, 62),)})
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
    kinds = write_layer_types(config, 6)
    return {**head(config), **kinds, "rope.freq_base_swa": float(local or config.get("rope_local_base_freq", 10000.0))}


GEMMA3 = Architecture(
    name="gemma3",
    context_length=131072,
    model_type="gemma3_text",
    model_class="Gemma3ForCausalLM",
    fields=(
        *DENSE,
        replace(WINDOW, default=None, zero=None),
        Field("final_logit_softcapping", "final_logit_softcapping", float, None),
    ),
    implied=GELU,
    allowed={"attn_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
    rules=top(ONE_MORE),
    layer_rules=(*norms(SANDWICH | QK_NORMS, ONE_MORE), *attention(), *GATED),
    read=read_gemma3,
    write=write_gemma3,
)

"""The architectures that can be read and written: what their metadata and tensors are called on either side.

The facts are those of llama.cpp, which defines the format by what it reads.
"""

import math
from typing import Any

import numpy as np

from .architecture import Architecture
from .config import Config, Field, Metadata, check_fields, llama3_factors, read_rope, rope, write_rope
from .rules import ONE_MORE, SAME, TURNED, Change, Pair, Rule, Stacked, linear, paired

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


def norms(change: Change = SAME, **names: str) -> tuple[Rule, ...]:
    """The rules for norms, named in GGUF = in Hugging Face."""
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


def llama_tables(config: Config) -> dict[str, np.ndarray]:
    """Llama 3.1's factors."""
    base, scaling = rope(config)
    if scaling["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(scaling, head(config)["rope.dimension_count"], base)}


def llama_biases(metadata: Metadata, config: Config) -> Config:
    """Whether projections have biases, which the tensors tell."""
    return {
        **with_head(metadata, config),
        "attention_bias": "blk.0.attn_q.bias" in metadata.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in metadata.tensors,
    }


LLAMA = Architecture(
    name="llama",
    model_type="llama",
    model_class="LlamaForCausalLM",
    also=("mistral",),
    when=lambda metadata: not metadata.get("expert_count", default=0),
    fields=DENSE,
    implied=SILU,
    allowed=NO_WINDOW,
    rules=top(),
    layer_rules=(*norms(**TWO_NORMS), *attention(*PAIRED), *GATED),
    extra=("rope_freqs.weight",),
    read=llama_biases,
    write=head,
    tables=llama_tables,
)
MIXTRAL = Architecture(
    name="llama",
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    when=lambda metadata: metadata.get("expert_count", default=0) > 0,
    fields=(*DENSE, Field("expert_count", "num_local_experts"), EXPERTS),
    implied=SILU,
    allowed=NO_WINDOW,
    rules=top(),
    layer_rules=(*norms(**TWO_NORMS), *attention(*PAIRED), *experts("block_sparse_moe", "w1", "w3", "w2")),
    read=with_head,
    write=head,
)


def smollm3_layers(config: Config) -> dict[str, Any]:
    layers = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    check_fields(config, {"no_rope_layers": (layers, None)})
    return head(config)


SMOLLM3 = Architecture(
    name="smollm3",
    model_type="smollm3",
    model_class="SmolLM3ForCausalLM",
    fields=DENSE,
    implied={**SILU, "no_rope_layer_interval": 4},
    allowed={"use_sliding_window": (False, None)},
    rules=top(),
    layer_rules=LLAMA.layer_rules,
    read=llama_biases,
    write=smollm3_layers,
)
QWEN2 = Architecture(
    name="qwen2",
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    fields=DENSE,
    implied=SILU,
    allowed={"use_sliding_window": (False, None)},
    rules=top(),
    layer_rules=(*norms(**TWO_NORMS), *attention(), *GATED),
    read=with_head,
    write=head,
)
QWEN3 = Architecture(
    name="qwen3",
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    fields=DENSE,
    implied={**SILU, "attention_bias": False},
    allowed={"use_sliding_window": (False, None)},
    rules=top(),
    layer_rules=(*norms(**TWO_NORMS, **QK_NORMS), *attention(), *GATED),
    read=with_head,
    write=head,
)
QWEN3_MOE = Architecture(
    name="qwen3moe",
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    fields=(
        *DENSE,
        EXPERTS,
        Field("expert_count", "num_experts", also="num_local_experts"),
        Field("expert_feed_forward_length", "moe_intermediate_size"),
    ),
    implied={**SILU, "attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    allowed={"use_sliding_window": (False, None)},
    rules=top(),
    layer_rules=(
        *norms(**TWO_NORMS, **QK_NORMS),
        *attention(),
        *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    read=with_head,
    write=head,
)
OLMO2 = Architecture(
    name="olmo2",
    model_type="olmo2",
    model_class="Olmo2ForCausalLM",
    fields=DENSE,
    implied={**SILU, "attention_bias": False},
    rules=top(),
    layer_rules=(*norms(**OUTPUT_NORMS, **QK_NORMS), *attention(), *GATED),
    read=with_head,
    write=head,
)
GEMMA = Architecture(
    name="gemma",
    model_type="gemma",
    model_class="GemmaForCausalLM",
    fields=DENSE,
    implied={"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"},
    allowed={"hidden_activation": ("gelu_pytorch_tanh", None), "hidden_act": ("gelu_pytorch_tanh", "gelu")},
    rules=top(ONE_MORE),
    layer_rules=(*norms(ONE_MORE, **TWO_NORMS), *attention(), *GATED),
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
    config = {**config, **with_head(metadata, config)}
    scale = query_scale(config, 46)
    return {**config, "query_pre_attn_scalar": scale, "layer_types": layer_types(config["num_hidden_layers"], 2)}


def write_gemma2(config: Config) -> dict[str, Any]:
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
    layer_rules=(*norms(ONE_MORE, **SANDWICH), *attention(), *GATED),
    read=read_gemma2,
    write=write_gemma2,
)


def read_gemma3(metadata: Metadata, config: Config) -> Config:
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
    layer_rules=(*norms(ONE_MORE, **SANDWICH, **QK_NORMS), *attention(), *GATED),
    read=read_gemma3,
    write=write_gemma3,
)


def read_phi3(metadata: Metadata, config: Config) -> Config:
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    found = [metadata.extra.get(name) for name in names]
    trained = metadata.get("rope.scaling.original_context_length", default=config["max_position_embeddings"])
    plain = {**read_rope(metadata), "original_max_position_embeddings": trained}
    if found[0] is None and found[1] is None:
        return plain
    if any(x is None or x.shape != (metadata.get("rope.dimension_count") // 2,) for x in found):
        raise ValueError(f"longrope needs {' and '.join(names)} with one factor for each pair of dimensions")
    short, long = ([float(str(value)) for value in x] for x in found if x is not None)
    return {**plain, "rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}


def write_phi3(config: Config) -> dict[str, Any]:
    _, scaling = rope(config)
    plain = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_parameters")}
    base = {"rope_theta": rope(config)[0], "partial_rotary_factor": scaling.get("partial_rotary_factor", 1.0)}
    trained = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    values = {**write_rope({**plain, **base}), "rope.scaling.original_context_length": trained}
    if scaling["rope_type"] == "default":
        return values
    check_fields({"model_type": "phi3", **scaling}, {"rope_type": ("longrope", "su"), "attention_factor": (None,)})
    ratio = config["max_position_embeddings"] / trained
    factor = math.sqrt(1 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0
    return {**values, "rope.scaling.attn_factor": factor}


def phi3_tables(config: Config) -> dict[str, np.ndarray]:
    _, scaling = rope(config)
    names = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
    return {new: np.asarray(scaling[old], np.float32) for old, new in names.items() if old in scaling}


PHI3 = Architecture(
    name="phi3",
    model_type="phi3",
    model_class="Phi3ForCausalLM",
    fields=(*DENSE, Field("attention.sliding_window", "sliding_window", default=None, zero=None)),
    implied=SILU,
    rules=top(),
    layer_rules=(
        *norms(**TWO_NORMS),
        *linear("attn_qkv", "self_attn.qkv_proj"),
        *linear("attn_output", "self_attn.o_proj"),
        *linear("ffn_up", "mlp.gate_up_proj"),
        *linear("ffn_down", "mlp.down_proj"),
    ),
    extra=("rope_factors_long.weight", "rope_factors_short.weight"),
    read=read_phi3,
    write=write_phi3,
    tables=phi3_tables,
)


def read_gpt2(metadata: Metadata, config: Config) -> Config:
    hidden = metadata.get("feed_forward_length")
    return {"n_inner": None if hidden == 4 * config["n_embd"] else hidden}


def write_gpt2(config: Config) -> dict[str, Any]:
    return {"feed_forward_length": config.get("n_inner") or 4 * config["n_embd"]}


GPT2 = Architecture(
    name="gpt2",
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    fields=(
        Field("context_length", "n_positions"),
        Field("embedding_length", "n_embd"),
        Field("block_count", "n_layer"),
        Field("attention.head_count", "n_head"),
        Field("attention.layer_norm_epsilon", "layer_norm_epsilon", float),
    ),
    implied={"activation_function": "gelu_new"},
    allowed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    rules=(
        Pair("token_embd.weight", "transformer.wte.weight"),
        Pair("position_embd.weight", "transformer.wpe.weight"),
        *linear("output_norm", "transformer.ln_f"),
        Pair("output.weight", "lm_head.weight"),
    ),
    layer_rules=(
        *linear("attn_norm", "ln_1"),
        *linear("ffn_norm", "ln_2"),
        *linear("attn_qkv", "attn.c_attn", TURNED, bias=SAME),
        *linear("attn_output", "attn.c_proj", TURNED, bias=SAME),
        *linear("ffn_up", "mlp.c_fc", TURNED, bias=SAME),
        *linear("ffn_down", "mlp.c_proj", TURNED, bias=SAME),
    ),
    layers="transformer.h",
    read=read_gpt2,
    write=write_gpt2,
)

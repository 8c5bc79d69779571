"""Llama, and Mistral and Mixtral, which GGUF takes for it; SmolLM3."""

import numpy as np

from ..architecture import Architecture
from ..config import Config, Field, Metadata, check_fields
from ..rope import llama3_factors, rope, rotated_dims
from .parts import (
    DENSE,
    EXPERTS,
    GATED,
    NO_WINDOW,
    PAIRED,
    SILU,
    TWO_NORMS,
    attention,
    experts,
    head,
    norms,
    top,
    with_head,
)


def llama_tables(config: Config) -> dict[str, np.ndarray]:
    """Llama 3.1's factors."""
    base, scaling = rope(config)
    if scaling["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(scaling, rotated_dims(config), base)}


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
    layer_rules=(*norms(TWO_NORMS), *attention(*PAIRED), *GATED),
    extra=("rope_freqs.weight",),
    read=llama_biases,
    write=head,
    tables=llama_tables,
)
MIXTRAL = Architecture(
    name="llama",
    model_type="mixtral",
    context_length=131072,
    model_class="MixtralForCausalLM",
    when=lambda metadata: metadata.get("expert_count", default=0) > 0,
    fields=(*DENSE, Field("expert_count", "num_local_experts"), EXPERTS),
    implied=SILU,
    allowed=NO_WINDOW,
    rules=top(),
    layer_rules=(*norms(TWO_NORMS), *attention(*PAIRED), *experts("block_sparse_moe", "w1", "w3", "w2")),
    read=with_head,
    write=head,
)


def smollm3_layers(config: Config) -> dict[str, object]:
    """The keys of `head`; every fourth layer has no RoPE, or ValueError."""
    layers = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    check_fields(config, {"no_rope_layers": (layers, None)})
    return head(config)


SMOLLM3 = Architecture(
    name="smollm3",
    model_type="smollm3",
    context_length=32768,
    model_class="SmolLM3ForCausalLM",
    fields=DENSE,
    implied={**SILU, "no_rope_layer_interval": 4},
    allowed={"use_sliding_window": (False, None)},
    rules=top(),
    layer_rules=LLAMA.layer_rules,
    read=llama_biases,
    write=smollm3_layers,
)

"""gpt-oss 20b and 120b: sinks, every other layer with a window, experts with a clamped gate (2508.10925)."""

from ...layers.mlp import GatedMLP
from ...layers.moe.layer import MoE
from ...layers.moe.routing import Router
from ..decoder import Decoder
from . import llama
from .config import Config
from .family import Family
from .layer_pattern import attentions, expect, experts, layer_types, window_of, windowed, with_ffn

MOE = "model.layers.{layer}.mlp"
NAMES = (
    llama.OUTSIDE
    | llama.NORMS
    | llama.ATTENTION
    | {
        "model.layers.{layer}.self_attn.sinks": ("N", "mixer.sinks"),
        f"{MOE}.router.weight": ("E D", "ffn.router.weight"),
        f"{MOE}.router.bias": ("E", "ffn.router.bias"),
        f"{MOE}.experts.gate_up_proj": ("E D F(1+1)", "ffn.experts.gate.weight", "ffn.experts.up.weight"),
        f"{MOE}.experts.gate_up_proj_bias": ("E F(1+1)", "ffn.experts.gate.bias", "ffn.experts.up.bias"),
        f"{MOE}.experts.down_proj": ("E F D", "ffn.experts.down.weight"),
        f"{MOE}.experts.down_proj_bias": ("E D", "ffn.experts.down.bias"),
    }
)
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What the absence of `rope_parameters` means."""


def read(config: Config) -> Decoder:
    """The decoder of a config."""
    config.only("attention_bias", True)
    config.only("hidden_act", "silu")  # of which its experts have a variant of their own
    config.only("swiglu_alpha", 1.702)
    parameters = config.mapping("rope_parameters")
    rope = config.rope(150_000.0, parameters if "rope_type" in parameters else parameters | YARN)
    decoder = llama.read(config, rope=rope, eps=1e-5)
    ffn = MoE(
        experts=config.count("num_local_experts", config.count("num_experts", 128)),
        expert=GatedMLP(
            hidden=expect(decoder.block[0].ffn, GatedMLP).hidden,
            activation="quick_gelu",
            bias=True,
            limit=config.number("swiglu_limit", 7.0),
            offset=1.0,
        ),
        router=Router(top_k=config.count("num_experts_per_tok", config.count("experts_per_token", 4)), bias=True),
    )
    changes = {
        "ffn": ffn,
        "mixer.head_dim": config.count("head_dim", 64),
        "mixer.bias": True,
        "mixer.output_bias": True,
        "mixer.sinks": True,
    }
    kinds = config.layer_types(decoder.layers, lambda i: "full_attention" if i % 2 else "sliding_attention")
    decoder = decoder.replace(block=(decoder.block[0].replace(**changes),))
    return windowed(decoder, kinds, config.count("sliding_window", 128))


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    moe = experts(decoder)
    expert = expect(moe.expert, GatedMLP)
    return llama.shared(with_ffn(decoder, expert)) | {
        "head_dim": attentions(decoder)[0].head_dim,
        "attention_bias": True,
        "hidden_act": "silu",
        "swiglu_alpha": 1.702,
        "swiglu_limit": expert.limit,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.router.top_k,
        "sliding_window": window_of(decoder),
        "layer_types": layer_types(decoder),
    }


FAMILY = Family(
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    read=read,
    write=write,
    names=NAMES,
)

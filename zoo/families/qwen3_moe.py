"""Qwen3 with experts: 30B-A3B, 235B-A22B (2505.09388)."""

from ...layers.mlp import GatedMLP
from ...layers.moe.layer import MoE
from ...layers.moe.routing import Router
from ...layers.norm import RMSNorm
from ..decoder import Decoder
from . import llama
from .config import Config
from .family import Family
from .layer_pattern import attentions, expect, experts, per_layer, with_ffn

MOE = "model.layers.{layer}.mlp"
EXPERTS = {
    f"{MOE}.gate.weight": ("E D", "ffn.router.weight"),
    f"{MOE}.experts.{{expert}}.gate_proj.weight": ("F D", "ffn.experts.gate.weight"),
    f"{MOE}.experts.{{expert}}.up_proj.weight": ("F D", "ffn.experts.up.weight"),
    f"{MOE}.experts.{{expert}}.down_proj.weight": ("D F", "ffn.experts.down.weight"),
}


def read(config: Config) -> Decoder:
    """The decoder of a config."""
    config.only("use_sliding_window", False)
    config.natural("sliding_window", None)  # which it would switch on
    config.natural("max_window_layers", None)
    config.only("mlp_bias", False)
    decoder = llama.read(config)
    dense = expect(decoder.block[0].ffn, GatedMLP)
    router = Router(top_k=config.count("num_experts_per_tok", 8), normalise=config.flag("norm_topk_prob", False))
    ffn = MoE(
        experts=config.count("num_experts", config.count("num_local_experts", 128)),
        expert=dense.replace(hidden=config.count("moe_intermediate_size", 768)),
        router=router,
    )
    period, plain = config.count("decoder_sparse_step", 1), config.integers("mlp_only_layers", [])
    sparse = [layer not in plain and (layer + 1) % period == 0 for layer in range(decoder.layers)]
    decoder = decoder.replace(**{"block.0.mixer.qk_norm": RMSNorm(eps=decoder.block[0].norm.eps)})
    return per_layer(decoder, lambda layer, block: block.replace(ffn=ffn if sparse[layer] else dense))


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    moe, attention = experts(decoder), attentions(decoder)[0]
    expert = expect(moe.expert, GatedMLP)
    plain = [layer for layer, block in enumerate(decoder.all_blocks) if not block.ffn.routed]
    dense = decoder.all_blocks[plain[0]].ffn if plain else expert
    return llama.shared(with_ffn(decoder, dense)) | {
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        "use_sliding_window": False,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.router.top_k,
        "norm_topk_prob": moe.router.normalise,
        "moe_intermediate_size": expert.hidden,
        "decoder_sparse_step": 1,
        "mlp_only_layers": plain,
    }


FAMILY = Family(
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    read=read,
    write=write,
    names=llama.NAMES | llama.QK_NORM | EXPERTS,
)

"""Mixtral 8x7B and 8x22B: Mistral's shape with experts (2401.04088)."""

from ...layers.mlp import GatedMLP
from ...layers.moe.layer import MoE
from ...layers.moe.routing import Router
from ..decoder import Decoder
from . import llama
from .config import Config
from .family import Family
from .layer_pattern import expect, experts, window_of, with_ffn

MOE = "model.layers.{layer}.block_sparse_moe"
NAMES = (
    llama.OUTSIDE
    | llama.NORMS
    | llama.ATTENTION
    | {
        f"{MOE}.gate.weight": ("E D", "ffn.router.weight"),
        f"{MOE}.experts.{{expert}}.w1.weight": ("F D", "ffn.experts.gate.weight"),
        f"{MOE}.experts.{{expert}}.w3.weight": ("F D", "ffn.experts.up.weight"),
        f"{MOE}.experts.{{expert}}.w2.weight": ("D F", "ffn.experts.down.weight"),
    }
)


def read(config: Config) -> Decoder:
    """The decoder of a config."""
    for name in ("attention_bias", "mlp_bias"):
        config.only(name, False)
    decoder = llama.read(config, rope=config.rope(1_000_000.0), eps=1e-5)
    ffn = MoE(
        experts=config.count("num_local_experts", config.count("num_experts", 8)),
        expert=expect(decoder.block[0].ffn, GatedMLP),
        router=Router(top_k=config.count("num_experts_per_tok", 2)),
    )
    return decoder.replace(**{"block.0.ffn": ffn, "block.0.mixer.window": config.count("sliding_window", None)})


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    moe = experts(decoder)
    return llama.shared(with_ffn(decoder, moe.expert)) | {
        "sliding_window": window_of(decoder),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.router.top_k,
    }


FAMILY = Family(
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    read=read,
    write=write,
    names=NAMES,
    buffers=llama.BUFFERS,
)

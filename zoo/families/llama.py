"""Llama 2 and 3, and all that has their shape: SmolLM2, TinyLlama, Yi, the R1 distills (2307.09288, 2407.21783)."""

from ...layers import mlp
from ...layers.block import Block
from ...layers.mixers.attention import Attention
from ...layers.mlp import GatedMLP
from ...layers.norm import RMSNorm
from ...layers.positions.rope import Rope
from ..decoder import Decoder
from . import rope_config
from .config import LAYERS, Config
from .family import Family
from .layer_pattern import attentions, expect

OUTSIDE = {
    "model.embed_tokens.weight": ("V D", "embedding.table"),
    "model.norm.weight": ("D", "norm.scale"),
    "lm_head.weight": ("V D", "head.table"),
}
NORMS = {
    "model.layers.{layer}.input_layernorm.weight": ("D", "mixer_norm.scale"),
    "model.layers.{layer}.post_attention_layernorm.weight": ("D", "ffn_norm.scale"),
}
ATTENTION = {
    "model.layers.{layer}.self_attn.q_proj.weight": ("NH D", "mixer.query.weight"),
    "model.layers.{layer}.self_attn.q_proj.bias": ("NH", "mixer.query.bias"),
    "model.layers.{layer}.self_attn.k_proj.weight": ("KH D", "mixer.key.weight"),
    "model.layers.{layer}.self_attn.k_proj.bias": ("KH", "mixer.key.bias"),
    "model.layers.{layer}.self_attn.v_proj.weight": ("KH D", "mixer.value.weight"),
    "model.layers.{layer}.self_attn.v_proj.bias": ("KH", "mixer.value.bias"),
    "model.layers.{layer}.self_attn.o_proj.weight": ("D NH", "mixer.output.weight"),
    "model.layers.{layer}.self_attn.o_proj.bias": ("D", "mixer.output.bias"),
}
MLP = {
    "model.layers.{layer}.mlp.gate_proj.weight": ("F D", "ffn.gate.weight"),
    "model.layers.{layer}.mlp.gate_proj.bias": ("F", "ffn.gate.bias"),
    "model.layers.{layer}.mlp.up_proj.weight": ("F D", "ffn.up.weight"),
    "model.layers.{layer}.mlp.up_proj.bias": ("F", "ffn.up.bias"),
    "model.layers.{layer}.mlp.down_proj.weight": ("D F", "ffn.down.weight"),
    "model.layers.{layer}.mlp.down_proj.bias": ("D", "ffn.down.bias"),
}
NAMES = OUTSIDE | NORMS | ATTENTION | MLP
QK_NORM = {
    "model.layers.{layer}.self_attn.q_norm.weight": ("H", "mixer.query_norm.scale"),
    "model.layers.{layer}.self_attn.k_norm.weight": ("H", "mixer.key_norm.scale"),
}
BUFFERS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


def read(config: Config, *, rope: Rope | None = None, tied: bool = False, eps: float = 1e-6) -> Decoder:
    """The decoder of a config with Llama's fields; `tied` and `eps` are what their absence means.

    `rope` is for families that read `rope_parameters` in a way of their own.
    """
    dim, heads = config.count("hidden_size"), config.count("num_attention_heads")
    norm = RMSNorm(eps=config.number("rms_norm_eps", eps))
    bias = config.flag("attention_bias", False)
    attention = Attention(
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        head_dim=config.count("head_dim", dim // heads),
        rope=config.rope() if rope is None else rope,
        bias=bias,
        output_bias=bias,
    )
    ffn = GatedMLP(
        hidden=config.count("intermediate_size"),
        activation=config.activation("hidden_act", "silu"),
        bias=config.flag("mlp_bias", False),
    )
    config.only("rope_interleaved", False)
    return Decoder(
        vocab=config.count("vocab_size"),
        dim=dim,
        layers=config.count("num_hidden_layers", most=LAYERS),
        block=(Block(mixer=attention, ffn=ffn, norm=norm),),
        norm=norm,
        tied=config.flag("tie_word_embeddings", tied),
    )


def activation_name(activation: str) -> str:
    """What Hugging Face calls an activation of ours."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)


def shared(decoder: Decoder) -> dict[str, object]:
    """The fields that configs of Llama and of its descendants have; their MLPs may be gated or not."""
    block = decoder.all_blocks[0]
    attention, ffn = attentions(decoder)[0], expect(block.ffn, GatedMLP, mlp.MLP)
    fields: dict[str, object] = {
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.dim,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "intermediate_size": ffn.hidden,
        "hidden_act": activation_name(ffn.activation),
        "rms_norm_eps": block.norm.eps,
        "tie_word_embeddings": decoder.tied,
        **rope_config.write(next((a.rope for a in attentions(decoder) if a.rope), None)),
    }
    standard = attention.head_dim == decoder.dim // attention.heads
    return fields if standard else fields | {"head_dim": attention.head_dim}


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    block = decoder.all_blocks[0]
    attention, ffn = attentions(decoder)[0], expect(block.ffn, GatedMLP)
    own = {"head_dim": attention.head_dim, "attention_bias": attention.bias, "mlp_bias": ffn.bias}
    return shared(decoder) | own


FAMILY = Family(
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    names=NAMES,
    buffers=BUFFERS,
)

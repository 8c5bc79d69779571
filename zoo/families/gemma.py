"""Gemma 1, 2 and 3, text (2403.08295, 2408.00118, 2503.19786)."""

from ...layers.mlp import GatedMLP
from ...layers.norm import RMSNorm
from ...layers.positions.rope import Rope
from ..decoder import Decoder
from . import llama, rope_config
from .config import Config
from .family import Family
from .layer_pattern import attentions, expect, layer_types, per_layer, window_of, windowed

KINDS = ("full_attention", "sliding_attention")
SANDWICH = (
    llama.OUTSIDE
    | llama.ATTENTION
    | llama.MLP
    | {
        "model.layers.{layer}.input_layernorm.weight": ("D", "mixer_norm.scale"),
        "model.layers.{layer}.post_attention_layernorm.weight": ("D", "mixer_output_norm.scale"),
        "model.layers.{layer}.pre_feedforward_layernorm.weight": ("D", "ffn_norm.scale"),
        "model.layers.{layer}.post_feedforward_layernorm.weight": ("D", "ffn_output_norm.scale"),
    }
)


def read(config: Config) -> Decoder:
    """The decoder of a Gemma 1 config."""
    decoder = _read(config, config.rope())
    # The first files say gelu, and mean its approximation.
    activation = expect(decoder.block[0].ffn, GatedMLP).activation
    return decoder.replace(**{"block.0.ffn.activation": "gelu_tanh" if activation == "gelu" else activation})


def _read(config: Config, rope: Rope) -> Decoder:
    """What all three have: zero-centred norms, scaled embeddings, heads of a size of their own."""
    config.only("use_bidirectional_attention", False)
    decoder = llama.read(config, rope=rope, tied=True)
    norm = RMSNorm(eps=decoder.block[0].norm.eps, zero_centered=True)
    changes = {
        "mixer.head_dim": config.count("head_dim", 256),
        "ffn.activation": config.activation("hidden_activation", config.get("hidden_act", "gelu_pytorch_tanh")),
        "norm": norm,
    }
    return decoder.replace(block=(decoder.block[0].replace(**changes),), norm=norm, scale_embedding=True)


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    attention = attentions(decoder)[0]
    return llama.shared(decoder) | {"head_dim": attention.head_dim, "attention_bias": attention.bias}


def read_gemma2(config: Config) -> Decoder:
    """The decoder of a Gemma 2 config: sandwich norms, soft caps, a window on every other layer."""
    caps = (config.unless_null("attn_logit_softcapping", 50.0), config.unless_null("final_logit_softcapping", 30.0))
    return _sandwich(config, config.rope(), 2, caps)


def _sandwich(config: Config, rope: Rope, period: int, caps: tuple[float | None, float | None]) -> Decoder:
    """`caps` are what the absence of both soft caps means, every `period`-th layer has no window unless told."""
    decoder = _read(config, rope).replace(soft_cap=config.number("final_logit_softcapping", caps[1]))
    scalar, head_dim = config.number("query_pre_attn_scalar", 256), attentions(decoder)[0].head_dim
    changes = {
        "placement": "sandwich",
        "mixer.soft_cap": config.number("attn_logit_softcapping", caps[0]),
        "mixer.scale": None if scalar == head_dim else scalar**-0.5,
    }
    window = config.count("sliding_window", config.unless_null("sliding_window", 4096))
    kinds = config.layer_types(decoder.layers, lambda layer: KINDS[(layer + 1) % period > 0])
    return windowed(decoder.replace(block=(decoder.block[0].replace(**changes),)), kinds, window)


def write_gemma2(decoder: Decoder) -> dict[str, object]:
    """The fields that `read_gemma2` takes."""
    fields, attention = write(decoder), attentions(decoder)[0]
    activation = fields.pop("hidden_act")
    return fields | {
        "hidden_activation": activation,
        "query_pre_attn_scalar": attention.head_dim if attention.scale is None else round(attention.scale**-2),
        "attn_logit_softcapping": attention.soft_cap,
        "final_logit_softcapping": decoder.soft_cap,
        "sliding_window": window_of(decoder),
        "layer_types": layer_types(decoder),
    }


def read_gemma3(config: Config) -> Decoder:
    """The decoder of a Gemma 3 text config: QK-norm, and a base of RoPE for each kind of layer."""
    config.assume(vocab_size=262_208, num_attention_heads=8, num_key_value_heads=4)
    ropes, local = config.mapping("rope_parameters"), config.number("rope_local_base_freq", 10_000.0)
    if not set(KINDS) & ropes.keys():  # the older style: one of global layers, and the base of the others
        ropes = {KINDS[0]: ropes}
    full = config.rope(1_000_000.0, ropes.get(KINDS[0]) or {})
    sliding = config.rope(local, ropes.get(KINDS[1]) or {})
    period = config.count("sliding_window_pattern", config.count("_sliding_window_pattern", 6))  # the newer name last
    decoder = _sandwich(config, sliding, period, (None, None))
    blocks = [block.replace(**{"mixer.qk_norm": decoder.norm}) for block in decoder.all_blocks]
    far = [attention.window is None for attention in attentions(decoder)]
    return per_layer(decoder, lambda i, _: blocks[i].replace(**{"mixer.rope": full}) if far[i] else blocks[i])


def write_gemma3(decoder: Decoder) -> dict[str, object]:
    """The fields that `read_gemma3` takes."""
    ropes = {kind: Rope(theta=theta) for kind, theta in zip(KINDS, (1_000_000.0, 10_000.0), strict=True)}
    ropes |= {kind: a.rope for kind, a in zip(layer_types(decoder), attentions(decoder), strict=True)}
    parameters = {kind: rope_config.write(rope).get("rope_parameters") for kind, rope in ropes.items()}
    return write_gemma2(decoder) | {"rope_parameters": parameters, "use_bidirectional_attention": False}


GEMMA = Family(
    model_types=("gemma",),
    architecture="GemmaForCausalLM",
    read=read,
    write=write,
    names=llama.NAMES,
)
GEMMA2 = Family(
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    read=read_gemma2,
    write=write_gemma2,
    names=SANDWICH,
)
GEMMA3 = Family(
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    read=read_gemma3,
    write=write_gemma3,
    names=SANDWICH | llama.QK_NORM,
)

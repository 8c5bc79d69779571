"""Qwen2 and 2.5 (biases on queries, keys and values; 2407.10671) and Qwen3 (QK-norm; 2505.09388)."""

from ...layers.norm import RMSNorm
from ..decoder import Decoder
from . import llama
from .config import Config
from .family import Family
from .layer_pattern import attentions, layer_types, window_of, windowed


def with_windows(config: Config, decoder: Decoder) -> Decoder:
    """The decoder with a window on the layers that have one; `use_sliding_window` switches them all."""
    window = config.count("sliding_window", config.unless_null("sliding_window", 4096))
    window = window if config.flag("use_sliding_window", False) else None
    start = config.natural("max_window_layers", 28)
    kinds = config.layer_types(
        decoder.layers, lambda i: "sliding_attention" if window and i >= start else "full_attention"
    )
    return windowed(decoder, kinds, window)


def window_fields(decoder: Decoder) -> dict[str, object]:
    """The fields that `with_windows` takes."""
    window = window_of(decoder)
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": layer_types(decoder)}


def read_qwen2(config: Config) -> Decoder:
    """The decoder of a Qwen2 config."""
    config.only("use_mrope", False)
    config.only("attention_bias", True)  # it always has them, and none on the output
    changes = {"block.0.mixer.bias": True, "block.0.mixer.output_bias": False}
    return with_windows(config, llama.read(config).replace(**changes))


def write_qwen2(decoder: Decoder) -> dict[str, object]:
    """The fields that `read_qwen2` takes."""
    return llama.shared(decoder) | window_fields(decoder)


def read_qwen3(config: Config) -> Decoder:
    """The decoder of a Qwen3 config."""
    decoder = llama.read(config)
    changes = {
        "block.0.mixer.qk_norm": RMSNorm(eps=decoder.block[0].norm.eps),
        "block.0.mixer.head_dim": config.count("head_dim", 128),
    }
    return with_windows(config, decoder.replace(**changes))


def write_qwen3(decoder: Decoder) -> dict[str, object]:
    """The fields that `read_qwen3` takes."""
    attention = attentions(decoder)[0]
    own = {"head_dim": attention.head_dim, "attention_bias": attention.bias}
    return llama.shared(decoder) | window_fields(decoder) | own


QWEN2 = Family(
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    read=read_qwen2,
    write=write_qwen2,
    names=llama.NAMES,
    buffers=llama.BUFFERS,
)
QWEN3 = Family(
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    read=read_qwen3,
    write=write_qwen3,
    names=llama.NAMES | llama.QK_NORM,
)

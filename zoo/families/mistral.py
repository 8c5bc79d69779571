"""Mistral 7B: Llama's shape with a window on every layer, or none (2310.06825). Ministral: a window on some."""

from ..decoder import Decoder
from . import llama
from .config import Config
from .family import Family
from .layer_pattern import attentions, layer_types, window_of, windowed


def read(config: Config) -> Decoder:
    """The decoder of a Mistral config."""
    window = config.count("sliding_window", config.unless_null("sliding_window", 4096))
    return llama.read(config).replace(**{"block.0.mixer.window": window})


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    return llama.shared(decoder) | {
        "head_dim": attentions(decoder)[0].head_dim,
        "sliding_window": window_of(decoder),
    }


def read_ministral(config: Config) -> Decoder:
    """The decoder of a Ministral config."""
    decoder = read(config)
    window = window_of(decoder)
    default = "full_attention" if window is None else "sliding_attention"
    return windowed(decoder, config.layer_types(decoder.layers, lambda _: default), window)


def write_ministral(decoder: Decoder) -> dict[str, object]:
    """The fields that `read_ministral` takes."""
    return write(decoder) | {"layer_types": layer_types(decoder)}


MISTRAL = Family(
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    read=read,
    write=write,
    names=llama.NAMES,
    buffers=llama.BUFFERS,
)
MINISTRAL = Family(
    model_types=("ministral",),
    architecture="MinistralForCausalLM",
    read=read_ministral,
    write=write_ministral,
    names=llama.NAMES,
)

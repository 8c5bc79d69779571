"""SmolLM3: Llama's shape with no position embedding on every fourth layer (2501.18795; the model card)."""

from ..decoder import Decoder
from . import llama
from .config import Config
from .family import Family
from .layer_pattern import attentions, layer_types, per_layer, window_of, windowed


def read(config: Config) -> Decoder:
    """The decoder of a config."""
    rope = config.rope(2_000_000.0)
    decoder = llama.read(config, rope=rope, tied=True)
    layers, period = range(decoder.layers), config.count("no_rope_layer_interval", 4)
    turned = config.integers("no_rope_layers", [int((layer + 1) % period > 0) for layer in layers])  # 1: has RoPE
    if len(turned) != len(layers) or not all(flag in (0, 1) for flag in turned):
        raise ValueError(f"no_rope_layers must be 0 or 1 for each of {len(layers)} layers, got {str(turned)[:200]}")
    window = config.count("sliding_window", None)
    window = window if config.flag("use_sliding_window", False) else None
    config.natural("max_window_layers", None)  # which its code does not look at
    kinds = config.layer_types(
        len(layers), lambda layer: "sliding_attention" if window and not turned[layer] else "full_attention"
    )
    decoder = per_layer(decoder, lambda i, block: block.replace(**{"mixer.rope": rope if turned[i] else None}))
    return windowed(decoder, kinds, window)


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    window, fields = window_of(decoder), llama.write(decoder)
    del fields["head_dim"]
    return (
        llama.shared(decoder)
        | fields
        | {
            "no_rope_layers": [int(attention.rope is not None) for attention in attentions(decoder)],
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": layer_types(decoder),
        }
    )


FAMILY = Family(
    model_types=("smollm3",),
    architecture="SmolLM3ForCausalLM",
    read=read,
    write=write,
    names=llama.NAMES,
)

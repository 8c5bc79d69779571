"""StableLM: LayerNorm, a quarter of each head rotated, both layers side by side where asked (2402.17834)."""

from ...layers.norm import LayerNorm
from ..decoder import Decoder
from . import llama
from .config import Config
from .family import Family
from .layer_pattern import attentions

NAMES = llama.NAMES | {
    "model.norm.bias": ("D", "norm.bias"),
    "model.layers.{layer}.input_layernorm.bias": ("D", "mixer_norm.bias"),
    "model.layers.{layer}.post_attention_layernorm.bias": ("D", "ffn_norm.bias"),
}


def read(config: Config) -> Decoder:
    """The decoder of a config."""
    config.only("qk_layernorm", False)
    rope = {"partial_rotary_factor": 0.25} | config.mapping("rope_parameters")
    norm = LayerNorm(eps=config.number("layer_norm_eps", 1e-5))
    changes = {
        "norm": norm,
        "placement": "parallel" if config.flag("use_parallel_residual", False) else "pre",
        "mixer.bias": config.flag("use_qkv_bias", False),
    }
    decoder = llama.read(config, rope=config.rope(parameters=rope))
    return decoder.replace(norm=norm, block=(decoder.block[0].replace(**changes),))


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    fields = llama.shared(decoder)
    return fields | {
        "layer_norm_eps": fields.pop("rms_norm_eps"),
        "qk_layernorm": False,
        "use_parallel_residual": decoder.all_blocks[0].placement == "parallel",
        "use_qkv_bias": attentions(decoder)[0].bias,
    }


FAMILY = Family(
    model_types=("stablelm",),
    architecture="StableLmForCausalLM",
    read=read,
    write=write,
    names=NAMES,
)

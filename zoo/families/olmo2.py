"""OLMo 2: norms after the layers, and QK-norm over all heads together (2501.00656)."""

from ...layers.norm import RMSNorm
from ..decoder import Decoder
from . import llama
from .config import Config
from .family import Family
from .layer_pattern import attentions

NAMES = (
    llama.OUTSIDE
    | llama.ATTENTION
    | llama.MLP
    | {
        "model.layers.{layer}.post_attention_layernorm.weight": ("D", "mixer_output_norm.scale"),
        "model.layers.{layer}.post_feedforward_layernorm.weight": ("D", "ffn_output_norm.scale"),
        "model.layers.{layer}.self_attn.q_norm.weight": ("NH", "mixer.query_norm.scale"),
        "model.layers.{layer}.self_attn.k_norm.weight": ("KH", "mixer.key_norm.scale"),
    }
)


def read(config: Config) -> Decoder:
    """The decoder of a config."""
    decoder = llama.read(config, eps=1e-5)
    norm = RMSNorm(eps=decoder.block[0].norm.eps)
    changes = {"placement": "output", "mixer.qk_norm": norm, "mixer.qk_norm_joint": True}
    return decoder.replace(block=(decoder.block[0].replace(**changes),))


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    return llama.shared(decoder) | {"attention_bias": attentions(decoder)[0].bias}


FAMILY = Family(
    model_types=("olmo2",),
    architecture="Olmo2ForCausalLM",
    read=read,
    write=write,
    names=NAMES,
)

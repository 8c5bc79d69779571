"""StarCoder2: LayerNorm, an MLP without a gate, biases everywhere (2402.19173)."""

from ...layers.mlp import MLP
from ...layers.norm import LayerNorm
from ..decoder import Decoder
from . import llama
from .config import Config
from .family import Family
from .layer_pattern import attentions, window_of, with_ffn

LAYER = "model.layers.{layer}"
NAMES = (
    llama.OUTSIDE
    | llama.NORMS
    | llama.ATTENTION
    | {
        "model.norm.bias": ("D", "norm.bias"),
        f"{LAYER}.input_layernorm.bias": ("D", "mixer_norm.bias"),
        f"{LAYER}.post_attention_layernorm.bias": ("D", "ffn_norm.bias"),
        f"{LAYER}.mlp.c_fc.weight": ("F D", "ffn.up.weight"),
        f"{LAYER}.mlp.c_fc.bias": ("F", "ffn.up.bias"),
        f"{LAYER}.mlp.c_proj.weight": ("D F", "ffn.down.weight"),
        f"{LAYER}.mlp.c_proj.bias": ("D", "ffn.down.bias"),
    }
)


def read(config: Config) -> Decoder:
    """The decoder of a config."""
    for name in ("attention_bias", "mlp_bias"):
        config.only(name, False)
    config.only("mlp_type", "default")
    config.only("norm_type", "layer_norm")
    for name in ("scale_attn_weights", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        config.only(name, True)
    for name in ("activation_function", "layer_norm_epsilon"):
        config.get(
            name, None
        )  # in published configs beside hidden_act and norm_epsilon; transformers does not read them
    bias = config.flag("use_bias", True)
    norm = LayerNorm(eps=config.number("norm_epsilon", 1e-5))
    hidden, activation = config.count("intermediate_size"), config.activation("hidden_act", "gelu_pytorch_tanh")
    decoder = llama.read(config, tied=True)
    changes = {
        "norm": norm,
        "mixer.bias": bias,
        "mixer.output_bias": bias,
        "mixer.window": config.count("sliding_window", None),
    }
    decoder = decoder.replace(norm=norm, block=(decoder.block[0].replace(**changes),))
    return with_ffn(decoder, MLP(hidden=hidden, activation=activation, bias=bias))


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    fields = llama.shared(decoder)
    return fields | {
        "norm_epsilon": fields.pop("rms_norm_eps"),
        "use_bias": attentions(decoder)[0].bias,
        "sliding_window": window_of(decoder),
    }


FAMILY = Family(
    model_types=("starcoder2",),
    architecture="Starcoder2ForCausalLM",
    read=read,
    write=write,
    names=NAMES,
)

"""Phi-3, Phi-3.5 and Phi-4 (mini and 14B): fused projections, LongRoPE (2404.14219, 2412.08905)."""

from ..decoder import Decoder
from . import llama, rope_config
from .config import Config
from .family import Family
from .layer_pattern import window_of

LAYER = "model.layers.{layer}"
NAMES = (
    llama.OUTSIDE
    | llama.NORMS
    | {
        f"{LAYER}.self_attn.qkv_proj.weight": ("NH+KH+KH D", *(f"mixer.{n}.weight" for n in ("query", "key", "value"))),
        f"{LAYER}.self_attn.o_proj.weight": ("D NH", "mixer.output.weight"),
        f"{LAYER}.mlp.gate_up_proj.weight": ("F+F D", "ffn.gate.weight", "ffn.up.weight"),
        f"{LAYER}.mlp.down_proj.weight": ("D F", "ffn.down.weight"),
    }
)


def read(config: Config) -> Decoder:
    """The decoder of a config."""
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.only(name, False)
    for name in ("interpolate_factor", "full_attn_mod"):  # of the hub's own code, which transformers never had
        config.only(name, 1)
    parameters, original = (
        dict(config.mapping("rope_parameters")),
        config.count("original_max_position_embeddings", 4096),
    )
    if parameters.get("rope_type", parameters.get("type")) in ("longrope", "su", "yarn"):
        parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    decoder = llama.read(config, rope=config.rope(parameters=parameters), eps=1e-5)
    return decoder.replace(**{"block.0.mixer.window": config.count("sliding_window", None)})


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    fields = {**llama.shared(decoder), "sliding_window": window_of(decoder)}
    parameters = {"partial_rotary_factor": 1.0} | rope_config.parameters_of(fields)
    original = parameters.get("original_max_position_embeddings", 4096)
    return fields | {"rope_parameters": parameters, "original_max_position_embeddings": original}


FAMILY = Family(
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    read=read,
    write=write,
    names=NAMES,
)

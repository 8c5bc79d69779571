"""GPT-2."""

from ..architecture import Architecture
from ..config import Config, Field, Metadata
from ..rules import SAME, TURNED, Pair, linear


def read_gpt2(metadata: Metadata, config: Config) -> Config:
    """The size of the feed-forward, unsaid where it is four times the width."""
    hidden = metadata.get("feed_forward_length")
    return {"n_inner": None if hidden == 4 * config["n_embd"] else hidden}


def write_gpt2(config: Config) -> dict[str, object]:
    """The inverse of `read_gpt2`."""
    return {"feed_forward_length": config.get("n_inner") or 4 * config["n_embd"]}


GPT2 = Architecture(
    name="gpt2",
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    fields=(
        Field("context_length", "n_positions"),
        Field("embedding_length", "n_embd"),
        Field("block_count", "n_layer"),
        Field("attention.head_count", "n_head"),
        Field("attention.layer_norm_epsilon", "layer_norm_epsilon", float),
    ),
    implied={"activation_function": "gelu_new"},
    allowed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    rules=(
        Pair("token_embd.weight", "transformer.wte.weight"),
        Pair("position_embd.weight", "transformer.wpe.weight"),
        *linear("output_norm", "transformer.ln_f"),
        Pair("output.weight", "lm_head.weight"),
    ),
    layer_rules=(
        *linear("attn_norm", "ln_1"),
        *linear("ffn_norm", "ln_2"),
        *linear("attn_qkv", "attn.c_attn", TURNED, bias=SAME),
        *linear("attn_output", "attn.c_proj", TURNED, bias=SAME),
        *linear("ffn_up", "mlp.c_fc", TURNED, bias=SAME),
        *linear("ffn_down", "mlp.c_proj", TURNED, bias=SAME),
    ),
    layers="transformer.h",
    read=read_gpt2,
    write=write_gpt2,
)

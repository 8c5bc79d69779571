"""GPT-2 (Language Models are Unsupervised Multitask Learners, 2019)."""

from ...layers.block import Block
from ...layers.mixers.attention import Attention
from ...layers.mlp import MLP
from ...layers.norm import LayerNorm
from ..decoder import Decoder
from .config import LAYERS, Config
from .family import Family
from .layer_pattern import expect

# Its matrices are stored as in x W: input first.
NAMES = {
    "transformer.wte.weight": ("V D", "embedding.table"),
    "transformer.wpe.weight": ("S D", "positions.table"),
    "transformer.ln_f.weight": ("D", "norm.scale"),
    "transformer.ln_f.bias": ("D", "norm.bias"),
    "lm_head.weight": ("V D", "head.table"),
    "transformer.h.{layer}.ln_1.weight": ("D", "mixer_norm.scale"),
    "transformer.h.{layer}.ln_1.bias": ("D", "mixer_norm.bias"),
    "transformer.h.{layer}.attn.c_attn.weight": (
        *("D NH+KH+KH", "mixer.query.weight", "mixer.key.weight", "mixer.value.weight"),
    ),
    "transformer.h.{layer}.attn.c_attn.bias": ("NH+KH+KH", "mixer.query.bias", "mixer.key.bias", "mixer.value.bias"),
    "transformer.h.{layer}.attn.c_proj.weight": ("NH D", "mixer.output.weight"),
    "transformer.h.{layer}.attn.c_proj.bias": ("D", "mixer.output.bias"),
    "transformer.h.{layer}.ln_2.weight": ("D", "ffn_norm.scale"),
    "transformer.h.{layer}.ln_2.bias": ("D", "ffn_norm.bias"),
    "transformer.h.{layer}.mlp.c_fc.weight": ("D F", "ffn.up.weight"),
    "transformer.h.{layer}.mlp.c_fc.bias": ("F", "ffn.up.bias"),
    "transformer.h.{layer}.mlp.c_proj.weight": ("F D", "ffn.down.weight"),
    "transformer.h.{layer}.mlp.c_proj.bias": ("D", "ffn.down.bias"),
}

FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
"""Options of which one value alone is modelled."""


def read(config: Config) -> Decoder:
    """The decoder of a config."""
    dim, heads = config.count("n_embd"), config.count("n_head")
    for name, value in FIXED.items():
        config.only(name, value)
    norm = LayerNorm(eps=config.number("layer_norm_epsilon", 1e-5))
    attention = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, rope=None, bias=True, output_bias=True)
    ffn = MLP(hidden=config.count("n_inner", 4 * dim), activation=config.activation("activation_function", "gelu_new"))
    return Decoder(
        vocab=config.count("vocab_size"),
        dim=dim,
        layers=config.count("n_layer", most=LAYERS),
        block=(Block(mixer=attention, ffn=ffn, norm=norm),),
        norm=norm,
        tied=config.flag("tie_word_embeddings", True),
        max_positions=config.count("n_positions", 1024),
    )


def write(decoder: Decoder) -> dict[str, object]:
    """The fields that `read` takes."""
    block = decoder.all_blocks[0]
    attention, ffn = expect(block.mixer, Attention), expect(block.ffn, MLP)
    return {
        "vocab_size": decoder.vocab,
        "n_embd": decoder.dim,
        "n_layer": decoder.layers,
        "n_head": attention.heads,
        "n_inner": None if ffn.hidden == 4 * decoder.dim else ffn.hidden,
        "n_positions": decoder.max_positions or 1,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(ffn.activation, ffn.activation),
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": decoder.tied,
        **FIXED,
    }


FAMILY = Family(
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    read=read,
    write=write,
    names=NAMES,
    prefix="transformer.",
    buffers=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
)

"""DeepSeek-V2, its Lite and Coder (2405.04434), V3 and R1 (2412.19437): latent attention, shared and small experts."""

from ...layers.block import Block
from ...layers.mixers.latent import MLA
from ...layers.mlp import GatedMLP
from ...layers.moe.layer import MoE
from ...layers.moe.routing import Groups, Router
from ...layers.norm import RMSNorm
from ..decoder import Decoder
from . import llama, qwen3_moe, rope_config
from .config import LAYERS, REQUIRED, Config
from .family import Family
from .layer_pattern import expect, experts, per_layer

MIXER, SHARED = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp.shared_experts"
NAMES = (
    llama.OUTSIDE
    | llama.NORMS
    | llama.MLP
    | qwen3_moe.EXPERTS
    | {
        f"{MIXER}.q_proj.weight": ("NH D", "mixer.query.weight"),
        f"{MIXER}.q_a_proj.weight": ("R D", "mixer.query_down.weight"),
        f"{MIXER}.q_a_proj.bias": ("R", "mixer.query_down.bias"),
        f"{MIXER}.q_a_layernorm.weight": ("R", "mixer.query_norm.scale"),
        f"{MIXER}.q_b_proj.weight": ("NH R", "mixer.query.weight"),
        f"{MIXER}.kv_a_proj_with_mqa.weight": ("R D", "mixer.latent.weight"),
        f"{MIXER}.kv_a_proj_with_mqa.bias": ("R", "mixer.latent.bias"),
        f"{MIXER}.kv_a_layernorm.weight": ("R", "mixer.latent_norm.scale"),
        f"{MIXER}.kv_b_proj.weight": ("NH R", "mixer.key_value.weight"),
        f"{MIXER}.o_proj.weight": ("D NH", "mixer.output.weight"),
        f"{MIXER}.o_proj.bias": ("D", "mixer.output.bias"),
        f"{SHARED}.gate_proj.weight": ("F D", "ffn.shared.gate.weight"),
        f"{SHARED}.up_proj.weight": ("F D", "ffn.shared.up.weight"),
        f"{SHARED}.down_proj.weight": ("D F", "ffn.shared.down.weight"),
    }
)
CORRECTION = {"model.layers.{layer}.mlp.gate.e_score_correction_bias": ("E", "ffn.router.correction")}


def _read(config: Config, router: Router, shared_experts: int, *, interleaved: bool) -> Decoder:
    """What V2 and V3 have; `shared_experts` is what the absence of their number means."""
    config.only("moe_layer_freq", 1)
    config.only("mlp_bias", False)
    heads, nope, rope = (config.count(name) for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    config.only("num_key_value_heads", heads)
    config.only("head_dim", rope)
    config.only("qk_head_dim", nope + rope)
    mixer = MLA(
        heads=heads,
        kv_rank=config.count("kv_lora_rank", 512),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=config.count("v_head_dim", 128),
        query_rank=config.count("q_lora_rank", config.unless_null("q_lora_rank", 1536)),
        rope=config.rope().replace(interleaved=interleaved),
        bias=config.flag("attention_bias", False),
    )
    dense = GatedMLP(hidden=config.count("intermediate_size"), activation=config.activation("hidden_act", "silu"))
    width = config.count("moe_intermediate_size")
    ffn = MoE(
        experts=config.count("n_routed_experts", config.count("num_local_experts", None) or REQUIRED),
        expert=dense.replace(hidden=width),
        router=router,
        shared=dense.replace(hidden=width * config.count("n_shared_experts", shared_experts)),
    )
    norm = RMSNorm(eps=config.number("rms_norm_eps", 1e-6))
    decoder = Decoder(
        vocab=config.count("vocab_size"),
        dim=config.count("hidden_size"),
        layers=config.count("num_hidden_layers", most=LAYERS),
        block=(Block(mixer=mixer, ffn=ffn, norm=norm),),
        norm=norm,
        tied=config.flag("tie_word_embeddings", False),
    )
    plain = config.natural("first_k_dense_replace")
    return per_layer(decoder, lambda layer, block: block.replace(ffn=dense) if layer < plain else block)


def read_v2(config: Config) -> Decoder:
    """The decoder of a V2 config."""
    config.only("scoring_func", "softmax")
    config.only("norm_topk_prob", False)  # transformers looks past it, DeepSeek's own code does not
    limited = config.get("topk_method", "greedy") == "group_limited_greedy"
    config.only("topk_method", "greedy", "group_limited_greedy")
    groups, chosen = config.count("n_group", 1), config.count("topk_group", 1)
    router = Router(
        top_k=config.count("num_experts_per_tok"),
        normalise=False,
        scale=config.number("routed_scaling_factor", 1.0),
        groups=Groups(groups=groups, chosen=chosen, group_score="best") if limited else None,
    )
    return _read(config, router, 2, interleaved=True)


def read_v3(config: Config) -> Decoder:
    """The decoder of a V3 config. The layers that predict further tokens (MTP) are no part of it."""
    config.only("scoring_func", "sigmoid")
    config.only("topk_method", "noaux_tc")
    groups, chosen = config.count("n_group", 8), config.count("topk_group", 4)
    router = Router(
        top_k=config.count("num_experts_per_tok", 8),
        score="sigmoid",
        normalise=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 2.5),
        groups=Groups(groups=groups, chosen=chosen, group_score="best_two") if groups > 1 else None,
        correction=True,
    )
    return _read(config, router, 1, interleaved=config.flag("rope_interleave", True))


def _write(decoder: Decoder) -> dict[str, object]:
    blocks, moe = decoder.all_blocks, experts(decoder)
    mixer, expert = expect(blocks[0].mixer, MLA), expect(moe.expert, GatedMLP)
    dense = next((expect(block.ffn, GatedMLP) for block in blocks if not block.ffn.routed), expert)
    fields: dict[str, object] = {
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.dim,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.heads,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.query_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "qk_head_dim": mixer.nope_dim + mixer.rope_dim,
        "head_dim": mixer.rope_dim,
        "attention_bias": mixer.bias,
        "intermediate_size": dense.hidden,
        "hidden_act": llama.activation_name(expert.activation),
        "moe_intermediate_size": expert.hidden,
        "n_routed_experts": moe.experts,
        "n_shared_experts": expect(moe.shared, GatedMLP).hidden // expert.hidden if moe.shared else None,
        "num_experts_per_tok": moe.router.top_k,
        "routed_scaling_factor": moe.router.scale,
        "first_k_dense_replace": sum(not block.ffn.routed for block in blocks),
        "rms_norm_eps": blocks[0].norm.eps,
        "tie_word_embeddings": decoder.tied,
        **rope_config.write(mixer.rope),
    }
    groups = moe.router.groups
    return fields | {"n_group": groups.groups if groups else 1, "topk_group": groups.chosen if groups else 1}


def write_v2(decoder: Decoder) -> dict[str, object]:
    """The fields that `read_v2` takes."""
    limited = experts(decoder).router.groups is not None
    return _write(decoder) | {
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "norm_topk_prob": False,
        "mlp_bias": False,
    }


def write_v3(decoder: Decoder) -> dict[str, object]:
    """The fields that `read_v3` takes."""
    mixer = expect(decoder.all_blocks[0].mixer, MLA)
    return _write(decoder) | {
        "norm_topk_prob": experts(decoder).router.normalise,
        "rope_interleave": mixer.rope.interleaved,
    }


V2 = Family(
    model_types=("deepseek_v2",),
    architecture="DeepseekV2ForCausalLM",
    read=read_v2,
    write=write_v2,
    names=NAMES,
)
V3 = Family(
    model_types=("deepseek_v3",),
    architecture="DeepseekV3ForCausalLM",
    read=read_v3,
    write=write_v3,
    names=NAMES | CORRECTION,
    buffers=("model.layers.{layers}.*",),
)

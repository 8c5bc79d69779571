"""DeepSeek-V2 and V3."""

import numpy as np

from ..architecture import Architecture
from ..config import Config, Field, Metadata, check_fields, shortest
from ..rope import read_rope, rope, write_rope
from ..rules import Joined, Pair, Rule, linear
from .parts import EXPERTS, GATED, SILU, SIZES, TWO_NORMS, experts, norms, top

SOFTMAX, SIGMOID = 1, 2
"""Values of `expert_gating_func`."""


def join_keys_and_values(k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Of each head the rows that make its keys, then those that make its values; GGUF has the keys' transposed."""
    rows = np.concatenate([k.swapaxes(1, 2), v], axis=1)
    return rows.reshape(-1, rows.shape[2])


def split_keys_and_values(x: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `join_keys_and_values`."""
    rows = x.reshape(config["num_attention_heads"], -1, x.shape[1])
    return rows[:, : config["qk_nope_head_dim"]].swapaxes(1, 2), rows[:, config["qk_nope_head_dim"] :]


def joined_shape(k: tuple[int, ...], v: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that `join_keys_and_values` gives."""
    if len(k) != 3 or len(v) != 3 or k[:2] != (v[0], v[2]):
        raise ValueError(f"keys (heads, rank, dims) and values (heads, dims, rank) are expected, got {k} and {v}")
    return k[0] * (k[2] + v[1]), k[1]


KV_B = Joined(
    ("attn_k_b.weight", "attn_v_b.weight"),
    "self_attn.kv_b_proj.weight",
    joined_shape,
    join_keys_and_values,
    split_keys_and_values,
)
DEEPSEEK_RULES: tuple[Rule, ...] = (
    *norms(TWO_NORMS),
    *norms({"attn_q_a_norm": "self_attn.q_a_layernorm", "attn_kv_a_norm": "self_attn.kv_a_layernorm"}),
    *linear("attn_q", "self_attn.q_proj"),
    *linear("attn_q_a", "self_attn.q_a_proj"),
    *linear("attn_q_b", "self_attn.q_b_proj"),
    *linear("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    Pair("attn_kv_b.weight", "self_attn.kv_b_proj.weight", written=False),  # files of before April 2025
    KV_B,
    *linear("attn_output", "self_attn.o_proj"),
    *GATED,
    *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    Pair("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
    *linear("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    *linear("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    *linear("ffn_down_shexp", "mlp.shared_experts.down_proj"),
)
DEEPSEEK_FIELDS = (
    *SIZES,
    Field("feed_forward_length", "intermediate_size"),
    Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
    Field("attention.q_lora_rank", "q_lora_rank", default=None),
    Field("attention.kv_lora_rank", "kv_lora_rank"),
    Field("rope.dimension_count", "qk_rope_head_dim"),
    Field("leading_dense_block_count", "first_k_dense_replace", default=0),
    EXPERTS,
    Field("expert_count", "n_routed_experts"),
    Field("expert_shared_count", "n_shared_experts", default=None),
    Field("expert_feed_forward_length", "moe_intermediate_size"),
    Field("expert_weights_scale", "routed_scaling_factor", float, 1.0),
    Field("expert_weights_norm", "norm_topk_prob", bool, False),
    Field("expert_group_count", "n_group", default=1),
    Field("expert_group_used_count", "topk_group", default=1),
)


def sigmoid(metadata: Metadata) -> bool:
    """Whether the router is V3's."""
    return metadata.get("expert_gating_func", default=SOFTMAX) == SIGMOID


GROUPS = {160: (8, 3), 256: (8, 4)}
"""By the number of experts, the groups of the published models and those that are used: older files do not say them."""


def read_deepseek(metadata: Metadata, config: Config) -> Config:
    """The sizes of heads, and YaRN."""
    # Files with `key_length_mla` say of the other lengths what they are in the compressed cache.
    of = "_mla" if metadata.has("attention.key_length_mla") else ""
    scaling = read_rope(metadata).get("rope_scaling")
    scale = metadata.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    if scaling is not None and scale:
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), shortest(10 * scale))
    groups = (config["n_group"], config["topk_group"])
    if not metadata.has("expert_group_count"):
        groups = GROUPS.get(config["n_routed_experts"], groups)
    return {
        **dict(zip(("n_group", "topk_group"), groups, strict=True)),
        "qk_nope_head_dim": metadata.get(f"attention.key_length{of}") - config["qk_rope_head_dim"],
        "v_head_dim": metadata.get(f"attention.value_length{of}"),
        "num_key_value_heads": config["num_attention_heads"],
        "rope_theta": metadata.get("rope.freq_base", float, 10000.0),
        "rope_scaling": scaling,
    }


def read_deepseek2(metadata: Metadata, config: Config) -> Config:
    """As `read_deepseek`; groups of experts are chosen among where there are any."""
    if (function := metadata.get("expert_gating_func", default=SOFTMAX)) not in (0, SOFTMAX):
        raise ValueError(f"expert_gating_func must be {SOFTMAX} (softmax) or {SIGMOID} (sigmoid), got {function}")
    fields = read_deepseek(metadata, config)
    return {**fields, "topk_method": "greedy" if fields["n_group"] == 1 else "group_limited_greedy"}


def write_deepseek(config: Config) -> dict[str, object]:
    """The inverse of `read_deepseek`."""
    base, scaling = rope(config)
    scale, same = scaling.pop("mscale_all_dim", None), scaling.pop("mscale", None)
    if scale != same:
        raise ValueError(f"GGUF can say of DeepSeek that mscale = mscale_all_dim, got {same} and {scale}")
    width, rotated, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
    plain = {"model_type": "deepseek", "num_attention_heads": 1, "head_dim": rotated}
    values = {
        **write_rope({**plain, "rope_theta": base, "rope_scaling": scaling}),
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": width + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "expert_gating_func": SIGMOID if config["model_type"] == "deepseek_v3" else SOFTMAX,
    }
    return values if scale is None else {**values, "rope.scaling.yarn_log_multiplier": 0.1 * scale}


def write_deepseek2(config: Config) -> dict[str, object]:
    """The inverse of `read_deepseek2`."""
    check_fields(
        config, {"topk_method": ("greedy",) if config.get("n_group") in (None, 1) else ("group_limited_greedy",)}
    )
    return write_deepseek(config)


COMPRESSED = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
"""Keys that describe the compressed cache, in files that have `key_length_mla`."""
DEEPSEEK2 = Architecture(
    name="deepseek2",
    without_effect=COMPRESSED,
    model_type="deepseek_v2",
    model_class="DeepseekV2ForCausalLM",
    when=lambda metadata: not sigmoid(metadata),
    fields=DEEPSEEK_FIELDS,
    implied={**SILU, "attention_bias": False},
    rules=top(),
    layer_rules=DEEPSEEK_RULES,
    read=read_deepseek2,
    write=write_deepseek2,
)
DEEPSEEK3 = Architecture(
    name="deepseek2",
    without_effect=COMPRESSED,
    model_type="deepseek_v3",
    context_length=4096,
    model_class="DeepseekV3ForCausalLM",
    when=sigmoid,
    fields=DEEPSEEK_FIELDS,
    implied={**SILU, "attention_bias": False},
    allowed={"rope_interleave": (True, None), "topk_method": ("noaux_tc", None), "scoring_func": ("sigmoid", None)},
    rules=top(),
    layer_rules=DEEPSEEK_RULES,
    read=read_deepseek,
    write=write_deepseek,
)

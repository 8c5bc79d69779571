"""Phi-3 and Phi-4."""

import math

import numpy as np

from ..architecture import Architecture
from ..config import Config, Field, Metadata, check_fields
from ..rope import read_rope, read_unscaled_rope, rope, write_rope
from ..rules import linear
from .parts import DENSE, SILU, TWO_NORMS, head_dim, norms, top


def read_phi3(metadata: Metadata, config: Config) -> Config:
    """RoPE, whose factors are tensors, and the size of a head."""
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    tables = [metadata.extra.get(name) for name in names]
    longest = config["max_position_embeddings"]
    trained = metadata.get("rope.scaling.original_context_length", default=longest)
    size = head_dim(metadata)
    fields: Config = {"original_max_position_embeddings": trained}
    if size != config["hidden_size"] // config["num_attention_heads"]:
        fields["head_dim"] = size
    if tables[0] is None and tables[1] is None:
        return fields | read_rope(metadata)
    if any(x is None or x.shape != (metadata.get("rope.dimension_count", default=size) // 2,) for x in tables):
        raise ValueError(f"longrope needs {' and '.join(names)} with one factor for each pair of dimensions")
    short, long = ([float(str(value)) for value in x] for x in tables if x is not None)
    scaling: Config = {"type": "longrope", "short_factor": short, "long_factor": long}
    kind, factor = metadata.get("rope.scaling.type", str, "longrope"), metadata.get("rope.scaling.factor", float, 1.0)
    if kind not in ("longrope", "none") or factor != 1:
        raise ValueError(f"longrope together with RoPE scaling of type {kind!r} and factor {factor} is not supported")
    usual = attention_factor(longest, trained)
    if not math.isclose(own := metadata.get("rope.scaling.attn_factor", float, usual), usual, rel_tol=1e-5):
        scaling["attention_factor"] = own
    return fields | read_unscaled_rope(metadata) | {"rope_scaling": scaling}


def attention_factor(longest: int, trained: int) -> float:
    """By how much LongRoPE scales queries and keys (2402.13753, as in Phi-3's code)."""
    if trained < 2:
        raise ValueError(f"original_max_position_embeddings must be at least 2 with LongRoPE, got {trained}")
    ratio = longest / trained
    return math.sqrt(1 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0


def write_phi3(config: Config) -> dict[str, object]:
    """The inverse of `read_phi3`, without the factors."""
    _, scaling = rope(config)
    plain = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_parameters")}
    base = {"rope_theta": rope(config)[0], "partial_rotary_factor": scaling.get("partial_rotary_factor", 1.0)}
    trained = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    values = {**write_rope({**plain, **base}), "rope.scaling.original_context_length": trained}
    if scaling["rope_type"] == "default":
        return values
    check_fields({"model_type": "phi3", **scaling}, {"rope_type": ("longrope", "su")})
    usual = attention_factor(config["max_position_embeddings"], trained)
    return {**values, "rope.scaling.attn_factor": scaling.get("attention_factor", usual)}


def phi3_tables(config: Config) -> dict[str, np.ndarray]:
    """LongRoPE's factors."""
    _, scaling = rope(config)
    names = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
    return {new: np.asarray(scaling[old], np.float32) for old, new in names.items() if old in scaling}


PHI3 = Architecture(
    name="phi3",
    model_type="phi3",
    context_length=4096,
    model_class="Phi3ForCausalLM",
    fields=(*DENSE, Field("attention.sliding_window", "sliding_window", default=None, zero=None)),
    implied=SILU,
    rules=top(),
    layer_rules=(
        *norms(TWO_NORMS),
        *linear("attn_qkv", "self_attn.qkv_proj"),
        *linear("attn_output", "self_attn.o_proj"),
        *linear("ffn_up", "mlp.gate_up_proj"),
        *linear("ffn_down", "mlp.down_proj"),
    ),
    extra=("rope_factors_long.weight", "rope_factors_short.weight"),
    read=read_phi3,
    write=write_phi3,
    tables=phi3_tables,
)

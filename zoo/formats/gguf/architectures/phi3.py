"""Phi-3 and Phi-4."""

import math
from typing import Any

import numpy as np

from ..architecture import Architecture
from ..config import Config, Field, Metadata, check_fields, read_rope, rope, write_rope
from ..rules import linear
from .parts import DENSE, SILU, TWO_NORMS, norms, top


def read_phi3(metadata: Metadata, config: Config) -> Config:
    """RoPE, whose factors are tensors."""
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    found = [metadata.extra.get(name) for name in names]
    trained = metadata.get("rope.scaling.original_context_length", default=config["max_position_embeddings"])
    plain = {**read_rope(metadata), "original_max_position_embeddings": trained}
    if found[0] is None and found[1] is None:
        return plain
    if any(x is None or x.shape != (metadata.get("rope.dimension_count") // 2,) for x in found):
        raise ValueError(f"longrope needs {' and '.join(names)} with one factor for each pair of dimensions")
    short, long = ([float(str(value)) for value in x] for x in found if x is not None)
    return {**plain, "rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}


def write_phi3(config: Config) -> dict[str, Any]:
    """The inverse of `read_phi3`, without the factors."""
    _, scaling = rope(config)
    plain = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_parameters")}
    base = {"rope_theta": rope(config)[0], "partial_rotary_factor": scaling.get("partial_rotary_factor", 1.0)}
    trained = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    values = {**write_rope({**plain, **base}), "rope.scaling.original_context_length": trained}
    if scaling["rope_type"] == "default":
        return values
    check_fields({"model_type": "phi3", **scaling}, {"rope_type": ("longrope", "su"), "attention_factor": (None,)})
    ratio = config["max_position_embeddings"] / trained
    factor = math.sqrt(1 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0
    return {**values, "rope.scaling.attn_factor": factor}


def phi3_tables(config: Config) -> dict[str, np.ndarray]:
    """LongRoPE's factors."""
    _, scaling = rope(config)
    names = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
    return {new: np.asarray(scaling[old], np.float32) for old, new in names.items() if old in scaling}


PHI3 = Architecture(
    name="phi3",
    model_type="phi3",
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

"""RoPE in the metadata of a GGUF file and in a Hugging Face config: read in both directions."""

import math

import numpy as np

from ..json_file import JsonObject
from .config import Config, Metadata, shortest


def rope(config: Config) -> tuple[float, JsonObject]:
    """RoPE's base and scaling of a config, of its full attention where layers differ, in either of the two styles."""
    new = config.get("rope_parameters") or {}
    new = new.get("full_attention", new)
    scaling = {**(config.get("rope_scaling") or {}), **{k: v for k, v in new.items() if k != "rope_theta"}}
    scaling["rope_type"] = scaling.get("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if name not in scaling and config.get(name) is not None:
            scaling[name] = config[name]
    return float(new.get("rope_theta", config.get("rope_theta", 10000.0))), scaling


def read_rope(metadata: Metadata) -> Config:
    """The config's fields that tell of RoPE, in the style of transformers 4."""
    config = read_unscaled_rope(metadata)
    dims = metadata.get("rope.dimension_count", default=metadata.head_dim)
    if (scaling := _read_scaling(metadata, dims, config["rope_theta"])) is not None:
        config["rope_scaling"] = scaling
    return config


def read_unscaled_rope(metadata: Metadata) -> Config:
    """RoPE's base, and the share of a head that is rotated where it is not the whole head."""
    config: Config = {"rope_theta": metadata.get("rope.freq_base", float, 10000.0)}
    width = metadata.head_dim
    dims = metadata.get("rope.dimension_count", default=width)
    return config if dims == width else {**config, "partial_rotary_factor": dims / width}


def _read_scaling(metadata: Metadata, dims: int, base: float) -> Config | None:
    # llama.cpp scales linearly where no type is given, and reads the older key of the factor where the newer is absent.
    kind = metadata.get("rope.scaling.type", str, "linear")
    older = metadata.get("rope.scale_linear", float, 0.0)
    factor = metadata.get("rope.scaling.factor", float, older) or 1.0
    if (factors := metadata.extra.get("rope_freqs.weight")) is not None:
        if kind not in ("none", "linear") or (kind == "linear" and factor != 1):
            raise ValueError(f"rope_freqs.weight together with RoPE scaling of type {kind!r} is not supported")
        return read_llama3(factors, dims, base)
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        for key, plain in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("attn_factor", 1.0)):
            if (value := metadata.get(f"rope.scaling.{key}", float, plain)) != plain:
                raise ValueError(f"YaRN with rope.scaling.{key} = {value} is not supported, only with {plain}")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": metadata.get(
                "rope.scaling.original_context_length", default=metadata.get("context_length")
            ),
            "beta_fast": metadata.get("rope.scaling.yarn_beta_fast", float, 32.0),
            "beta_slow": metadata.get("rope.scaling.yarn_beta_slow", float, 1.0),
        }
    raise ValueError(f"RoPE scaling of type {kind!r} is not supported for a {metadata.architecture} model")


def rotated_dims(config: Config) -> int:
    """The number of dimensions of a head that RoPE rotates."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return round(width * rope(config)[1].get("partial_rotary_factor", 1.0))


def write_rope(config: Config) -> JsonObject:
    """The metadata that tell of RoPE, the inverse of `read_rope`."""
    base, scaling = rope(config)
    kind, values = scaling["rope_type"], {"rope.freq_base": base}
    values["rope.dimension_count"] = rotated_dims(config)
    if kind in ("default", "llama3"):  # llama3's factors are a tensor
        return values
    known = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")}
    beside = {"rope_type", "partial_rotary_factor", "original_max_position_embeddings", "truncate"}
    given = {name for name, value in scaling.items() if value is not None}
    if kind not in known or not given <= {*beside, *known[kind]}:
        raise ValueError(f"this RoPE scaling cannot be said in GGUF: {scaling}")
    values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "linear":
        return values
    return values | {
        "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(scaling.get("beta_fast", 32.0)),
        "rope.scaling.yarn_beta_slow": float(scaling.get("beta_slow", 1.0)),
    }


def llama3_factors(scaling: Config, dims: int, base: float) -> np.ndarray:
    """By how much Llama 3.1 divides each of RoPE's frequencies (2407.21783, section 3.2)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    turns = trained * base ** (-np.arange(0, dims, 2) / dims) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def read_llama3(factors: np.ndarray, dims: int, base: float) -> Config:
    """The scaling that has these factors. Raises ValueError where they are not those of Llama 3.1 and its kin."""
    low, high, factor = 1.0, 4.0, shortest(float(factors.max(initial=1)))
    if factors.shape == (dims // 2,) and factor > 1:
        # A factor between 1 and the largest tells how often its frequency turns within the context trained on.
        smooth = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        turns = (low + smooth * (high - low)) * 2 * math.pi * base ** (np.arange(0, dims, 2) / dims)
        between = turns[(smooth > 1e-3) & (smooth < 1 - 1e-3)]
        for trained in (*(round(float(found)) for found in between[:1]), 8192):
            scaling: Config = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
            if np.allclose(factors, llama3_factors(scaling, dims, base), rtol=1e-4, atol=0):
                return scaling
    raise ValueError(
        f"rope_freqs.weight must hold Llama 3.1's factors for {dims} dimensions (low_freq_factor 1, high_freq_factor "
        f"4), got {factors!r:.300}"
    )

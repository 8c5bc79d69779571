"""How metadata of a GGUF file relates to fields of a Hugging Face config: read in both directions."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Config = dict[str, Any]
REQUIRED = object()
WITHOUT_EFFECT = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
)
"""Keys of any architecture that change nothing of what it computes; the last one counts where YaRN reads it."""
NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "expert_gating_func": 0,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "use_parallel_residual": False,
}
"""Keys that change nothing where they have this value."""


@dataclass(frozen=True)
class Metadata:
    """The metadata of one architecture, by key without the architecture's prefix.

    Each getter raises ValueError where the key is missing and has no default, or is of another type.
    """

    values: Mapping[str, Any]
    architecture: str
    rows: int
    """Of the token embedding: the size of the vocabulary."""
    extra: Mapping[str, np.ndarray]
    """Tensors that say how the model computes rather than what: factors of RoPE's frequencies, by name."""
    tensors: frozenset[str]
    """The names of all tensors."""
    used: set[str] = field(default_factory=set, compare=False)
    """The keys that were read so far, without the prefix."""

    def get(self, key: str, kind: type = int, default: Any = REQUIRED) -> Any:
        """The value of a key; one value for all layers where it is given for each."""
        self.used.add(key)
        value = self.values.get(f"{self.architecture}.{key}", default)
        if value is REQUIRED:
            raise ValueError(f"the metadata of a {self.architecture} model need the key {self.architecture}.{key}")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is default:
            return value
        if kind is float and isinstance(value, float):
            return shortest(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(
                f"{self.architecture}.{key} must be one {kind.__name__} for all layers, got {value!r:.200}"
            )
        return value

    def raw(self, key: str) -> Any:
        """The value of a key as it is stored; None where the metadata do not have it."""
        self.used.add(key)
        return self.values.get(f"{self.architecture}.{key}")

    def check_used(self, without_effect: Collection[str], ignore: Collection[str]) -> None:
        """Raises ValueError where a key of the architecture was not read and may change what the model computes.

        Args:
            without_effect: keys, without the prefix, that change nothing in this architecture.
            ignore: keys with their prefix that the caller vouches for.
        """
        prefix = f"{self.architecture}."
        known = {*self.used, *WITHOUT_EFFECT, *without_effect}
        unknown = {
            name: value
            for name, value in self.values.items()
            if name.startswith(prefix)
            and name not in ignore
            and name.removeprefix(prefix) not in known
            and not _is_neutral(name.removeprefix(prefix), value)
        }
        if unknown:
            keys = ", ".join(f"{name}={value!r:.60}" for name, value in sorted(unknown.items()))
            raise ValueError(
                f"the metadata have keys that are not supported for the architecture {self.architecture}: {keys}. If "
                f"they change nothing of what the model computes, pass ignore={sorted(unknown)} (on the command line: "
                f"--ignore {' '.join(sorted(unknown))})"
            )

    def has(self, key: str) -> bool:
        """Whether the metadata have a key."""
        return f"{self.architecture}.{key}" in self.values

    @property
    def head_dim(self) -> int:
        """The size of a head, which is an even share of the width where nothing is said."""
        heads = self.get("attention.head_count")
        if heads < 1:
            raise ValueError(f"{self.architecture}.attention.head_count must be positive, got {heads}")
        return self.get("attention.key_length", default=self.get("embedding_length") // heads)


def _is_neutral(key: str, value: Any) -> bool:
    """Whether a key is known to change nothing with this value, which may be given for each layer."""
    values = value.tolist() if isinstance(value, np.ndarray) else [value]
    return key in NEUTRAL and bool(values) and all(item == NEUTRAL[key] for item in values)


def shortest(value: float) -> float:
    """The decimal number that was meant by a float32: 1e-05 where 9.999999747378752e-06 is stored."""
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class Field:
    """A key of the metadata that is a field of the config."""

    key: str
    name: str
    kind: type = int
    default: Any = REQUIRED
    """Where the key is missing, on reading; where the field is missing or None, on writing."""
    zero: Any = REQUIRED
    """What the config has where the metadata have 0."""
    also: str = ""
    """What the field is called in newer configs."""

    def read(self, metadata: Metadata) -> Any:
        """The field's value."""
        value = metadata.get(self.key, self.kind, self.default)
        return self.zero if value == 0 and self.zero is not REQUIRED else value

    def write(self, config: Config) -> Any:
        """The key's value; None where the key is left out."""
        value = config.get(self.name, config.get(self.also))
        if value is None and self.zero is None:
            return self.kind(0)
        if value is None and self.default is REQUIRED:
            raise ValueError(
                f"the config of a {config['model_type']} model needs the field {self.name}: give it with the config"
            )
        return self.default if value is None else self._converted(value)

    def _converted(self, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**32
        fits = isinstance(value, bool) if self.kind is bool else is_number and self.kind(value) == value
        if not fits or (self.kind is int and value < 0):
            kinds = {bool: "true or false", int: "a whole number below 2**32", float: "a number below 2**32"}
            raise ValueError(f"{self.name} must be {kinds[self.kind]}, got {value!r:.100}")
        return self.kind(value)


def rope(config: Config) -> tuple[float, dict[str, Any]]:
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


def write_rope(config: Config) -> dict[str, Any]:
    """The metadata that tell of RoPE, the inverse of `read_rope`."""
    base, scaling = rope(config)
    kind, values = scaling["rope_type"], {"rope.freq_base": base}
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    values["rope.dimension_count"] = round(width * scaling.get("partial_rotary_factor", 1.0))
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


def check_fields(config: Config, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Checks fields that GGUF has no key for: where a config has them, they must be what its readers assume.

    Raises ValueError with the field, its value, and the values it could have.
    """
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise ValueError(
                f"GGUF cannot say {name}={config[name]!r} of a {config['model_type']} model: its readers assume "
                f"{' or '.join(repr(value) for value in values)}"
            )

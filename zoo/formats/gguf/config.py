"""How metadata of a GGUF file relates to fields of a Hugging Face config: read in both directions."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..json_file import JsonObject

Config = JsonObject
REQUIRED = object()
WITHOUT_EFFECT = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
)
"""Keys of any architecture that change nothing of what it computes; the last one counts where YaRN reads it."""
NEUTRAL: Mapping[str, object] = {
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

    values: Mapping[str, object]
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


def _is_neutral(key: str, value: object) -> bool:
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

    def _converted(self, value: object) -> Any:
        if isinstance(value, bool) and self.kind is bool:
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**32:
            if self.kind is float:
                return float(value)
            if self.kind is int and value >= 0 and int(value) == value:
                return int(value)
        kinds = {bool: "true or false", int: "a whole number below 2**32", float: "a number below 2**32"}
        raise ValueError(f"{self.name} must be {kinds[self.kind]}, got {value!r:.100}")


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

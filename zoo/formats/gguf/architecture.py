"""What an architecture of GGUF is made of."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..json_file import JsonObject
from .config import Config, Field, Metadata, check_fields
from .rope import read_rope, write_rope
from .rules import Rule


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One `general.architecture` of GGUF and the family it is in Hugging Face transformers."""

    name: str
    model_type: str
    model_class: str
    also: tuple[str, ...] = ()
    """Other model types that are written as this architecture, and read back as `model_type`."""
    fields: tuple[Field, ...]
    implied: Mapping[str, object]
    """Config fields that have no key, and the values they have."""
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Further config fields that have no key, and the values they may have when written."""
    rules: tuple[Rule, ...]
    """For tensors outside of layers."""
    layer_rules: tuple[Rule, ...]
    layers: str = "model.layers"
    """The Hugging Face name of the layers."""
    extra: tuple[str, ...] = ()
    """Tensors that are no weights but tell of RoPE."""
    without_effect: tuple[str, ...] = ()
    """Further keys, without the prefix, that change nothing of what this architecture computes."""
    context_length: int = 2048
    """The length that a config of this type means where it names none."""
    when: Callable[[Metadata], bool] = lambda metadata: True
    """Tells apart architectures of one name."""
    read: Callable[[Metadata, Config], Config] = lambda metadata, config: read_rope(metadata)
    """The config fields that do not follow from `fields` and `implied`, given those that do."""
    write: Callable[[Config], JsonObject] = write_rope
    """The inverse of `read`; raises ValueError for what the format cannot say."""
    tables: Callable[[Config], dict[str, np.ndarray]] = lambda config: {}
    """The inverse of `read`, for the tensors in `extra`."""

    def config(self, metadata: Metadata, ignore: Collection[str] = ()) -> Config:
        """The Hugging Face config that the metadata mean.

        Raises ValueError for a key of the architecture that is neither used, nor known to be without effect, nor in
        `ignore`.
        """
        config: Config = {"model_type": self.model_type, "architectures": [self.model_class], **self.implied}
        config |= {item.name: item.read(metadata) for item in self.fields}
        config |= self.read(metadata, config)
        metadata.check_used(self.without_effect, ignore)
        return config

    def metadata(self, config: Config) -> JsonObject:
        """The metadata of a config, by key without the architecture's prefix.

        Raises ValueError where the config says what the format cannot.
        """
        check_fields(config, {name: (value,) for name, value in self.implied.items()} | dict(self.allowed))
        try:
            values = {item.key: item.write(config) for item in self.fields} | self.write(config)
        except KeyError as error:
            raise ValueError(f"the config of a {config['model_type']} model needs the field {error}") from error
        return {key: value for key, value in values.items() if value is not None}

    def rules_of(self, layers: int) -> Iterator[Rule]:
        """The rules for every tensor of a model of so many layers."""
        yield from self.rules
        for layer in range(layers):
            for rule in self.layer_rules:
                yield rule.at(f"blk.{layer}.", f"{self.layers}.{layer}.")

"""Parts of a checkpoint: without fields that the caller vouches for, or the text model of a multimodal one."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..families.config import ROPE_OBJECTS, without_effect
from ..families.registry import BY_TYPE, ignored_fields
from .json_file import JsonObject
from .source import Source, TensorInfo

PREFIXES = (("model.language_model.", "model."), ("language_model.", ""), ("lm_head.", "lm_head."))
"""What names of a text model's tensors start with inside a multimodal checkpoint, and alone."""
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype")
"""Fields that a text model takes from the config around its own, where its own does not have them."""
_log = logging.getLogger(__name__)


def select(
    config: JsonObject, tensors: Collection[str], *, ignore: Collection[str] = (), text_only: bool = False
) -> tuple[JsonObject, dict[str, str]]:
    """The config without ignored fields, and the names of tensors with those that they have in the checkpoint.

    What is left out is logged as a warning.

    Args:
        config: of the checkpoint.
        tensors: the names of its tensors.
        ignore: fields of the config that are not known, and change nothing; they are left out of it.
        text_only: take the text model alone where the checkpoint is multimodal.

    Raises:
        ValueError: fields are to be ignored and the config cannot be read, or a multimodal checkpoint has no text model
            of a family of the zoo.
    """
    names = {name: name for name in tensors}
    if text_only and isinstance(config.get("text_config"), dict):
        names = _text_names(tensors)
        left_out = {name for name in tensors if name not in set(names.values())}
        parts = sorted({".".join(name.split(".")[:2]) for name in left_out})
        fields = sorted(
            name
            for name, value in config.items()
            if name not in {*CARRIED, "text_config"} and not without_effect(name, value)
        )
        _log.warning(
            "text only: left out %d of %d tensors (%s) and fields of the config (%s)",
            *(len(left_out), len(tensors), ", ".join(parts), ", ".join(fields)),
        )
        config = _text_config(config)
    if ignore and (ignored := ignored_fields(config, ignore)):
        config = _without(config, ignored)
        _log.warning("ignored fields of the config: %s", ", ".join(ignored))
    return config, names


class SelectedSource:
    """An open source with another config or fewer tensors; arguments and errors as of `select`."""

    def __init__(self, source: Source, *, ignore: Collection[str] = (), text_only: bool = False):
        self._source = source
        self.config, self._names = select(source.config, source.tensors, ignore=ignore, text_only=text_only)
        self.tensors: Mapping[str, TensorInfo] = {name: source.tensors[inner] for name, inner in self._names.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._source.read(self._names[name])

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the source."""
        return self._source.tokenizer()


def _text_config(config: Mapping[str, object]) -> JsonObject:
    """The config of the text model, complete by itself."""
    inner = config["text_config"]
    assert isinstance(inner, dict), inner
    text: JsonObject = dict(inner)
    kind = text.setdefault("model_type", f"{config.get('model_type')}_text")
    if not isinstance(kind, str) or kind not in BY_TYPE:
        raise ValueError(
            f"the text part of model_type {config.get('model_type')!r} is of the model_type {kind!r}, and no family "
            f"has it. Families: {', '.join(sorted(BY_TYPE))}"
        )
    text |= {name: config[name] for name in CARRIED if name in config and text.get(name) is None}
    return text | {"architectures": [BY_TYPE[kind].architecture]}


def _text_names(tensors: Collection[str]) -> dict[str, str]:
    """The text model's own names of its tensors, with those in the checkpoint."""
    names = {}
    for inner in tensors:
        for prefix, replacement in PREFIXES:
            if inner.startswith(prefix):
                names[replacement + inner.removeprefix(prefix)] = inner
                break
    if not names:
        raise ValueError(
            f"no tensor of the text model was found: names would start with {PREFIXES[0][0]} or {PREFIXES[1][0]}"
        )
    return names


def _without(config: Mapping[str, object], ignored: Collection[str]) -> JsonObject:
    """The config without these fields, which may be in the objects that describe RoPE."""
    inner = {name.removeprefix(f"{part}.") for name in ignored for part in ROPE_OBJECTS}

    def dropped(value: object) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: dropped(part) for name, part in value.items() if name not in inner}

    outer = {name: value for name, value in config.items() if name not in ignored}
    return outer | {name: dropped(outer[name]) for name in ROPE_OBJECTS if name in outer}

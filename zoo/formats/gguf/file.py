"""GGUF files as sources of weights."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ...end_tokens import ends_among
from ..json_file import JsonObject
from ..sentencepiece import CONTROL
from ..source import TensorInfo
from .architecture import Architecture
from .architectures import ARCHITECTURES
from .blocks import decode
from .config import Metadata
from .header import Header, Stored, read_header
from .rules import ConvertedTensor
from .sampling import read_sampling
from .tokenizer import read_tokenizer

SPECIAL = {"bos_token_id": ("bos",), "eos_token_id": ("eos", "eot", "eom"), "pad_token_id": ("padding",)}
"""Fields of the config that are keys `tokenizer.ggml.*_token_id`; a text, a turn and a message may end differently."""
MORE_ENDS = "eos_token_ids"
"""The key `tokenizer.ggml.*` for more tokens that end a text: Ollama reads it, llama.cpp does not."""


class GgufFile:
    """A GGUF file as a `zoo.source.Source`: config, tensors and tokenizer as Hugging Face has them.

    The file is mapped, not read; a tensor is dequantized when it is asked for. Names, permuted rows and shifted norms
    are undone, and what the format leaves out of the config is filled in. The file need not be trusted.

    Args:
        path: the file.
        ignore: keys of the metadata that are not supported, and that change nothing of what the model computes.

    Raises:
        ValueError: it is no GGUF file, it is damaged, it is one of several parts, or its architecture, the format of a
            tensor or a setting is not supported. The message names the file.
        ImportError: the package `gguf` is missing.
    """

    def __init__(self, path: str | Path, ignore: Collection[str] = ()):
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ValueError(f"there is no file {self.path}")
        if self.path.stat().st_size < 24:
            raise ValueError(f"{self.path} is no GGUF file: it is shorter than the header")
        self._data = np.memmap(self.path, np.uint8, "r")
        self.header: Header = read_header(self.path, self._data)
        try:
            self.architecture, metadata = _architecture(self)
            self.config: JsonObject = _config(self, metadata, ignore)
            self._made = _made(self, metadata.get("block_count"))
            self.tensors: Mapping[str, TensorInfo] = {name: made.info for name, made in self._made.items()}
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def read(self, name: str) -> np.ndarray:
        """One tensor by its Hugging Face name: in the dtype it is stored in, float32 where it is quantized."""
        return self._made[name].read()

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the metadata; None where they hold none. Raises ValueError for kinds not supported."""
        try:
            return read_tokenizer(self.header.metadata)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into a prompt."""
        template = self.header.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def generation_config(self) -> dict[str, object]:
        """The recommended sampling settings as fields of a generation_config.json; ValueError if one is no number."""
        return read_sampling(self.header.metadata)

    @property
    def name(self) -> str | None:
        """The name of the model."""
        name = self.header.metadata.get("general.name")
        return name if isinstance(name, str) else None

    @property
    def stored(self) -> "StoredTensors":
        """The tensors as they are named and laid out in the file."""
        return StoredTensors(self._data, self.header.tensors)


class StoredTensors:
    """The tensors of a GGUF file under its own names."""

    def __init__(self, data: np.ndarray, stored: Mapping[str, Stored]):
        self._data, self._stored = data, stored
        self.tensors = {name: TensorInfo(tensor.shape, tensor.format.dtype) for name, tensor in stored.items()}

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor, or the part of it at an index of its first dimension, which alone is dequantized then."""
        tensor = self._stored[name]
        shape, start, size = tensor.shape, tensor.offset, tensor.size
        if index is not None:
            shape, size = shape[1:], size // shape[0]
            start += index * size
        return decode(np.asarray(self._data[start : start + size]), tensor.format, shape)


def _architecture(file: GgufFile) -> tuple[Architecture, Metadata]:
    values, tensors = file.header.metadata, file.header.tensors
    name = values.get("general.architecture")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise ValueError("a language model has a matrix token_embd.weight, and this file has none")
    tables = {extra for one in ARCHITECTURES for extra in one.extra} & tensors.keys()
    metadata = Metadata(
        values=values,
        architecture=str(name),
        rows=tensors["token_embd.weight"].shape[0],
        extra={table: np.asarray(file.stored.read(table), np.float32) for table in sorted(tables)},
        tensors=frozenset(tensors),
    )
    for architecture in ARCHITECTURES:
        if architecture.name == name and architecture.when(metadata):
            return architecture, metadata
    known = ", ".join(sorted({architecture.name for architecture in ARCHITECTURES}))
    raise ValueError(f"the architecture {name!r:.100} is not supported; known are {known}")


def _config(file: GgufFile, metadata: Metadata, ignore: Collection[str]) -> JsonObject:
    layers = metadata.get("block_count")
    if not 0 < layers <= len(file.header.tensors):
        raise ValueError(f"block_count must be positive and each layer have tensors, got {layers} layers")
    try:
        config = file.architecture.config(metadata, ignore)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"sizes and counts in the metadata must be positive: {error}") from error
    config["vocab_size"] = metadata.rows
    config["tie_word_embeddings"] = "output.weight" not in file.header.tensors
    config["torch_dtype"] = file.header.tensors["token_embd.weight"].format.dtype.name
    for field, names in SPECIAL.items():
        ids = [index for name in names for index in _token_ids(metadata.values, f"{name}_token_id")]
        if field == "eos_token_id":
            ids += [*_token_ids(metadata.values, MORE_ENDS), *ends_among(_control_tokens(file.header.metadata))]
        if ids := list(dict.fromkeys(ids)):
            config[field] = ids if len(ids) > 1 else ids[0]
    return config


def _token_ids(metadata: Mapping[str, object], name: str) -> list[int]:
    """The ids in a key `tokenizer.ggml.*`, which may hold one, an array of them, or be absent. Negative ones mean none.

    Raises ValueError if the key holds anything else.
    """
    value = metadata.get(f"tokenizer.ggml.{name}", [])
    values = value.tolist() if isinstance(value, np.ndarray) else value if isinstance(value, list) else [value]
    ids = [index for index in values if type(index) is int]
    if len(ids) < len(values):
        raise ValueError(f"tokenizer.ggml.{name} must hold token ids, got {value!r:.100}")
    return [index for index in ids if 0 <= index < 2**31]


def _control_tokens(metadata: Mapping[str, object]) -> dict[str, int]:
    """Ids of the control tokens by their texts; empty where the metadata have no tokens or no types of tokens."""
    tokens, types = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, np.ndarray) or len(types) != len(tokens):
        return {}
    return {tokens[index]: int(index) for index in np.flatnonzero(types == CONTROL)}


def _made(file: GgufFile, layers: int) -> dict[str, ConvertedTensor]:
    """Every Hugging Face tensor; all tensors of the file are accounted for."""
    architecture, stored = file.architecture, file.stored
    made = [one for rule in architecture.rules_of(layers) for one in rule.to_hf(stored, file.config)]
    used = {name for one in made for name in one.of} | set(architecture.extra)
    if left := [name for name in file.header.tensors if name not in used]:
        raise ValueError(f"{len(left)} tensors are not known in the architecture {architecture.name}: {listed(left)}")
    return {one.name: one for one in made}


def listed(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""GGUF files written from any source of weights."""

import contextlib
import logging
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ...end_tokens import known_end_ids
from ...families.registry import read, write
from ..json_file import JsonObject
from ..source import Source, TensorInfo, token_of
from ..text_ends import end_ids, generation_config, ids_of, named_special_tokens
from ..tokenizer_file import tokenizer_of
from .architecture import Architecture
from .architectures import ARCHITECTURES
from .blocks import Format, encode, format_of, package
from .file import MORE_ENDS, SPECIAL, listed
from .rules import ConvertedTensor
from .sampling import write_sampling
from .tokenizer_out import write_tokenizer

FILE_TYPES = {"F16": 1, "Q8_0": 7}
LENGTH = "max_position_embeddings"
CARRIED = (LENGTH, "intermediate_size")
"""Fields that a config need not have for the model to be the same."""
_log = logging.getLogger(__name__)
_FLOAT32 = ("position_embd.", "ffn_gate_inp.")


def save_gguf(
    source: Source,
    path: str | Path,
    quantization: str = "F16",
    *,
    chat_template: str | None = None,
    name: str | None = None,
    ignore: Collection[str] = (),
) -> None:
    """Writes a GGUF file, as llama.cpp would have it, from any source of weights.

    Vectors, biases, routers and learned positions are stored as F32; rows that are not whole blocks of 32 as F16 where
    Q8_0 is asked for. One tensor at a time is in memory. The file appears under its name when it is complete.

    Args:
        source: config, tensors and tokenizer in the terms of Hugging Face.
        path: the file; one that is there is replaced.
        quantization: how matrices are stored, "F16" or "Q8_0".
        chat_template: the Jinja template to put in; by default the source's own, where it has one.
        name: of the model, which readers show and llama.cpp looks at; by default the source's own, or that of the file.
        ignore: fields of the config that are not known, and change nothing.

    Raises:
        ValueError: GGUF cannot say what the config says, a tensor or the tokenizer is not known in the architecture, or
            a number is too large to store.
        ImportError: the package `gguf` is missing.
    """
    if quantization not in FILE_TYPES:
        raise ValueError(f"quantization must be one of {', '.join(FILE_TYPES)}, got {quantization!r}")
    path = Path(path).expanduser()
    architecture = architecture_for(source.config)
    config = complete_config(source.config, architecture, ignore)
    name = str(name or getattr(source, "name", None) or path.stem)
    made, extra = _tensors(source, architecture, config)
    values = {f"{architecture.name}.{key}": value for key, value in architecture.metadata(config).items()}
    rows = next((one.info.shape[0] for one in made if one.name == "token_embd.weight"), 0)
    tokenizer = tokenizer_of(source)
    config = config | _token_ids(source, tokenizer)
    values |= {"tokenizer.ggml.model": "none"} if tokenizer is None else write_tokenizer(tokenizer, rows, config, name)
    values |= {f"{architecture.name}.vocab_size": rows, **_special(config, tokenizer)}
    template = chat_template if chat_template is not None else getattr(source, "chat_template", None)
    values |= {} if template is None else {"tokenizer.chat_template": template}
    values |= write_sampling(generation_config(source))
    values |= {"general.name": name, "general.file_type": FILE_TYPES[quantization], "general.quantization_version": 2}
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(aside, architecture.name, values, made, extra, quantization)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def architecture_for(config: JsonObject) -> Architecture:
    """The architecture a config is written as. Raises ValueError where GGUF has none, or none that is known."""
    kind = config.get("model_type")
    for architecture in ARCHITECTURES:
        if kind == architecture.model_type or kind in architecture.also:
            return architecture
    known = ", ".join(sorted(name for one in ARCHITECTURES for name in (one.model_type, *one.also)))
    raise ValueError(f"models of type {kind!r} cannot be written as GGUF; known are {known}")


def complete_config(config: JsonObject, architecture: Architecture, ignore: Collection[str] = ()) -> JsonObject:
    """A config with every field that its family knows, in the style of transformers 5, and nothing else.

    What a config leaves out has the value that its absence means. Raises ValueError as reading a config does.
    """
    _, fields = write(read(config, ignore=ignore), config["model_type"])
    carried = {name: config[name] for name in CARRIED if config.get(name) is not None}
    return {LENGTH: architecture.context_length} | fields | carried


def _tensors(
    source: Source, architecture: Architecture, config: JsonObject
) -> tuple[list[ConvertedTensor], dict[str, np.ndarray]]:
    """Every tensor of the file; all tensors of the source are accounted for."""
    layers = next(item for item in architecture.fields if item.key == "block_count").write(config)
    checkpoint = _Whole(source)
    made = [one for rule in architecture.rules_of(layers) for one in rule.to_gguf(checkpoint, config)]
    used = {name for one in made for name in one.of}
    if left := [name for name in source.tensors if name not in used]:
        raise ValueError(f"{len(left)} tensors are not known in the architecture {architecture.name}: {listed(left)}")
    if not any(one.name == "token_embd.weight" for one in made):
        raise ValueError("a language model has an embedding of tokens, and this source has none")
    return made, architecture.tables(config)


class _Whole:
    """A source's tensors, as rules want them."""

    def __init__(self, source: Source):
        self._source, self.tensors = source, source.tensors

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        x = self._source.read(name)
        return x if index is None else x[index]


def _token_ids(source: Source, tokenizer: Tokenizer | None) -> JsonObject:
    """The special tokens that the config, generation_config.json or the tokenizer's files name, as config fields."""
    fields: JsonObject = {}
    named = {} if tokenizer is None else named_special_tokens(source, tokenizer)
    for name in ("bos_token", "pad_token"):
        candidates = [source.config.get(f"{name}_id"), generation_config(source).get(f"{name}_id")]
        candidates += [tokenizer.token_to_id(named[name])] if tokenizer is not None and name in named else []
        for ids in map(ids_of, candidates):
            if ids and (tokenizer is None or all(token_of(tokenizer, index) is not None for index in ids)):
                fields[f"{name}_id"] = ids if len(ids) > 1 else ids[0]
                break
    return fields | ({"eos_token_id": ends} if (ends := [*end_ids(source, tokenizer)]) else {})


def _special(config: JsonObject, tokenizer: Tokenizer | None) -> JsonObject:
    """The keys of special tokens; several ends of a text take the keys that GGUF has for ends of turns and messages.

    Where these do not suffice, ends that readers know by their text have no key. If they still do not, the key
    `MORE_ENDS` has all of them, which is logged.
    """
    known = set() if tokenizer is None else {*known_end_ids(tokenizer)}
    keys: JsonObject = {}
    for field, names in SPECIAL.items():
        value = config.get(field)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        ids = list(dict.fromkeys(index for index in ids if index != -1))  # which stands for none
        if len(ids) > len(names):
            ids = [index for place, index in enumerate(ids) if place == 0 or index not in known]
        if len(ids) > len(names) and field != "eos_token_id":
            raise ValueError(f"GGUF has room for {len(names)} token as {field}, got {ids}: name one in config.json")
        if len(ids) > len(names):
            keys[f"tokenizer.ggml.{MORE_ENDS}"] = ids
            _log.warning(
                "llama.cpp reads %d tokens that end a text, and this model has %d: it will not end texts at %s; Ollama "
                "and flaxzoo will, by tokenizer.ggml.%s",
                *(len(names), len(ids), ids[len(names) :], MORE_ENDS),
            )
        keys |= {f"tokenizer.ggml.{name}_token_id": index for name, index in zip(names, ids, strict=False)}
    return keys


def _format(name: str, info: TensorInfo, quantization: str) -> Format:
    plain = len(info.shape) == 1 or name.endswith(".bias") or any(part in name for part in _FLOAT32)
    types = package().GGMLQuantizationType
    wanted = format_of(types["F32" if plain else quantization])
    return wanted if info.shape[-1] % wanted.block == 0 else format_of(types.F16)


def _write(
    path: Path,
    architecture: str,
    values: JsonObject,
    made: list[ConvertedTensor],
    extra: dict[str, np.ndarray],
    quantization: str,
) -> None:
    gguf = package()
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[np.int32] = writer.add_int32
    for key, value in values.items():
        add.get(type(value), writer.add_array)(key, value)
    tensors = [*made, *(_table(name, table) for name, table in extra.items())]
    formats = {one.name: _format(one.name, one.info, quantization) for one in tensors}
    for one in tensors:
        format, shape = formats[one.name], one.info.shape
        # The writer wants the shape in bytes of what it knows as blocks.
        stored = (*shape[:-1], shape[-1] // format.block * format.bytes) if format.block > 1 else shape
        dtype = np.dtype(np.uint8) if format.block > 1 else format.dtype
        size = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(one.name, stored, dtype, size, gguf.GGMLQuantizationType[format.name])
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in tensors:
            try:
                writer.write_tensor_data(np.ascontiguousarray(encode(one.read(), formats[one.name])))
            except ValueError as error:
                raise ValueError(f"the tensor {one.name} cannot be written: {error}") from error


def _table(name: str, table: np.ndarray) -> ConvertedTensor:
    return ConvertedTensor(name, TensorInfo(table.shape, table.dtype), (), lambda: table)

"""Weights out: a model, or any checkpoint, as a Hugging Face folder, tensor by tensor."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from ...layers.linear.linear import FusedTransposed
from ..decoder import Decoder, DecoderModel
from ..families import rope_config
from ..families.names import Unit, units
from ..families.registry import differences, read, write
from ..parameters import describe, split
from .hugging_face import CheckpointFolder, read_json
from .json_file import JsonObject
from .safetensors import NAMES
from .source import Progress, Source, TensorInfo, WithProgress, check_fits, floating, token_of, widest
from .text_ends import GENERATION_CONFIG, end_ids, generation_config
from .tokenizer_file import prepare_tokenizer, tokenizer_of

SHARD_BYTES = 5_000_000_000
"""How large a file of weights becomes, as in transformers."""

OLDER = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save(
    model: DecoderModel,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    config: Mapping[str, object] | None = None,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a Hugging Face folder, which transformers and `load` read.

    It is written beside its place and renamed at the end, so that a failure leaves nothing. The host holds one tensor
    at a time.

    Args:
        model: the model; where some family of Hugging Face can express it.
        folder: that does not exist yet, or is empty.
        tokenizer: written as `tokenizer.json`.
        config: of the checkpoint that the model came from, to go on with: its `model_type` chooses the family, and
            what it says of tokens and lengths stays. `{"model_type": "mistral"}` alone chooses a family.
        dtype: of the tensors; the parameters' own by default.
        shard_bytes: a file of weights has at most so many bytes, or one tensor.
        progress: is told how many bytes of how many are done.

    Raises:
        ValueError: where the folder holds something, the model has no Hugging Face config, or a number does not fit
            the dtype.
        OSError: where the disk is full or does not let us.
    """
    source: Source = ModelSource(model, tokenizer=tokenizer, config=config)
    source = source if progress is None else WithProgress(source, progress)
    write_folder(source, folder, dtype=dtype, shard_bytes=shard_bytes)


class ModelSource:
    """A model as a `Source`: what a checkpoint of it holds. Arguments and errors as of `save`.

    `described` is the folder of the checkpoint that the model came from, for its config, chat template and companions.
    """

    def __init__(
        self,
        model: DecoderModel,
        *,
        tokenizer: Tokenizer | None = None,
        config: Mapping[str, object] | None = None,
        described: CheckpointFolder | None = None,
    ):
        if any(isinstance(module, FusedTransposed) for _, module in nnx.iter_modules(model)):
            raise ValueError("a model in the form for decoding is not saved: save the one that it was made of")
        carried = dict(config or (described.config if described else {}))
        self.companions = described.companions if described else {}
        self.chat_template = described.chat_template if described else None
        self.name = described.name if described else None
        family, fields = write(model.spec, carried.get("model_type"))
        self.config: JsonObject = _merged(carried, fields, model.spec) | {"architectures": [family.architecture]}
        self._parameters, self._tokenizer = split(model), None if tokenizer is None else prepare_tokenizer(tokenizer)
        self._units = {
            name: (unit, expert)
            for unit in units(family.names, model.spec, describe(model))
            for expert, name in enumerate(unit.names)
        }
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(unit.shape, self._dtype(unit)) for name, (unit, _) in self._units.items()
        }
        self._host: tuple[Unit | None, list[np.ndarray]] = (None, [])

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        unit, expert = self._units[name]
        if self._host[0] is not unit:  # the experts of a layer come to the host together
            self._host = (
                unit,
                [self._part(part.parameter, part.layer).astype(self._dtype(unit)) for part in unit.parts],
            )
        return unit.join(expert, self._host[1])

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was given."""
        return self._tokenizer

    def _dtype(self, unit: Unit) -> np.dtype:
        return widest(self._parameters[part.parameter].dtype for part in unit.parts)

    def _part(self, name: str, layer: int | None) -> np.ndarray:
        array = self._parameters[name]
        if not array.is_fully_addressable:
            raise NotImplementedError(
                f"parameter {name} is split over several processes; convert a checkpoint of the run in one process"
            )
        return np.asarray(array if layer is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False))


def write_folder(
    source: Source, folder: str | Path, *, dtype: DTypeLike | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes any checkpoint as a Hugging Face folder; arguments and errors as of `save`."""
    folder = Path(folder)
    if folder.suffix == ".gguf":
        raise ValueError(f"{folder} would be a folder: save_gguf and `zoo convert` write .gguf files")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; choose another place")
    tensors = {
        name: TensorInfo(info.shape, info.dtype if dtype is None else floating(dtype))
        for name, info in source.tensors.items()
    }
    total = sum(_bytes(info) for info in tensors.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if total > free:
        raise OSError(f"{folder} takes {total:,} bytes, and {free:,} are free there")
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        _write_weights(source, tensors, aside, shard_bytes)
        write_description(source, aside, widest(info.dtype for info in tensors.values()))
        if (tokenizer := tokenizer_of(source)) is not None:
            _write_tokenizer(source, tokenizer, aside)
            _write_ends(source, tokenizer, aside)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_weights(source: Source, tensors: Mapping[str, TensorInfo], folder: Path, shard_bytes: int) -> None:
    """Writes the files of weights and their index."""
    shards = _shards(tensors, shard_bytes)
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        places |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as out:
            out.write(_header({name: tensors[name] for name in names}))
            for name in names:
                stored = source.read(name)
                check_fits(name, stored, tensors[name].dtype)
                array = np.ascontiguousarray(stored, dtype=tensors[name].dtype)
                assert array.shape == tensors[name].shape, (name, array.shape, tensors[name].shape)
                out.write(array.reshape(-1).view(np.uint8))
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        total = sum(_bytes(info) for info in tensors.values())
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_description(source: Source | CheckpointFolder, folder: Path, dtype: np.dtype | None = None) -> None:
    """Writes all of a checkpoint but weights and tokenizer: the config (with the dtype of the weights that are beside
    it), the chat template and the companions. `CheckpointFolder` reads it.
    """
    config = dict(source.config)
    config.pop("auto_map", None)  # names code that is not written with it
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype.name
    _write_json(folder / "config.json", config)
    companions: Mapping[str, Path] = getattr(source, "companions", {})
    for name, path in companions.items():
        shutil.copyfile(path, folder / name)
    if GENERATION_CONFIG not in companions and (fields := generation_config(source)):
        _write_json(folder / GENERATION_CONFIG, fields)
    template = getattr(source, "chat_template", None)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_tokenizer(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer, and the names of its special tokens where no companion has them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    if not (folder / "tokenizer_config.json").exists():
        _write_json(folder / "tokenizer_config.json", _special_tokens(tokenizer, source.config))


def _write_ends(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes every token that ends a text into generation_config.json, which is where transformers reads them."""
    path, ids = folder / GENERATION_CONFIG, [*end_ids(source, tokenizer)]
    fields = read_json(path) if path.is_file() else {}
    listed = fields.get("eos_token_id")
    if not {*ids} <= {*(listed if isinstance(listed, list) else [listed])}:
        _write_json(path, fields | {"eos_token_id": ids if len(ids) > 1 else ids[0]})


def _special_tokens(tokenizer: Tokenizer, config: Mapping[str, object]) -> JsonObject:
    fields = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in TOKENS:
        number = config.get(name)
        number = number[0] if isinstance(number, list) and number else number
        if (token := token_of(tokenizer, number)) is not None:
            fields[name.removesuffix("_id")] = token
    return fields


def _merged(carried: JsonObject, fields: JsonObject, decoder: Decoder) -> JsonObject:
    """The config `carried`, changed where it does not say what the decoder is."""
    with contextlib.suppress(ValueError):  # it may be incomplete, or have unknown fields that were ignored
        if carried and not differences(decoder, read(carried)):
            return carried
    kept = {name: value for name, value in carried.items() if name not in OLDER}
    # Absent, ids of tokens would be those of the family's first model; and transformers 4, which does not know
    # rope_parameters, would not ask for them.
    return dict.fromkeys(TOKENS) | kept | fields | rope_config.to_v4_fields(fields)


def _shards(tensors: Mapping[str, TensorInfo], most: int) -> list[list[str]]:
    shards, size = [[]], 0
    for name, info in tensors.items():
        if shards[-1] and size + _bytes(info) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(info)
    return shards


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    entries: JsonObject = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        begin, end = end, end + _bytes(info)
        entries[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

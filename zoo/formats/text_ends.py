"""Which tokens end a text, which special tokens have names, and which sampling settings a checkpoint recommends.

The same rule holds for every format and every command: `end_ids`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from tokenizers import Tokenizer

from ..end_tokens import known_end_ids
from .json_file import JsonObject, read_json
from .source import token_of


@runtime_checkable
class Described(Protocol):
    """A `Source`, a `CheckpointFolder` or the description of a run: a config with files beside it."""

    @property
    def config(self) -> JsonObject:
        """The fields of config.json."""
        ...


GENERATION_CONFIG = "generation_config.json"
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def end_ids(source: Described, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Ids of the tokens that end a text of this model, without duplicates.

    They are, in this order: `eos_token_id` of the config and of generation_config.json (a number or a list of them),
    and `eos_token` of tokenizer_config.json. For a GGUF file the config already includes the end-of-turn tokens of
    `known_end_ids`. If none of these names a token of the vocabulary, they are the `known_end_ids` of the tokenizer.

    Args:
        source: a `Source` or a `CheckpointFolder`.
        tokenizer: the model's tokenizer; without one, ids are not checked.
    """
    ids = [*ids_of(source.config.get("eos_token_id")), *ids_of(generation_config(source).get("eos_token_id"))]
    if tokenizer is None:
        return tuple(dict.fromkeys(ids))
    named = _named_tokens(_token_files(source)).get("eos_token")
    ids = [index for index in ids if token_of(tokenizer, index) is not None]
    if named is not None and (index := tokenizer.token_to_id(named)) is not None:
        ids.append(index)
    return tuple(dict.fromkeys(ids)) or known_end_ids(tokenizer)


def named_special_tokens(source: Described, tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens by the names that chat templates use, e.g. {"bos_token": "<s>", "eos_token": "</s>"}.

    Those of tokenizer_config.json and special_tokens_map.json; of a source without these files, those of the config's
    ids. Where nothing names "eos_token", it is the first of `end_ids`.
    """
    files = _token_files(source)
    named = _named_tokens(files)
    for name in () if files else ("bos_token", "eos_token", "pad_token", "unk_token"):
        for index in ids_of(source.config.get(f"{name}_id"))[:1]:
            if (text := token_of(tokenizer, index)) is not None:
                named[name] = text
    if "eos_token" not in files | named and (ends := end_ids(source, tokenizer)):
        named["eos_token"] = str(tokenizer.id_to_token(ends[0]))
    return named


def generation_config(source: Described) -> Mapping[str, object]:
    """The fields of generation_config.json, or those that the metadata of a GGUF file correspond to."""
    return _companion(source, GENERATION_CONFIG) or getattr(source, "generation_config", {})


def sampling_origin(source: Described) -> str:
    """Where the sampling settings of a source are written, for errors."""
    return GENERATION_CONFIG if hasattr(source, "companions") else "general.sampling"


def sampling_settings(fields: Mapping[str, object]) -> dict[str, float]:
    """The sampling settings among the fields of a generation_config.json by their names in `Sampling`.

    `do_sample: false` is temperature 0. Raises ValueError if a setting is not a number.
    """
    settings: dict[str, float] = {}
    for name in SAMPLING_FIELDS:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{GENERATION_CONFIG}: {name} must be a number, got {value!r:.60}")
        if value is not None:
            settings[name] = value
    if fields.get("do_sample") is False:
        settings["temperature"] = 0.0
    return settings


def _companion(source: Described, name: str) -> JsonObject:
    companions: Mapping[str, Path] = getattr(source, "companions", {})
    return read_json(companions[name]) if name in companions else {}


def _token_files(source: Described) -> JsonObject:
    return _companion(source, "special_tokens_map.json") | _companion(source, "tokenizer_config.json")


def _named_tokens(fields: Mapping[str, object]) -> dict[str, str]:
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in fields.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def ids_of(value: object) -> list[int]:
    """Token ids of a field that holds one, a list of them or none; -1 often stands for none."""
    values: Iterable[object] = value if isinstance(value, list) else [value]
    return [index for index in values if type(index) is int and 0 <= index < 2**31]

"""Tokenizers of checkpoints: `tokenizer.json` with what the files beside it add, or SentencePiece's `tokenizer.model`.

A tokenizer.json may hold settings of the program that saved it: truncation, padding and dropout of merges. They would
cut or change every text, so each tokenizer that enters the project passes through `prepare_tokenizer`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, processors

from .json_file import JsonObject, read_json
from .sentencepiece import read_sentencepiece
from .source import Source

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Special tokens that have a name in `tokenizer_config.json` and `special_tokens_map.json`."""
OTHER_KINDS = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model")
"""Files of tokenizers that alone do not say how text is split."""
_log = logging.getLogger(__name__)


def prepare_tokenizer(tokenizer: Tokenizer, origin: str = "the tokenizer") -> Tokenizer:
    """The tokenizer without truncation, padding and dropout of merges; a copy where it has any of them.

    What is switched off is logged as a warning that begins with `origin`.
    """
    truncation, padding = tokenizer.truncation, tokenizer.padding
    dropout = getattr(tokenizer.model, "dropout", None)
    switched_off = [
        *([f"truncation to {truncation['max_length']} tokens"] if truncation is not None else []),
        *(["padding"] if padding is not None else []),
        *([f"dropout of merges ({dropout:g})"] if dropout else []),
    ]
    if not switched_off:
        return tokenizer
    prepared = Tokenizer.from_str(tokenizer.to_str())
    prepared.encode_special_tokens = tokenizer.encode_special_tokens
    prepared.no_truncation()
    prepared.no_padding()
    if dropout:
        prepared.model.dropout = None
    _log.warning("%s asks for %s, which is switched off", origin, " and ".join(switched_off))
    return prepared


def tokenizer_of(source: Source) -> Tokenizer | None:
    """The tokenizer of a source, prepared; None where it has none."""
    tokenizer = source.tokenizer()
    return None if tokenizer is None else prepare_tokenizer(tokenizer)


def read_tokenizer_file(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, prepared. Raises ValueError where it cannot be read."""
    path = Path(path).expanduser()
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises Exception itself
        raise ValueError(f"cannot read the tokenizer {path}: {error}; it must be a tokenizer.json") from error
    return prepare_tokenizer(tokenizer, str(path))


def read_folder_tokenizer(folder: Path, rows: int | None = None) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, as transformers loads it; None where the folder has none.

    Beside `tokenizer.json`, these count: the tokens of `added_tokens_decoder` (or of `added_tokens.json` in older
    folders), the special tokens of `tokenizer_config.json` and `special_tokens_map.json`, and `add_prefix_space`;
    beside `tokenizer.model` also `add_bos_token` and `add_eos_token`.

    Args:
        folder: the folder.
        rows: of the model's embedding. Tokens that only the files beside `tokenizer.json` add, and that would have no
            row, are left out, which is logged.

    Raises:
        ValueError: a file is damaged, or the folder has a tokenizer of another kind alone.
    """
    settings = _optional(folder / "tokenizer_config.json")
    if (path := folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer_file(path)
    elif (path := folder / "tokenizer.model").is_file():
        tokenizer, names = read_sentencepiece(path)
        settings = names | {name: value for name, value in settings.items() if value is not None}
        _set_ends(tokenizer, settings)
    elif others := [name for name in OTHER_KINDS if (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has its tokenizer in {' and '.join(others)}, which is not read here. Make a tokenizer.json "
            "of it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    else:
        return None
    declared = _declared_tokens(folder, settings)
    if "added_tokens_decoder" not in settings:
        settings |= _optional(folder / "special_tokens_map.json")
    try:
        _add_declared(tokenizer, declared, folder, rows)
        _add_named(tokenizer, settings, folder, rows)
        tokenizer = _with_prefix_space(tokenizer, settings)
    except ValueError as error:
        raise ValueError(f"the tokenizer of {folder}: {error}") from error
    return tokenizer


def put_around(tokenizer: Tokenizer, before: Sequence[str], after: Sequence[str]) -> None:
    """Makes `encode` put these tokens before and after every text."""
    single = [*before, "$A", *after]
    pair = [*single, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)]
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((*before, *after))]
    template = processors.TemplateProcessing(single, pair, ids)
    tokenizer.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]


def _optional(path: Path) -> JsonObject:
    return read_json(path) if path.is_file() else {}


def _token(value: object, **defaults: bool) -> AddedToken:
    """A token from a string or an object with its content and flags."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str) or not fields["content"]:
        raise ValueError(f"a token must be a string, or an object with a string as content, got {value!r:.100}")
    flags = {
        name: fields[name] for name in ("lstrip", "rstrip", "single_word", "normalized", "special") if name in fields
    }
    if wrong := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
        raise ValueError(
            f"{wrong[0]} of the token {fields['content']!r} must be true or false, got {flags[wrong[0]]!r}"
        )
    return AddedToken(fields["content"], **(defaults | flags))


def _declared_tokens(folder: Path, settings: Mapping[str, object]) -> dict[int, AddedToken]:
    """The tokens that the folder declares with their ids."""
    if "added_tokens_decoder" in settings:
        declared = settings["added_tokens_decoder"]
        if not isinstance(declared, dict) or not all(index.isdecimal() for index in declared):
            raise ValueError(
                f"added_tokens_decoder in {folder} must be an object with ids as keys, got {declared!r:.100}"
            )
        return {int(index): _token(value) for index, value in declared.items()}
    special = {
        token.content for token in _special_tokens({**settings, **_optional(folder / "special_tokens_map.json")})
    }
    declared = {}
    for text, index in _optional(folder / "added_tokens.json").items():
        if type(index) is not int or index < 0:
            raise ValueError(f"added_tokens.json in {folder} must hold ids of tokens, got {text!r}: {index!r:.100}")
        declared[index] = _token(text, special=text in special, normalized=text not in special)
    return declared


def _special_tokens(settings: Mapping[str, object]) -> list[AddedToken]:
    """The special tokens that settings name, in order."""
    values = [settings[name] for name in NAMED if settings.get(name) is not None]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        several = settings.get(name) or []
        values += several.values() if isinstance(several, dict) else several if isinstance(several, list) else [several]
    return [
        _token(value if not isinstance(value, dict) else value | {"special": True}, special=True) for value in values
    ]


def _add_declared(tokenizer: Tokenizer, declared: Mapping[int, AddedToken], folder: Path, rows: int | None) -> None:
    """Adds declared tokens that the tokenizer lacks, and gives those that it has their declared flags."""
    present = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    older = "added_tokens_decoder" not in _optional(folder / "tokenizer_config.json")
    contents = {token.content for token in tokenizer.get_added_tokens_decoder().values()} if older else set()
    for index, token in sorted(declared.items()):
        if repr(token) in present or token.content in contents:
            continue
        if tokenizer.token_to_id(token.content) is None:
            if rows is not None and index >= rows:
                _log.warning(
                    "%s declares the token %r with the id %d, beyond the %d rows of the embedding: left out",
                    folder,
                    token.content,
                    index,
                    rows,
                )
                continue
            if index != (following := tokenizer.get_vocab_size()):
                raise ValueError(
                    f"the token {token.content!r} is declared with the id {index}, and the next free id is {following}"
                )
        tokenizer.add_tokens([token])


def _add_named(tokenizer: Tokenizer, settings: Mapping[str, object], folder: Path, rows: int | None) -> None:
    """Adds special tokens that the tokenizer lacks, and makes those special that text could spell by chance."""
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for token in _special_tokens(settings):
        if token.content in added and added[token.content].special:
            continue
        if tokenizer.token_to_id(token.content) is None and rows is not None and tokenizer.get_vocab_size() >= rows:
            _log.warning(
                "%s names the special token %r, which has no id and no row in the embedding: left out",
                folder,
                token.content,
            )
            continue
        tokenizer.add_special_tokens([token])


def _with_prefix_space(tokenizer: Tokenizer, settings: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that puts a space before text where `add_prefix_space` is true, and none where it is false."""
    wanted = settings.get("add_prefix_space")
    if not isinstance(wanted, bool):
        return tokenizer
    before = tokenizer.to_str()
    state = json.loads(before)
    scheme = ("first" if settings.get("legacy") is False else "always") if wanted else "never"
    for step in (*_steps(state, "pre_tokenizer"), *_steps(state, "decoder")):
        if step["type"] == "ByteLevel" and step in _steps(state, "pre_tokenizer"):
            step["add_prefix_space"] = wanted
        elif step["type"] == "Metaspace" and (step.get("prepend_scheme", "always") == "never") == wanted:
            step["prepend_scheme"] = scheme
    if not wanted and any(step["type"] == "Prepend" for step in _steps(state, "normalizer")):
        _drop(state, "normalizer", "Prepend")
        _drop(state, "decoder", "Strip")
    after = json.dumps(state, ensure_ascii=False)
    return tokenizer if state == json.loads(before) else Tokenizer.from_str(after)


_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def _steps(state: JsonObject, part: str) -> list[JsonObject]:
    """The steps of a normalizer, pre-tokenizer or decoder, which may be one or a sequence."""
    component = state[part]
    if component is None:
        return []
    return component[_PARTS[part]] if component["type"] == "Sequence" else [component]


def _drop(state: JsonObject, part: str, kind: str) -> None:
    """Removes the steps of a kind."""
    kept = [step for step in _steps(state, part) if step["type"] != kind]
    state[part] = {"type": "Sequence", _PARTS[part]: kept} if kept else None


def _set_ends(tokenizer: Tokenizer, settings: Mapping[str, object]) -> None:
    """Puts the begin token before each text, and the end token after it, where SentencePiece's model has them and the
    settings ask for them; a begin token is put there by default. A tokenizer.json holds this itself.
    """
    ends = []
    for name, default in (("bos_token", True), ("eos_token", False)):
        token = _token(settings[name]).content if settings.get(name) else None
        present = token is not None and tokenizer.token_to_id(token) is not None
        ends.append([token] if present and settings.get(f"add_{name}", default) is True else [])
    put_around(tokenizer, *ends)

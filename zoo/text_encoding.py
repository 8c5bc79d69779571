"""Text to token ids: the one place that decides whether text that spells a special token becomes that token."""

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tokenizers import Encoding, Tokenizer

from .end_tokens import separator_id, special_ids
from .formats.tokenizer_file import prepare_tokenizer

_LOCK = threading.RLock()
"""Held while a tokenizer is switched between its two ways to read text that spells a special token."""


def encode(
    tokenizer: Tokenizer, text: str, *, special_tokens: bool = False, add_special_tokens: bool = False
) -> list[int]:
    """The token ids of a text.

    Training, held-out scores, evaluation and generation all encode by this rule. Text that spells a special token
    ("</s>" in a web page) is plain text, unless `special_tokens` states that the text is meant to hold such tokens, as
    a rendered chat template is. Truncation, padding and dropout of merges that a tokenizer is set to are not applied.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        special_tokens: read text that spells a special token as that token.
        add_special_tokens: add what the tokenizer puts before and after a text, e.g. a BOS token. A text that already
            begins with that token gets no second one.

    Returns:
        The ids.
    """
    if not add_special_tokens:
        return encode_batch(tokenizer, [text], special_tokens=special_tokens)[0]
    tokenizer = prepare_tokenizer(tokenizer)
    with _reading_special_tokens(tokenizer, special_tokens):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        if not special_tokens and (spelled := _spelled(_reserved_tokens(tokenizer), text, encoding.ids)):
            parts = [tokenizer.encode(part, add_special_tokens=False) for part in _cut(text, spelled)]
            encoding = Encoding.merge(parts)
    inside, ids = encoding.ids, tokenizer.post_process(encoding).ids
    return ids[1:] if special_tokens and inside[:1] == ids[:1] == added_ids(tokenizer)[:1] else ids


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
    """The token ids of each text, as `encode` gives them, without what the tokenizer puts before and after a text."""
    tokenizer = prepare_tokenizer(tokenizer)
    with _reading_special_tokens(tokenizer, special_tokens):
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        if special_tokens:
            return rows
        reserved = _reserved_tokens(tokenizer)
        for index, (text, ids) in enumerate(zip(texts, rows, strict=True)):
            if spelled := _spelled(reserved, text, ids):
                parts = tokenizer.encode_batch_fast(_cut(text, spelled), add_special_tokens=False)
                rows[index] = [token for part in parts for token in part.ids]
        return rows


def unescaped(argument: str) -> str:
    """The text of a command-line argument: UTF-8 that Python kept as escapes of bytes because the locale is ASCII.

    Raises ValueError if the bytes are not UTF-8.
    """
    try:
        return argument.encode("utf-8", errors="surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"text must be UTF-8, got {argument!r}") from error


def added_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer puts before and after a text: those of the empty text."""
    return prepare_tokenizer(tokenizer).encode("").ids


@contextlib.contextmanager
def _reading_special_tokens(tokenizer: Tokenizer, special_tokens: bool) -> Iterator[None]:
    """Sets whether the tokenizer reads special tokens in text. The caller's setting is restored at the end."""
    with _LOCK:
        before = tokenizer.encode_special_tokens
        tokenizer.encode_special_tokens = not special_tokens
        try:
            yield
        finally:
            tokenizer.encode_special_tokens = before


def _reserved_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens that plain text must not become: special ones, the separator, and those added around a text."""
    reserved = {index: text for text, index in special_ids(tokenizer).items()}
    for index in (separator_id(tokenizer), *added_ids(tokenizer)):
        if index is not None:
            reserved[index] = str(tokenizer.id_to_token(index))
    return reserved


def _spelled(reserved: Mapping[int, str], text: str, ids: Iterable[int]) -> list[str]:
    """Reserved tokens that a text spells and its ids hold.

    The option of the library is not enough for a vocabulary whose model has the token among its own words (Unigram,
    WordLevel), or that has a separator as a common token.
    """
    if reserved.keys().isdisjoint(ids):
        return []
    return [reserved[token] for token in reserved.keys() & ids if reserved[token] in text]


def _cut(text: str, spelled: Iterable[str]) -> list[str]:
    """A text in parts, cut after the first character of each spelled token."""
    pattern = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in spelled if len(token) > 1)
    return re.split(pattern, text) if pattern else [text]

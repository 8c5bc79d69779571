"""Text to token ids: the one place that decides whether text that spells a special token becomes that token."""

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Encoding, Tokenizer

END_OF_TEXT = "<|endoftext|>"
SEPARATORS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<|endofdocument|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "</s>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)
"""Tokens that common tokenizers put between documents, in order of preference."""


def encode(
    tokenizer: Tokenizer, text: str, *, special_tokens: bool = False, add_special_tokens: bool = False
) -> list[int]:
    """The token ids of a text.

    Training, held-out scores, evaluation and generation all encode by this rule. Text that spells a special token
    ("</s>" in a web page) is plain text, unless `special_tokens` states that the text is meant to hold such tokens, as
    a rendered chat template is.

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
    with _reading_special_tokens(tokenizer, special_tokens):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        if not special_tokens and (spelled := _spelled(tokenizer, text, encoding.ids)):
            parts = [tokenizer.encode(part, add_special_tokens=False) for part in _cut(text, spelled)]
            encoding = Encoding.merge(parts)
    inside, ids = encoding.ids, tokenizer.post_process(encoding).ids
    return ids[1:] if special_tokens and inside[:1] == ids[:1] == added_ids(tokenizer)[:1] else ids


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
    """The token ids of each text, as `encode` gives them, without what the tokenizer puts before and after a text."""
    with _reading_special_tokens(tokenizer, special_tokens):
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        if special_tokens:
            return rows
        for index, (text, ids) in enumerate(zip(texts, rows, strict=True)):
            if spelled := _spelled(tokenizer, text, ids):
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
    return tokenizer.encode("").ids


@contextlib.contextmanager
def _reading_special_tokens(tokenizer: Tokenizer, special_tokens: bool) -> Iterator[None]:
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = not special_tokens
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = before


def _spelled(tokenizer: Tokenizer, text: str, ids: Iterable[int]) -> list[str]:
    """Special tokens that a text spells and its ids hold.

    The option of the library is not enough for a vocabulary whose model has the token among its own words (Unigram,
    WordLevel), or that has a separator as a common token.
    """
    special = _special_tokens(tokenizer, tokenizer.get_vocab_size())
    if special.keys().isdisjoint(ids):
        return []
    return [special[token] for token in special.keys() & ids if special[token] in text]


@functools.lru_cache(maxsize=4)
def _special_tokens(tokenizer: Tokenizer, size: int) -> dict[int, str]:
    del size  # a tokenizer with more tokens has other special tokens
    special = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for index in (*map(tokenizer.token_to_id, SEPARATORS), *added_ids(tokenizer)):
        if index is not None:
            special[index] = str(tokenizer.id_to_token(index))
    return special


def _cut(text: str, spelled: Iterable[str]) -> list[str]:
    """A text in parts, cut after the first character of each spelled token."""
    pattern = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in spelled if len(token) > 1)
    return re.split(pattern, text) if pattern else [text]

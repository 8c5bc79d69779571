"""Text as it is generated: tokens become pieces of text, and a piece is never taken back."""

import codecs
import re
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer, pre_tokenizers

from ..end_tokens import special_ids

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Shown for bytes within a text that are not UTF-8."""
INVALID = "\ufdd0"
"""Stands for such bytes internally, so that they differ from a replacement character that was written as a character.
A noncharacter, which Unicode reserves for internal use."""

CONTEXT = 8
"""How many tokens of the preceding text are decoded with a continuation: enough for a character in any tokenizer."""


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return INVALID, error.end


codecs.register_error("flaxzoo.invalid", _mark)


def split_stop(tokenizer: Tokenizer, stop: Sequence[str | int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The strings that end a text where it spells them, and the ids of the tokens that end it.

    An integer is the id of a token. The text of a special token stands for that token, not for its characters.
    """
    special = special_ids(tokenizer)
    strings = tuple(item for item in stop if isinstance(item, str) and item not in special)
    ids = [special[item] if isinstance(item, str) else item for item in stop if item not in strings]
    return strings, tuple(dict.fromkeys(ids))


class TokenDecoder:
    """Decodes tokens with `INVALID` in place of bytes that are not, or not yet, UTF-8.

    More tokens never change the text before trailing `INVALID`s. Tokenizers with byte-level alphabets and with byte
    fallback ("<0xC3>") have such bytes; others do not.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self._decoder = tokenizer, tokenizer.decoder
        self._byte_level = self._decoder is not None and self._decoder.decode(["Ġa", "Ã", "©"]) == " aé"
        self._fallback = self._decoder is not None and self._decoder.decode(["a", "<0xC3>", "<0xA9>"]) == "aé"

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        if not (self._byte_level or self._fallback):
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)
        tokens = [token for token in map(self.tokenizer.id_to_token, ids) if token is not None]
        if self._byte_level:
            return _decoded(b"".join(map(_bytes_of, tokens)))
        return self._decoder.decode(list(_with_marked_bytes(tokens)))


class TextStream:
    """The text of one row's tokens, piece by piece.

    A piece ends where no later token can change the text before it: not within a character of several bytes, and not
    within the possible start of a stop string. The text ends before the first stop string or end token, and without
    the bytes of an incomplete character at its end.

    Args:
        tokenizer: decodes the tokens.
        stop: strings that end the text where it spells them.
        ends: ids of tokens that end the text.
        before: tokens that the text continues. A decoder may drop a space at the beginning of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), ends: Sequence[int] = (), before: Sequence[int] = ()
    ):
        self.stop, self.ends = tuple(stop), frozenset(ends)
        self._decoder, self._before = TokenDecoder(tokenizer), list(before[-CONTEXT:])
        context = self._decoder.text(self._before)
        self._skipped = len(context.rstrip(INVALID))
        self._unfinished = INVALID * (len(context) - self._skipped)
        self.ids: list[int] = []
        """All tokens of the text, with the one that ended it."""
        self.text = ""
        """The text returned so far."""
        self.stopped = False
        """Whether a stop string or an end token came."""

    def push(self, ids: Sequence[int]) -> str:
        """Adds tokens and returns the text that is certain now and was not returned before."""
        if self.stopped or not ids:
            return ""
        count = next((number for number, token in enumerate(ids, 1) if token in self.ends), len(ids))
        before = len(self.ids)
        self.ids.extend(ids[:count])
        text = self._decoded()
        if not any(string in text for string in self.stop):
            self.stopped = self.ids[-1] in self.ends
            return self._advance(text if self.stopped else _without_stop_start(text.rstrip(INVALID), self.stop))
        # The token that completes the first stop string ends the text, however many tokens came at once.
        self.stopped, all_ids, starts = True, self.ids, [0]
        for size in range(before + 1, len(all_ids) + 1):
            self.ids = all_ids[:size]
            text = self._decoded()
            starts = [start for start in map(text.find, self.stop) if start >= 0]
            if starts:
                break
        return self._advance(text[: min(starts)])

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        return "" if self.stopped else self._advance(self._decoded())

    def _decoded(self) -> str:
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self.ends else self.ids
        text = self._decoder.text([*self._before, *ids])[self._skipped :]
        return text.removeprefix(self._unfinished)  # if the text does not complete the last character before it

    def _advance(self, text: str) -> str:
        piece = text.rstrip(INVALID)[len(self.text) :].replace(INVALID, REPLACEMENT)
        self.text += piece
        return piece


def _without_stop_start(text: str, stop: Sequence[str]) -> str:
    """`text` without an end that may become a stop string."""
    longest = 0
    for string in stop:
        for size in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:size]):
                longest = size
                break
    return text[: len(text) - longest]


def _alphabet() -> dict[str, int]:
    """The bytes that the characters of byte-level tokens stand for.

    Printable bytes stand for themselves, and the others are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    assert alphabet.keys() == {*pre_tokenizers.ByteLevel.alphabet()}
    return alphabet


BYTES = _alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token; a token with other characters (an added one) is its own text."""
    return bytes(BYTES[char] for char in token) if all(char in BYTES for char in token) else token.encode()


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "flaxzoo.invalid")


def _with_marked_bytes(tokens: Sequence[str]) -> Iterator[str]:
    """The tokens with `INVALID` in place of byte tokens that are not UTF-8 together with their neighbours."""
    data = bytearray()
    for token in [*tokens, ""]:
        if (match := _BYTE_TOKEN.fullmatch(token)) is not None:
            data.append(int(match[1], 16))
            continue
        for char in _decoded(bytes(data)):
            yield from [INVALID] if char == INVALID else (f"<0x{byte:02X}>" for byte in char.encode())
        data.clear()
        if token:
            yield token

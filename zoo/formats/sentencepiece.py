"""SentencePiece's BPE: from a `tokenizer.model` file, or from pieces with scores as GGUF stores them."""

import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces, in SentencePiece as in GGUF."""
MAX_PIECE = 1024
"""Characters of a piece that merges are searched for in: each is split at every position."""
SPACE = "▁"
"""The character that stands for a space in pieces."""
MAX_FILE = 64 * 1024 * 1024
"""Bytes of a `tokenizer.model`; Gemma's, the largest known, has 4.2 MB."""
_BPE = 2


@dataclass(frozen=True)
class Pieces:
    """The vocabulary of a SentencePiece model, in the order of ids."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unknown: int
    """Id of the piece for characters that no other piece has."""
    space_prefix: bool
    """Whether a space is put before each text."""
    byte_fallback: bool = True
    """Whether unknown characters become pieces of bytes."""


def bpe_tokenizer(pieces: Pieces) -> Tokenizer:
    """The tokenizer of these pieces, without special tokens."""
    vocab = {text: index for index, text in enumerate(pieces.texts)}
    model = models.BPE(
        vocab,
        merges_of(pieces.texts, pieces.scores, pieces.types),
        unk_token=pieces.texts[pieces.unknown],
        fuse_unk=True,
        byte_fallback=pieces.byte_fallback,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.space_prefix:
        spaces = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = spaces  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def merges_of(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges of a BPE that SentencePiece stores as scores: the best score is merged first.

    Every way to split a token into two tokens is a merge.
    """
    plain = {
        token: index for index, (token, type) in enumerate(zip(tokens, types, strict=True)) if type in (NORMAL, UNUSED)
    }
    if (longest := max(map(len, plain), default=0)) > MAX_PIECE:
        raise ValueError(f"tokens of SentencePiece have at most {MAX_PIECE} characters, got one of {longest}")
    merges: list[tuple[str, str]] = []
    for token in sorted(plain, key=lambda token: -scores[plain[token]]):
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in splits if left in plain and right in plain]
        merges += pairs if len(pairs) < 2 else sorted(pairs, key=lambda pair: (plain[pair[0]], plain[pair[1]]))
    return merges


def add_special_tokens(
    tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int], rstrip: Collection[str] = ()
) -> None:
    """Makes control pieces special tokens, and user-defined pieces tokens that are matched before all others.

    Spaces after the tokens in `rstrip` are removed.
    """

    def added(kinds: tuple[int, ...], special: bool) -> list[AddedToken]:
        return [
            AddedToken(token, normalized=False, special=special, rstrip=token in rstrip)
            for token, type in zip(tokens, types, strict=True)
            if type in kinds
        ]

    tokenizer.add_special_tokens(added((UNKNOWN, CONTROL), special=True))
    tokenizer.add_tokens(added((USER_DEFINED,), special=False))


def read_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a `tokenizer.model`, and its special tokens by name ("bos_token", "eos_token", "pad_token").

    Raises:
        ValueError: the file is damaged, or of a kind that the `tokenizers` library does not reproduce exactly: not a
            BPE, with a table of replaced characters, with runs of spaces removed, or with spaces as suffixes.
    """
    size = path.stat().st_size
    if size > MAX_FILE:
        raise ValueError(f"{path} has {size:,} bytes, more than {MAX_FILE:,}")
    try:
        pieces, names = _parse(path.read_bytes())
        if len(set(pieces.texts)) != len(pieces.texts) or "" in pieces.texts:
            raise ValueError("its pieces must differ, and none may be empty")
        tokenizer = bpe_tokenizer(pieces)
        add_special_tokens(tokenizer, pieces.texts, pieces.types)
    except Exception as error:  # `tokenizers` raises Exception itself
        raise ValueError(
            f"{path} cannot be read as a SentencePiece BPE: {error}. Make a tokenizer.json of it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from error
    return tokenizer, names


def _parse(data: bytes) -> tuple[Pieces, dict[str, str]]:
    """The pieces of a serialized `ModelProto`, and its special tokens by name."""
    texts, scores, types = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            texts.append(bytes(piece.get(1, b"")).decode())
            scores.append(struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0])
            types.append(piece.get(3, NORMAL))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not texts:
        raise ValueError("it has no pieces")
    space_prefix = bool(normalizer.get(3, True))
    refused = {
        "it is not a BPE (model_type)": trainer.get(3, 1) != _BPE,
        "it puts spaces after words (treat_whitespace_as_suffix)": bool(trainer.get(24, False)),
        "it replaces characters (precompiled_charsmap)": bool(normalizer.get(2, b"")),
        "it removes spaces (remove_extra_whitespaces)": bool(normalizer.get(4, True)),
        "it keeps spaces as they are (escape_whitespaces)": not normalizer.get(5, True),
        "it has user-defined pieces and puts a space before text": space_prefix and USER_DEFINED in types,
    }
    if reasons := [reason for reason, applies in refused.items() if applies]:
        raise ValueError(", ".join(reasons))
    unknown = trainer.get(40, 0)
    if unknown >= len(texts):
        raise ValueError(f"unk_id must be one of {len(texts)} pieces, got {unknown}")
    ids = {"bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2), "pad_token": trainer.get(43, -1)}
    names = {name: texts[index] for name, index in ids.items() if 0 <= index < len(texts)}
    return Pieces(texts, scores, types, unknown, space_prefix, bool(trainer.get(35, False))), names


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: an integer, or the bytes of any other type.

    The encoding: https://protobuf.dev/programming-guides/encoding.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 70:
            byte = data[at] if at < len(data) else -1
            if byte < 0:
                break
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError(f"it is not a protobuf message (near byte {at})")

    while at < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            value = varint()
            yield key >> 3, value - 2**64 if value >= 2**63 else value  # negative numbers are 64 bits wide
            continue
        size = {1: 8, 5: 4}.get(wire, -1) if wire != 2 else varint()
        if size < 0 or at + size > len(data):
            raise ValueError(f"it is not a protobuf message (near byte {at})")
        at += size
        yield key >> 3, data[at - size : at]

"""The token store: each source is tokenized once, into a memory-mapped file that later runs share."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ...zoo.text_encoding import encode_batch
from .cache import DamagedEntryError, digest, filled
from .sources import Source
from .split import Sample, split
from .tokenizer import cuttable, ends, ids, pieces, tokenizer_digest

Progress = Callable[[int, int | None], None]
"""Called with the bytes of text processed so far and, if known, about how many there are in all."""

_FORMAT = 4  # of the store and the rules that fill it
_BATCH = 2**22  # characters encoded at once


@dataclass(frozen=True)
class Store:
    """A tokenized source.

    Attributes:
        tokens: the training stream, memory-mapped.
        heldout: a sample of the held-out texts, spread evenly over them, of about the size that was asked for.
        documents: documents trained on.
        bytes: their exact size in UTF-8.
        digest: checksum of the tokens.
        heldout_bytes: size of all text that is held out, of which `heldout` is a sample.
        left_out: files and documents that are neither trained on nor held out, with reasons.
    """

    name: str
    tokens: np.ndarray
    heldout: tuple[str, ...]
    documents: int
    bytes: int
    digest: str
    heldout_bytes: int = 0
    left_out: tuple[str, ...] = ()


def token_store(
    source: Source,
    tokenizer: Tokenizer,
    *,
    heldout: float,
    heldout_bytes: int,
    cache: Path,
    special_tokens: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Store:
    """The tokens of a source, from the cache or computed now.

    Args:
        source: what to read.
        tokenizer: as `load_tokenizer` gives it.
        heldout: the fraction held out, where the source has no validation split.
        heldout_bytes: how much held-out text there must be to choose from.
        cache: the cache folder.
        special_tokens: read text that spells a special token as that token.
        verify: compare the checksum of the tokens, too. Their number, and that all are below the vocabulary, is
            always checked.
        progress: called while it tokenizes.

    Raises:
        ValueError: there is no text in it, or something that is not text; the cache entry is damaged.
        CacheError: the cache cannot be written.
    """
    key = digest(_FORMAT, source.fingerprint, tokenizer_digest(tokenizer), heldout, heldout_bytes, special_tokens)

    def fill(aside: Path) -> None:
        aside.mkdir()
        kept = Sample(heldout_bytes)
        count = [0, 0, 0]  # documents and bytes trained on, bytes held out
        empty = 0
        about = source.size

        def trained() -> Iterator[str]:
            nonlocal empty
            done = 0
            for part in split(source, heldout):
                done += part.size
                if not part.text:
                    empty += 1
                elif part.held:
                    kept.add(part)
                    count[2] += part.size
                else:
                    count[0] += 1
                    count[1] += part.size
                    yield part.text
                if progress:
                    progress(done, max(done, about))

        name = hashlib.blake2b(digest_size=10)
        with (aside / "tokens").open("wb") as file:
            for part in stream(trained(), tokenizer, special_tokens=special_tokens):
                file.write(part.data)
                name.update(part.data)
        if not count[0]:
            raise ValueError(
                f"{source.name} must hold some text to train on, got none; is it the right file and field?"
            )
        meta = {"documents": count[0], "bytes": count[1], "digest": name.hexdigest(), "heldout": kept.texts()}
        meta |= {"heldout_bytes": count[2], "empty": empty}
        meta["tokens"] = (aside / "tokens").stat().st_size // _dtype(tokenizer).itemsize
        content = json.dumps({"meta": meta, "checksum": digest(meta)})
        (aside / "meta.json").write_text(content, encoding="utf-8")

    folder = filled(cache / "tokens" / key, fill)
    try:
        content = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta = content["meta"]
        if content["checksum"] != digest(meta):
            raise ValueError("the checksum of meta.json does not match")
        tokens = _open_tokens(folder / "tokens", tokenizer, meta["tokens"])
        if verify and (checksum := _checksum(tokens)) != meta["digest"]:
            raise ValueError(f"the checksum of tokens is {checksum}, and {meta['digest']} was written")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedEntryError(folder, error) from error
    empty = f"{meta['empty']:,} empty document{'' if meta['empty'] == 1 else 's'}"
    return Store(
        source.name,
        tokens,
        tuple(meta["heldout"]),
        meta["documents"],
        meta["bytes"],
        meta["digest"],
        meta["heldout_bytes"],
        (*([empty] if meta["empty"] else []), *source.left_out),
    )


def _open_tokens(file: Path, tokenizer: Tokenizer, count: int) -> np.ndarray:
    """The tokens of a file. Raises ValueError if there are not `count`, or one is outside the vocabulary."""
    dtype = _dtype(tokenizer)
    if (size := file.stat().st_size) != count * dtype.itemsize:
        raise ValueError(f"{file.name} must have {count * dtype.itemsize:,} bytes, got {size:,}")
    tokens, vocabulary = np.memmap(file, dtype=dtype, mode="r"), ids(tokenizer)
    for start in range(0, count, _BATCH):
        if (highest := int(tokens[start : start + _BATCH].max())) >= vocabulary:
            raise ValueError(f"{file.name} has the id {highest}, and the vocabulary has {vocabulary} ids")
    return tokens


def _checksum(tokens: np.ndarray) -> str:
    checksum = hashlib.blake2b(digest_size=10)
    for start in range(0, len(tokens), _BATCH):
        checksum.update(tokens[start : start + _BATCH].tobytes())
    return checksum.hexdigest()


def heldout_stream(texts: Iterable[str], tokenizer: Tokenizer, *, special_tokens: bool = False) -> np.ndarray:
    """Texts as one stream in memory; a lone separator where there are none."""
    return np.concatenate(list(stream(texts, tokenizer, special_tokens=special_tokens)))


def stream(texts: Iterable[str], tokenizer: Tokenizer, *, special_tokens: bool = False) -> Iterator[np.ndarray]:
    """The stream of some documents in parts, uint16 or uint32 by the vocabulary.

    `SEP d1 SEP d2 SEP ... dn SEP`, where SEP is the separator; with another token, BOS, that the tokenizer puts before
    a text, `SEP BOS d1 SEP BOS d2 SEP ... dn SEP`. With `special_tokens`, a document may itself begin with BOS and end
    with SEP: no second one is added.
    """
    begin, end = ends(tokenizer)
    between = np.array([end] if begin == end else [end, begin], _dtype(tokenizer))
    cut = cuttable(tokenizer)
    parts: list[tuple[str, bool]] = []  # text, and whether it begins a document
    waiting = 0
    last: int | None = None  # the latest token of the stream

    def encoded() -> np.ndarray:
        nonlocal last, parts, waiting
        rows = encode_batch(tokenizer, [text for text, _ in parts], special_tokens=special_tokens)
        arrays: list[np.ndarray] = []
        for (_, begins), encoded_ids in zip(parts, rows, strict=True):
            if begins:
                before = between[1:] if special_tokens and last == between[0] else between
                before = before[:-1] if special_tokens and encoded_ids[:1] == [begin] else before
                arrays.append(before)
            arrays.append(np.array(encoded_ids, between.dtype))
            last = encoded_ids[-1] if encoded_ids else begin if begins else last
        parts, waiting = [], 0
        return np.concatenate(arrays)

    for text in texts:
        for index, piece in enumerate(pieces(text) if cut else (text,)):
            parts.append((piece, index == 0))
            waiting += len(piece)
            if waiting >= _BATCH:
                yield encoded()
    if parts:
        yield encoded()
    if not special_tokens or last != end:
        yield between[:1]


def _dtype(tokenizer: Tokenizer) -> Any:
    return np.dtype("<u2" if ids(tokenizer) <= 2**16 else "<u4")

"""The split of a source into text that is trained on and text that is held out."""

import hashlib
import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .sources import Source

_BUCKETS = 2**20
_BUCKET = 2**64 // _BUCKETS
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def place(index: int) -> int:
    """A place in [0, 2^64) for a document: multiples of the golden ratio, which any run of indices fills evenly."""
    return (index * _GOLDEN + 2**63) % 2**64


class Part(NamedTuple):
    """A text, its size in bytes of UTF-8, and whether it is held out."""

    text: str
    size: int
    held: bool


def split(source: Source, heldout: float) -> Iterator[Part]:
    """Every text of a source, and whether it is held out.

    A validation split of the source's own is used as it is. Otherwise `heldout` of the bytes of text is held out:

    - Of a document with more than `heldout / 4` of all bytes, the end is held out, cut after a newline if one is near.
    - Of the other documents, whole ones are held out: those whose hash is below a threshold, which is chosen so that
      their bytes are `heldout` of all bytes of such documents. So copies of a document are all trained on or all held
      out.

    The source is read twice. An empty text is given as it is, not held out.

    Args:
        source: what to read.
        heldout: the fraction to hold out, in [0, 1).

    Yields:
        The parts, in the source's order.

    Raises:
        ValueError: a text cannot be written in UTF-8.
    """
    for text, held in _split(source, heldout):
        yield Part(text, _size(text, source.name), held)


def _split(source: Source, heldout: float) -> Iterator[tuple[str, bool]]:
    if source.has_validation:
        yield from ((text, False) for text in source.documents("train"))
        yield from ((text, True) for text in source.documents("validation"))
        return
    if not heldout:
        yield from ((text, False) for text in source.documents())
        return
    largest, threshold = _limits(source, heldout)
    for text in source.documents():
        if (size := _size(text, source.name)) <= largest:
            yield text, bool(size) and _hash(text) < threshold
            continue
        cut = _cut(text, heldout)
        yield text[:cut], False
        if cut < len(text):
            yield text[cut:], True


def _limits(source: Source, heldout: float) -> tuple[float, int]:
    """The bytes of the largest document that is not cut, and the hash below which such documents are held out.

    Bytes are counted in buckets of hashes, so memory does not grow with the number of documents.
    """
    buckets = np.zeros(_BUCKETS, np.int64)
    large: list[tuple[int, int]] = []  # bucket and size of documents that may have to be cut
    total = 0
    for text in source.documents():
        bucket, size = _hash(text) // _BUCKET, _size(text, source.name)
        buckets[bucket] += size
        total += size
        if size > heldout / 4 * total:
            large.append((bucket, size))
    largest = heldout / 4 * total
    for bucket, size in large:
        buckets[bucket] -= size * (size > largest)
    below = np.concatenate([[0], np.cumsum(buckets)])
    return largest, int(np.abs(below - heldout * below[-1]).argmin()) * _BUCKET


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")


def _size(text: str, name: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"{name}: text must be Unicode, got half a surrogate pair near {around!r}; it is written "
            f"\\u{ord(text[error.start]):04x} alone in the JSON: remove it there"
        ) from error


def _cut(text: str, heldout: float) -> int:
    """Where the held-out end of a document begins: a line's begin, if that makes it at most twice as long."""
    tail = int(len(text) * heldout)
    cut = len(text) - tail
    line = text.rfind("\n", 0, cut) + 1
    return line if line and cut - line <= tail and tail else cut


class Sample:
    """Up to `limit` bytes of text out of any number of documents, spread evenly over them.

    Taking documents in the order of their `place`, a shorter sample is a prefix of a longer one.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._seen = 0
        self._bytes = 0
        self._kept: list[tuple[int, str, int]] = []  # a heap: the last place first

    def add(self, part: Part) -> None:
        """Offer the next document."""
        text = "".join(capped([part.text], self.limit))  # of a huge document the rest would never be used
        heapq.heappush(self._kept, (-place(self._seen), text, part.size))
        self._seen += 1
        self._bytes += part.size
        while self._kept and self._bytes - self._kept[0][2] >= self.limit:
            self._bytes -= heapq.heappop(self._kept)[2]

    def texts(self) -> list[str]:
        """The documents; together they may reach over the limit, by at most one of them."""
        return [text for _, text, _ in sorted(self._kept, reverse=True)]


def capped(texts: list[str], limit: int) -> list[str]:
    """The first `limit` bytes of UTF-8 of some texts, the last one cut between two characters."""
    kept = []
    for text in texts:
        data = text.encode()[:limit]
        limit -= len(data)
        if part := data.decode("utf-8", errors="ignore"):
            kept.append(part)
    return kept

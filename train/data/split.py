"""What of a source is trained on and what is held out: decided by document, without knowing how many there are."""

import heapq
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from .sources import Source

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

    A validation split of the source's own is used as it is. Of many documents, whole ones are held out, spread evenly;
    of few (below 4 / heldout) the end of each, cut after a newline where there is one near. Empty texts are left out.

    Args:
        source: what to read.
        heldout: the fraction to hold out, in [0, 1).

    Yields:
        The parts, in the source's order.

    Raises:
        ValueError: a text cannot be written in UTF-8.
    """
    for text, held in _split(source, heldout):
        if text:
            yield Part(text, _size(text, source.name), held)


def _split(source: Source, heldout: float) -> Iterator[tuple[str, bool]]:
    if source.has_validation:
        yield from ((text, False) for text in source.documents("train"))
        yield from ((text, True) for text in source.documents("validation"))
        return
    many = int(min(4 / heldout, 2**40)) if heldout else 0
    few = sum(1 for _ in itertools.islice(source.documents(), many)) < many
    for index, text in enumerate(source.documents()):
        if few:
            cut = _cut(text, heldout)
            yield text[:cut], False
            yield text[cut:], True
        else:
            yield text, place(index) < heldout * 2**64


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

"""Which keys a query may see: a small algebra of masks over (batch, head, query, key) indices.

`Causal() & Window(4096) & Documents(ids, ids)`, `|` and `~` compose. A mask is a pytree: its arrays may be traced.
"""

import abc
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Bool, Int

Index = Int[Array, "..."]


class Mask(abc.ABC):
    """A predicate on index arrays that broadcast against each other; true where the key is visible."""

    @abc.abstractmethod
    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""

    def key_range(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """Bounds [low, high) outside which no query in [first, last] sees a key, as far as is known before running."""
        return 0, keys

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Causal(Mask):
    """key <= query + offset; `offset` (an int or one per sequence) is the position of the first query."""

    offset: int | Int[Array, " B"] = field(default=0)

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return key <= query + _at(self.offset, batch)

    def key_range(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """Bounds of the visible keys."""
        return (0, min(keys, max(0, last + self.offset + 1))) if isinstance(self.offset, int) else (0, keys)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window(Mask):
    """query + offset - left < key < query + offset + right: the `left` latest keys, the query's own included."""

    left: int = field(metadata={"static": True})
    right: int = field(default=1, metadata={"static": True})
    offset: int | Int[Array, " B"] = field(default=0)

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        distance = key - (query + _at(self.offset, batch))
        return (distance > -self.left) & (distance < self.right)

    def key_range(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """Bounds of the visible keys."""
        if not isinstance(self.offset, int):
            return 0, keys
        low = max(0, min(first + self.offset - self.left + 1, keys))
        return low, max(low, min(last + self.offset + self.right, keys))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents(Mask):
    """Query and key belong to the same document; id 0 is padding and sees nothing."""

    query_ids: Int[Array, "B T"]
    key_ids: Int[Array, "B S"]

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        own = self.query_ids[batch, query]
        return (own == self.key_ids[batch, key]) & (own > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Both(Mask):
    """Visible in both masks."""

    left: Mask
    right: Mask

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return self.left.visible(batch, head, query, key) & self.right.visible(batch, head, query, key)

    def key_range(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """Bounds of the visible keys."""
        (low, high), (other_low, other_high) = (m.key_range(first, last, keys) for m in (self.left, self.right))
        return max(low, other_low), max(max(low, other_low), min(high, other_high))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Either(Mask):
    """Visible in one mask or the other."""

    left: Mask
    right: Mask

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return self.left.visible(batch, head, query, key) | self.right.visible(batch, head, query, key)

    def key_range(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """Bounds of the visible keys."""
        (low, high), (other_low, other_high) = (m.key_range(first, last, keys) for m in (self.left, self.right))
        return min(low, other_low), max(high, other_high)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Not(Mask):
    """Visible where the other mask is not."""

    mask: Mask

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return ~self.mask.visible(batch, head, query, key)


def _at(offset: Any, batch: Index) -> Any:
    return offset if isinstance(offset, int) or offset.ndim == 0 else offset[batch]

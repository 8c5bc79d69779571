"""Which keys a query may see: a small algebra of masks over (batch, head, query, key) indices.

`Causal() & Window(4096) & Documents(ids)`, `|` and `~` compose, and `Where(function)` is a mask of any traced function.
A mask is a pytree: its arrays may be traced. No array of size T x S is allocated: attention classifies blocks of pairs
as empty, full or partial (blocks.py), skips empty ones and evaluates the mask in partial ones only.
"""

import abc
import operator
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .lookup import check_kind, lookup

Index = Int[Array, "..."]
Band = tuple[int | None, int | None]
POSITIONS = 2**30
"""Positions are from -POSITIONS to POSITIONS, so that their sums and differences fit int32."""
static: Any = {"static": True}


class Mask(abc.ABC):
    """A predicate on a query and a key, true where the query sees the key.

    `query` is the query's position: its index plus the `query_offset` given to `attend`. `key` is the key's index.
    """

    @abc.abstractmethod
    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`; on index arrays that broadcast against each other."""

    @property
    def causal(self) -> bool:
        """True only if no query sees a later key; it may be False for a causal mask, which costs time."""
        return self.band is not None and self.band[1] is not None and self.band[1] <= 1

    @property
    def band(self) -> Band | None:
        """(left, right) if the mask is query - left < key < query + right, where None is no bound; else None."""
        return None

    def plot(
        self,
        queries: int,
        keys: int | None = None,
        *,
        block: int = 128,
        title: str | None = None,
        batch: int = 1,
        heads: int = 1,
        head: int = 0,
    ) -> Any:
        """A matplotlib figure of the visible pairs: blocks by color, and up to 2^18 pairs as dots.

        Args:
            queries: T.
            keys: S; by default as many as queries.
            block: the number of queries, and of keys, of a block.
            title: above the picture; the mask itself by default.
            batch: the number of sequences in the arrays of the mask; the first is drawn.
            heads: the number of query heads.
            head: the head that is drawn.
        """
        from .plot import plot  # needs the `viz` extra

        title = str(self) if title is None else title
        return plot(self, queries, keys or queries, block, title=title, batch=batch, heads=heads, head=head)

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, check_mask(other))

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, check_mask(other))

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise ValueError("masks are combined with &, | and ~, not with `and`, `or` and `not`")


def check_mask(mask: Any) -> Any:
    """The mask; raises ValueError if it is not a `Mask`."""
    if isinstance(mask, Mask):
        return mask
    raise ValueError(
        "a mask is made of those in layers/kernels/attention/masks.py, such as Causal() & Window(4096); Dense(array) "
        "makes one of an array, B N T S, and Where(function) one of a function of batch, head, query and key; "
        f"got {reprlib.repr(mask)}"
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    @property
    def band(self) -> Band:
        """No bound."""
        return None, None

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True."""
        return key >= 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Causal(Mask):
    """key <= query."""

    @property
    def band(self) -> Band:
        """No bound to the left."""
        return None, 1

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return key <= query


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window(Mask):
    """query - left < key < query + right: the last `left` keys up to the query's own, and the `right` - 1 after it."""

    left: int = field(metadata=static)
    right: int = field(default=1, metadata=static)

    def __post_init__(self) -> None:
        _check_static("Window", left=self.left, right=self.right)
        if not (1 <= self.left <= POSITIONS and 1 <= self.right <= POSITIONS):
            raise ValueError(
                f"a window contains at least the query's own key: left and right must be 1 or more and at most "
                f"{POSITIONS}, got left={self.left}, right={self.right}; Causal() and Full() have no bound"
            )

    @property
    def band(self) -> Band:
        """The window."""
        return self.left, self.right

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return (key > query - self.left) & (key < query + self.right)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunked(Mask):
    """Query and key lie in the same chunk of `size` positions (Llama 4's local layers)."""

    size: int = field(metadata=static)

    def __post_init__(self) -> None:
        _check_static("Chunked", size=self.size)
        if self.size < 1:
            raise ValueError(f"a chunk has at least 1 position, got size={self.size}")

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return query // jnp.int32(self.size) == key // jnp.int32(self.size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix(Mask):
    """Key lies in the first `lengths` positions, which all queries see: prefix LM is `Causal() | Prefix(lengths)`."""

    lengths: int | Int[Array, ""] | Int[Array, " B"]

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return key < _per_sequence(self.lengths, batch, "Prefix(lengths)")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents(Mask):
    """Query and key belong to the same document; id 0 is padding, which sees no key and is seen by no query.

    `ids` are of all positions, B T; where queries and keys are of different sequences, `key_ids`, B S, are the keys'.
    """

    ids: Int[Array, "B T"]
    key_ids: Int[Array, "B S"] | None = None

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        own = lookup(self.ids, batch, query, axes="B T", name="Documents(ids)", kind="integer")
        keys, name = self.key_ids, "Documents(key_ids)"
        if keys is None:
            keys, name = self.ids, "Documents(ids) without key_ids"
        return (own == lookup(keys, batch, key, axes="B S", name=name, kind="integer")) & (own > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lengths(Mask):
    """The first `queries` positions see the first `keys` keys; None: all of them."""

    queries: int | Int[Array, ""] | Int[Array, " B"] | None = None
    keys: int | Int[Array, ""] | Int[Array, " B"] | None = None

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        seen = key >= 0
        if self.queries is not None:
            seen = seen & (query < _per_sequence(self.queries, batch, "Lengths(queries)"))
        if self.keys is not None:
            seen = seen & (key < _per_sequence(self.keys, batch, "Lengths(keys)"))
        return seen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GlobalTokens(Mask):
    """Query or key is one of the marked positions, which see and are seen by all (Longformer, 2004.05150).

    `marks` is B T, or the number of marked first positions.
    """

    marks: int | Int[Array, ""] | Bool[Array, "B T"]

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        marks: Any = self.marks
        if jnp.ndim(marks) == 0:
            check_kind(marks, "integer", "GlobalTokens(marks), a number of positions,")
            return (query < marks) | (key < marks)
        own = lookup(marks, batch, query, axes="B T", name="GlobalTokens(marks)", kind="bool")
        return own | lookup(marks, batch, key, axes="B S", name="GlobalTokens(marks)", kind="bool")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockSparse(Mask):
    """Block of queries sees block of keys: `table[batch, head, query // size, key // size]` (BigBird, 2007.14062).

    Dimensions B and N of the table are 1 where all sequences or heads share it.
    """

    table: Bool[Array, "B N T S"]
    size: int = field(metadata=static)

    def __post_init__(self) -> None:
        _check_static("BlockSparse", size=self.size)
        if self.size < 1:
            raise ValueError(f"a block has at least 1 position, got size={self.size}")

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        size = jnp.int32(self.size)
        return _table(
            self.table, batch, head, jax.lax.div(query, size), jax.lax.div(key, size), "BlockSparse(table)", self.size
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Mask):
    """A mask that is an array; dimensions B and N are 1 where all sequences or heads share it."""

    array: Bool[Array, "B N T S"]

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return _table(self.array, batch, head, query, key, "Dense(array)", 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Where(Mask):
    """A mask of any traced function of scalar indices: `Where(lambda batch, head, query, key: key % 4 == head)`.

    The function is traced once, with scalars; arrays it closes over may be traced, too.
    """

    function: Callable[[Index, Index, Index, Index], Bool[Array, ""]] = field(metadata=static)

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return _mapped(self.function, batch, head, query, key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysAt(Mask):
    """A mask over positions, for keys out of order: key s is at `positions[b, s]`, or hidden if it is negative."""

    positions: Int[Array, "B S"]
    mask: Mask

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        position = lookup(self.positions, batch, key, axes="B S", name="KeysAt(positions)")
        return (position >= 0) & self.mask.visible(batch, head, query, position)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerHead(Mask):
    """Head h has `masks[choice[h]]`."""

    masks: tuple[Mask, ...]
    choice: tuple[int, ...] = field(metadata=static)

    def __post_init__(self) -> None:
        if not all(0 <= index < len(self.masks) for index in self.choice):
            raise ValueError(f"choice must name one of {len(self.masks)} masks for each head, got {self.choice}")

    @property
    def causal(self) -> bool:
        """Whether all masks are causal."""
        return all(mask.causal for mask in self.masks)

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        chosen = lookup(jnp.asarray(self.choice, jnp.int32), head, axes="N", name="PerHead(choice)")
        seen = key < 0
        for index, mask in enumerate(self.masks):
            seen = seen | ((chosen == index) & mask.visible(batch, head, query, key))
        return seen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Both(Mask):
    """Visible in both masks."""

    left: Mask
    right: Mask

    @property
    def causal(self) -> bool:
        """Whether one of the masks is causal."""
        return self.left.causal or self.right.causal

    @property
    def band(self) -> Band | None:
        """The narrower bound on each side."""
        if self.left.band is None or self.right.band is None:
            return None
        left, right = (
            min((x for x in ends if x is not None), default=None)
            for ends in zip(self.left.band, self.right.band, strict=True)
        )
        return left, right

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return self.left.visible(batch, head, query, key) & self.right.visible(batch, head, query, key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Either(Mask):
    """Visible in one mask or the other."""

    left: Mask
    right: Mask

    @property
    def causal(self) -> bool:
        """Whether both masks are causal."""
        return self.left.causal and self.right.causal

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return self.left.visible(batch, head, query, key) | self.right.visible(batch, head, query, key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Not(Mask):
    """Visible where the other mask is not."""

    mask: Mask

    def visible(self, batch: Index, head: Index, query: Index, key: Index) -> Bool[Array, "..."]:
        """True where `query` sees `key`."""
        return ~self.mask.visible(batch, head, query, key)


def _check_static(name: str, **numbers: Any) -> None:
    """Raises ValueError if a size of a mask is not an integer that is known at trace time."""
    for argument, number in numbers.items():
        try:
            operator.index(number)
        except TypeError as error:
            raise ValueError(
                f"{name}({argument}) must be an integer known when tracing, got {number!r}; Where(function) takes "
                f"traced numbers"
            ) from error


def _per_sequence(number: Any, batch: Index, name: str) -> Any:
    if isinstance(number, list | tuple) or jnp.ndim(number):
        return lookup(number, batch, axes="B", name=name, kind="integer")  # pyright: ignore[reportArgumentType]
    check_kind(number, "integer", name)
    return number


def _table(
    table: Bool[Array, "B N T S"] | np.ndarray,
    batch: Index,
    head: Index,
    query: Index,
    key: Index,
    name: str,
    size: int,
) -> Bool[Array, "..."]:
    """The entry of a table whose first dimensions may be 1."""
    if jnp.ndim(table) != 4:
        raise ValueError(f"{name} must be B N T S, where B and N may be 1, got shape {jnp.shape(table)}")
    letters = ("B" if table.shape[0] > 1 else "1", "N" if table.shape[1] > 1 else "1")
    first = [index if letter != "1" else jnp.int32(0) for letter, index in zip(letters, (batch, head), strict=True)]
    axes = " ".join((*letters, "T", "S"))
    return lookup(table, *first, query, key, axes=axes, name=name, size=size, kind="bool")


def _mapped(function: Callable[..., Array], *arrays: Array) -> Array:
    """Applies a function of scalars to arrays that broadcast."""
    wide = jnp.broadcast_arrays(*arrays)
    if not wide[0].ndim:
        return function(*wide)
    return jax.vmap(function)(*(x.reshape(-1) for x in wide)).reshape(wide[0].shape)

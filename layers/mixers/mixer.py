"""The interface of layers that mix information between tokens."""

import abc
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flax import nnx

from ..positions.positions import Positions as Positions
from ..spec import Spec


@runtime_checkable
class Cache(Protocol):
    """What a mixer stores of earlier tokens: a pytree of arrays whose first axis is the batch."""

    @property
    def max_rewind(self) -> int:
        """How many of the latest tokens a call can discard by starting at an earlier position.

        That is all of them for a cache with a place for every token, and 0 for the state of a recurrence. Whatever it
        is, a call may start again at position 0.
        """
        ...

    def extend(self, *args: Any, **kwargs: Any) -> Any:
        """The cache with the tokens of this call, and what the mixer reads in place of them.

        The arguments are what the mixer computed of the tokens, and their positions.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Mixer(Spec):
    """A token-mixing layer: attention, or any sequence model.

    Its layer is called as `layer(x, positions, cache=None, kind="none")` with x: B T D, and returns (B T D, cache);
    `kind` is the number format of matmuls with weights. With a cache,
    each row is one document or a continuation of one: its positions are consecutive, and the cache holds the tokens
    before the first of them. Padding (segment 0) may follow on the right of a row and is not stored. If a call starts
    at an earlier position, cached tokens from that position on are discarded.

    A cache is valid while the length of its text stays in `equal_lengths`. When it leaves that range, the caller reads
    the text again from position 0 (`Session` does).
    """

    @abc.abstractmethod
    def build(self, dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """The layer for hidden size D = `dim`."""

    @abc.abstractmethod
    def flops(self, dim: int, length: int) -> float:
        """Floating-point operations of one token in the forward pass, averaged over a document of `length` tokens."""

    @abc.abstractmethod
    def cache(self, batch: int, length: int, dtype: Any) -> Cache:
        """An empty cache for `batch` documents of up to `length` tokens.

        `dtype` int8 asks for one that is quantized; a mixer that has none raises NotImplementedError.
        """

    @abc.abstractmethod
    def equal_lengths(self, length: int) -> range:
        """The range of text lengths at which what a layer computes of the same tokens is as at `length`.

        It is `EVERY_LENGTH` unless the layer has a RoPE whose frequencies depend on the length.
        """

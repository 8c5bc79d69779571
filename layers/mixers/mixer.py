"""What a layer that mixes information between tokens offers, whatever it is made of."""

import abc
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from ..kernels.attention.context import Method
from ..spec import Spec

Cache = Any
"""What a mixer remembers of earlier tokens: a pytree of arrays, the batch first."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Where each token stands: its position in its document, and the document it belongs to (0: padding)."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    exchange: Method = field(default="ring", metadata={"static": True})
    """How devices that share a sequence see each other's keys (`context` of `attend`)."""


@dataclass(frozen=True, kw_only=True)
class Mixer(Spec):
    """A token-mixing layer: attention, or any sequence model.

    Its layer is called as `layer(x, places, cache=None)` with x: B T D, and returns (B T D, cache). With a cache, each
    row is one document, or more of one: its positions are consecutive, and the cache has the tokens before the first of
    them. Padding (segment 0) may stand on the right of a row; it is not remembered. A row may go back: tokens from the
    position it goes on at are forgotten.
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

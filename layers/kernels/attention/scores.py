"""Scores: functions that change the logit of a query and a key before the softmax.

A score is any traced function `(score, batch, head, query, key) -> score` of scalars; arrays that it closes over may be
traced and get gradients. Published ones are defined here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .lookup import lookup

Index = Int[Array, "..."]
Score = Callable[[Float[Array, "..."], Index, Index, Index, Index], Float[Array, "..."]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SoftCap:
    """cap tanh(score / cap) (Gemma 2, 2408.00118, section 2)."""

    cap: float = field(metadata={"static": True})

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"a soft cap is above 0, got cap={self.cap}")

    def __call__(self, score: Float[Array, "..."], *_: Index) -> Float[Array, "..."]:
        """The capped score."""
        return self.cap * jnp.tanh(score / self.cap)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Alibi:
    """score - slopes[head] * |query - key| (2108.12409)."""

    slopes: Float[Array, " N"]

    def __call__(
        self, score: Float[Array, "..."], batch: Index, head: Index, query: Index, key: Index
    ) -> Float[Array, "..."]:
        """The biased score."""
        slope = lookup(self.slopes, head, axes="N", name="Alibi(slopes)").astype(jnp.float32)
        return score - slope * jnp.abs(query - key).astype(jnp.float32)

    @classmethod
    def standard(cls, heads: int) -> "Alibi":
        """The paper's slopes: 2^(-8 i / heads) for i = 1 to heads."""
        return cls(2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RelativeBias:
    """score + table[head, bucket(key - query)]; buckets grow with distance (T5, 1910.10683, section 2.1).

    The first half of the buckets of a direction holds one distance each, the rest grows geometrically up to
    `max_distance`; with `bidirectional`, half of all buckets are for keys after the query.
    """

    table: Float[Array, "N R"]
    bidirectional: bool = field(default=False, metadata={"static": True})
    max_distance: int = field(default=128, metadata={"static": True})

    def __call__(
        self, score: Float[Array, "..."], batch: Index, head: Index, query: Index, key: Index
    ) -> Float[Array, "..."]:
        """The biased score."""
        buckets = self.table.shape[1]
        distance = query - key
        start: Any = jnp.int32(0)
        if self.bidirectional:
            buckets //= 2
            start = jnp.where(distance < 0, jnp.int32(buckets), jnp.int32(0))
            distance = jnp.abs(distance)
        distance = jnp.maximum(distance, 0)
        exact = buckets // 2
        if not 0 < exact < self.max_distance:
            raise ValueError(
                f"half of the buckets of a direction, at least 1, must be less than max_distance: got table of shape "
                f"{self.table.shape} with bidirectional={self.bidirectional}, max_distance={self.max_distance}"
            )
        growth = (buckets - exact) / math.log(self.max_distance / exact)
        far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) * growth
        far = jnp.minimum(exact + far.astype(jnp.int32), buckets - 1)
        bucket = start + jnp.where(distance < exact, distance, far)
        return score + lookup(self.table, head, bucket, axes="N R", name="RelativeBias(table)").astype(jnp.float32)

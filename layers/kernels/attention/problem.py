"""The arguments of an implementation of attention: arrays (`Operands`) and all else (`Problem`)."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Int32, Shaped

from . import dropout
from .blocks import Blocks, classify
from .pair_function import PairFunction, Sizes


class Operands(NamedTuple):
    """The arrays of a call of attention."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    mask_hoisted: list[Shaped[Array, "..."]]
    """Hoisted values of the mask (pair_function.py), (B or 1, N or 1, T or S or 1); [] if `Problem` has them."""
    score_hoisted: list[Shaped[Array, "..."]]
    """Hoisted values of the score; those that are floating-point get gradients."""
    dropout_rows: Int32[Array, "B N 1"] | None = None
    query_positions: Int[Array, "..."] | None = None
    """B 1 T, where B may be 1; None where they run from `Problem.query_offset` on."""
    key_positions: Int[Array, "..."] | None = None
    """B 1 S, where B may be 1; None where they run from 0 on."""
    out: Float[Array, "B T N Hv"] | None = None
    """The output of the forward pass, for the backward pass; None where it is merged from several sets of keys."""


@dataclass(eq=False)
class Problem:
    """What is known at trace time."""

    mask: PairFunction
    score: PairFunction | None
    scale: float
    out_dtype: Any
    gradient_dtype: Any = None
    """None: each gradient has the dtype of its array."""
    dropout_rate: float = 0.0
    query_offset: int = 0
    causal: bool = False
    """If true, no query at index i sees a key at an index after i."""
    band: tuple[int | None, int | None] | None = None
    """(left, right) if the mask is query - left < key < query + right (masks.py)."""
    wants_lse: bool = False
    """Whether the logarithms of the sums of exponentials are used."""
    mask_hoisted: list[np.ndarray] | None = None
    """The hoisted values of the mask, if all of them and the positions are known at trace time."""
    context: Any = None
    """A `Context` (context.py) if devices share a sequence."""
    classified: dict[tuple[Any, ...], Blocks] = field(default_factory=dict)

    def sizes(self, operands: Operands) -> Sizes:
        """The numbers of sequences, heads, queries and keys, and the positions."""
        (batch, queries, heads, _), keys = operands.q.shape, operands.k.shape[1]
        query, key = operands.query_positions, operands.key_positions
        return Sizes(
            batch, heads, queries, keys, self.query_offset if query is None else query, 0 if key is None else key
        )

    def mask_values(self, operands: Operands) -> list[Any]:
        """The hoisted values of the mask."""
        return operands.mask_hoisted if self.mask_hoisted is None else self.mask_hoisted

    def blocks(self, operands: Operands, block_q: int, block_k: int, *, transposed: bool = False) -> Blocks:
        """The kinds of all blocks; numpy arrays where they are known at trace time."""
        sizes, kv_heads = self.sizes(operands), operands.k.shape[2]
        if self.mask_hoisted is None:
            return classify(
                self.mask, self.mask_values(operands), sizes, block_q, block_k, kv_heads=kv_heads, transposed=transposed
            )
        key = (block_q, block_k, transposed, sizes, kv_heads)
        blocks = self.classified.get(key) or classify(
            self.mask, self.mask_hoisted, sizes, block_q, block_k, kv_heads=kv_heads, transposed=transposed
        )
        if not isinstance(blocks.words, Tracer):
            self.classified[key] = blocks
        return blocks

    def dropout_factor(
        self, row: Int32[Array, "..."], query: Int[Array, "..."], key: Int[Array, "..."]
    ) -> Float[Array, "..."]:
        """The factor of the weight of a pair under dropout: 0 or 1 / (1 - rate)."""
        kept = dropout.kept(row, query, key, self.dropout_rate)
        return jnp.where(kept, jnp.float32(1 / (1 - self.dropout_rate)), jnp.float32(0))


def differentiable(value: Any) -> bool:
    """Whether a hoisted value of the score gets a gradient."""
    return jnp.issubdtype(value.dtype, jnp.floating)


def gradients_like(problem: Problem, operands: Operands) -> "Gradients":
    """Shapes and dtypes of the gradients."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, problem.gradient_dtype or x.dtype), tangents_of(operands)
    )


Gradients = tuple[Array, Array, Array, list[Array]]
"""Gradients of q, k, v and the differentiable hoisted values of the score."""


def tangents_of(operands: Operands) -> Gradients:
    """The differentiable operands, in the order of `Gradients`."""
    return operands.q, operands.k, operands.v, [x for x in operands.score_hoisted if differentiable(x)]

"""What attention is to be computed, in the form that every implementation takes."""

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
    """The arrays."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    mask_hoisted: list[Shaped[Array, "..."]]
    """Of the mask (pair_function.py), (B or 1, N or 1, T or S or 1); none where they are known now."""
    score_hoisted: list[Shaped[Array, "..."]]
    """Of the score; those that are floating-point get gradients."""
    dropout_rows: Int32[Array, "B N 1"] | None = None
    query_positions: Int[Array, "..."] | None = None
    """B 1 T, where B may be 1; None where they run from `Problem.query_offset` on."""
    key_positions: Int[Array, "..."] | None = None
    """B 1 S, where B may be 1; None where they run from 0 on."""
    out: Float[Array, "B T N Hv"] | None = None
    """The result, for the backward pass; None where it is put together from parts of the keys."""


@dataclass(eq=False)
class Problem:
    """Everything else: what is known now."""

    mask: PairFunction
    score: PairFunction | None
    scale: float
    out_dtype: Any
    gradient_dtype: Any = None
    """None: each gradient has the dtype of its array."""
    dropout_rate: float = 0.0
    query_offset: int = 0
    causal: bool = False
    """A promise that no query at index i sees a key after i."""
    band: tuple[int | None, int | None] | None = None
    """What the mask is where it is only query - left < key < query + right (masks.py)."""
    wants_lse: bool = False
    """Whether the logarithms of the sums are used."""
    mask_hoisted: list[np.ndarray] | None = None
    """The mask's hoisted where all of them, and the positions, are known now."""
    context: Any = None
    """How devices share the sequence (context.py)."""
    known_blocks: dict[tuple[Any, ...], Blocks] = field(default_factory=dict)

    def sizes(self, operands: Operands) -> Sizes:
        """How many of everything."""
        (batch, queries, heads, _), keys = operands.q.shape, operands.k.shape[1]
        query, key = operands.query_positions, operands.key_positions
        return Sizes(
            batch, heads, queries, keys, self.query_offset if query is None else query, 0 if key is None else key
        )

    def hoisted(self, operands: Operands) -> list[Any]:
        """The mask's hoisted."""
        return operands.mask_hoisted if self.mask_hoisted is None else self.mask_hoisted

    def blocks(self, operands: Operands, block_q: int, block_k: int, *, transposed: bool = False) -> Blocks:
        """The kinds of all blocks; numpy arrays where they are known now."""
        sizes, kv_heads = self.sizes(operands), operands.k.shape[2]
        if self.mask_hoisted is None:
            return classify(
                self.mask, self.hoisted(operands), sizes, block_q, block_k, kv_heads=kv_heads, transposed=transposed
            )
        key = (block_q, block_k, transposed, sizes, kv_heads)
        blocks = self.known_blocks.get(key) or classify(
            self.mask, self.mask_hoisted, sizes, block_q, block_k, kv_heads=kv_heads, transposed=transposed
        )
        if not isinstance(blocks.words, Tracer):
            self.known_blocks[key] = blocks
        return blocks

    def kept(self, row: Int32[Array, "..."], query: Int[Array, "..."], key: Int[Array, "..."]) -> Float[Array, "..."]:
        """What dropout multiplies the weight of a pair with: 0 or 1 / (1 - rate)."""
        kept = dropout.kept(row, query, key, self.dropout_rate)
        return jnp.where(kept, jnp.float32(1 / (1 - self.dropout_rate)), jnp.float32(0))


def differentiable(side: Any) -> bool:
    """Whether a side of the score gets a gradient."""
    return jnp.issubdtype(side.dtype, jnp.floating)


def gradients_like(problem: Problem, operands: Operands) -> "Gradients":
    """Shapes and types of the gradients."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, problem.gradient_dtype or x.dtype), tangents_of(operands)
    )


Gradients = tuple[Array, Array, Array, list[Array]]
"""Of q, k, v and the differentiable hoisted of the score."""


def tangents_of(operands: Operands) -> Gradients:
    """What of the operands is differentiable, in the order of `Gradients`."""
    return operands.q, operands.k, operands.v, [side for side in operands.score_hoisted if differentiable(side)]

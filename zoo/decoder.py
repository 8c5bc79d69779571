"""A decoder-only language model: a repeating pattern of blocks between an embedding and a head."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..layers.block import Block
from ..layers.linear.embedding import Embedding, to_logits
from ..layers.mixers.mixer import Cache, Positions
from ..layers.moe.routing import RouterStats
from ..layers.norm import Norm, RMSNorm
from ..layers.sharding import stages
from ..layers.spec import Spec
from ..layers.stack import Execution, StackOutput, build_stacked, scanned, unrolled

Caches = dict[str, Any]
"""The caches of all blocks: `{"stack": one per block of the pattern, "rest": one per remaining block}`."""


def refuse_64_bits() -> None:
    """Raises ValueError if JAX's 64-bit mode is on: it changes the dtypes of positions, parameters and sums."""
    if jax.config.jax_enable_x64:
        raise ValueError(
            "flaxzoo computes in 32 bits and fewer, and JAX's 64-bit mode is on; unset JAX_ENABLE_X64, or call "
            'jax.config.update("jax_enable_x64", False)'
        )


@dataclass(frozen=True, kw_only=True)
class Decoder(Spec):
    """A decoder-only language model.

    Its `layers` blocks repeat the pattern `block`. Complete repeats are stacked and scanned, so that neither the size
    of the program nor its compile time grows with depth. `first` blocks come before the pattern, those of an incomplete
    last repeat after it.
    """

    vocab: int
    dim: int
    layers: int
    block: tuple[Block, ...]
    first: tuple[Block, ...] = ()
    norm: Norm | None = field(default_factory=RMSNorm)
    tied: bool = True
    """The output embedding is the input embedding."""
    max_positions: int = 0
    """Number of learned absolute positions (GPT-2); 0: none."""
    scale_embedding: bool = False
    """Embeddings are multiplied by sqrt(D), as in Gemma."""
    soft_cap: float | None = None
    """Logits become cap tanh(logits / cap) (Gemma 2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.block or self.layers < len(self.first):
            raise ValueError(
                f"a decoder needs a block pattern and at least as many layers as first blocks, got "
                f"{len(self.block)} blocks, layers={self.layers}, {len(self.first)} first blocks"
            )

    @property
    def repeats(self) -> int:
        """The number of complete repeats of the pattern, which are stacked."""
        return (self.layers - len(self.first)) // len(self.block)

    @property
    def rest(self) -> tuple[Block, ...]:
        """The blocks of the incomplete last repeat."""
        return self.block[: (self.layers - len(self.first)) % len(self.block)]

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """Every block in order of depth."""
        return (*self.first, *self.block * self.repeats, *self.rest)

    def unstacked(self) -> "Decoder":
        """The same decoder without stacked blocks."""
        return self.replace(first=self.all_blocks)

    def build(self, *, rngs: nnx.Rngs) -> "DecoderModel":
        """The model with random initial parameters in float32."""
        return DecoderModel(self, rngs=rngs)

    def abstract(self) -> "DecoderModel":
        """The model with shapes instead of arrays; nothing is computed or allocated."""
        return jax.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))

    def flops(self, length: int) -> float:
        """Floating-point operations of one token in the forward pass, averaged over a document of `length` tokens.

        Counts only matmuls and the visible keys of attention, as is usual (2204.02311, appendix B).
        """
        blocks = sum(b.mixer.flops(self.dim, length) + b.ffn.flops(self.dim) for b in self.all_blocks)
        return blocks + 2 * self.dim * self.vocab

    def unused(self) -> int:
        """The number of parameters that a token does not use: those of experts it is not sent to."""
        return sum(block.ffn.unused(self.dim) for block in self.all_blocks)

    def cache(self, batch: int, length: int, dtype: DTypeLike) -> Caches:
        """Empty caches for `batch` documents of up to `length` tokens; `dtype` int8: quantized."""

        def stacked(block: Block) -> Cache:
            cache = block.mixer.cache(batch, length, dtype)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.repeats, *x.shape)), cache)

        rest = [block.mixer.cache(batch, length, dtype) for block in (*self.first, *self.rest)]
        return {"stack": [stacked(block) for block in self.block], "rest": rest}


class HiddenStates(NamedTuple):
    """The result of a forward pass without the output embedding."""

    x: Float[Array, "B T D"]
    """Hidden states after the final norm."""
    caches: Caches | None
    """The caches with the tokens of this call in them; None if none were passed."""
    router_stats: dict[str, RouterStats]
    """Statistics of each router, by the name of its block ("stack.0"); those of stacked blocks have a leading L."""


class DecoderModel(nnx.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, spec: Decoder, *, rngs: nnx.Rngs):
        refuse_64_bits()
        dim, std = spec.dim, 1 / math.sqrt(spec.dim) if spec.scale_embedding else 0.02
        self.spec = spec
        self.embedding = Embedding("V D", spec.vocab, dim, rngs=rngs, std=std)
        self.positions = Embedding("S D", spec.max_positions, dim, rngs=rngs) if spec.max_positions else None
        self.first = nnx.List([block.build(dim, rngs=rngs) for block in spec.first])
        pattern = spec.block if spec.repeats else ()
        self.stack = nnx.List([build_stacked(block, dim, spec.repeats, rngs=rngs) for block in pattern])
        self.rest = nnx.List([block.build(dim, rngs=rngs) for block in spec.rest])
        self.norm = spec.norm.build("D", dim) if spec.norm else None
        self.head = None if spec.tied else Embedding("V D", spec.vocab, dim, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions | None = None,
        caches: Caches | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
    ) -> tuple[Float[Array, "B T V"], Caches | None]:
        """Float32 logits of the next token, and the caches with these tokens in them."""
        x, caches, _ = self.hidden(tokens, positions, caches, dtype=dtype)
        return self.logits(x), caches

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions | None = None,
        caches: Caches | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        execution: Execution = Execution(),
    ) -> HiddenStates:
        """Final hidden states, computed in `dtype`.

        Without `positions`, each row is one document that starts at position 0. Raises ValueError if a row is longer
        than the table of learned positions.
        """
        refuse_64_bits()
        stages.check_none()
        positions = self._positions(tokens, positions, caches)
        x = self._embed(tokens, positions, dtype)
        first_caches, stack_caches, rest_caches = split_caches(caches, len(self.first))
        first = unrolled(self.first, x, positions, first_caches, execution=execution)
        stack = scanned(self.stack, first.x, positions, stack_caches, execution=execution)
        rest = unrolled(self.rest, stack.x, positions, rest_caches, execution=execution)
        router_stats = stats_by_name(first.router_stats, stack.router_stats, rest.router_stats)
        return HiddenStates(self.final_norm(rest.x), join_caches(first, stack, rest), router_stats)

    def split_stack(self) -> tuple["DecoderModel", nnx.List]:
        """The model without its stack, and the stack."""
        outer = jax.tree.map(lambda leaf: leaf, self)
        outer.stack = nnx.List([])
        return outer, self.stack

    def before_stack(
        self, tokens: Int[Array, "B T"], positions: Positions, *, dtype: DTypeLike, execution: Execution
    ) -> StackOutput:
        """Embeds tokens and runs the blocks before the stack."""
        return unrolled(self.first, self._embed(tokens, positions, dtype), positions, execution=execution)

    def after_stack(self, x: Float[Array, "B T D"], positions: Positions, *, execution: Execution) -> StackOutput:
        """Runs the blocks after the stack; the final norm is not applied."""
        return unrolled(self.rest, x, positions, execution=execution)

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalised final hidden states; `x` itself if the model has no final norm."""
        return x if self.norm is None else self.norm(x)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states."""
        logits = to_logits(x, self.output_embedding.astype(x.dtype))
        cap = self.spec.soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def output_embedding(self) -> Float[Array, "V D"]:
        """The matrix that maps hidden states to logits; the input embedding if they are tied."""
        return (self.embedding if self.head is None else self.head).table[...]

    def _positions(self, tokens: Array, positions: Positions | None, caches: Caches | None) -> Positions:
        if positions is not None:
            return positions
        length, limit = tokens.shape[1], self.spec.max_positions
        if self.positions is not None and caches is None and length > limit:
            raise ValueError(f"the model has max_positions={limit} learned positions, got rows of {length} tokens")
        return positions_from_zero(tokens)

    def _embed(self, tokens: Array, positions: Positions, dtype: DTypeLike) -> Float[Array, "B T D"]:
        x = self.embedding(tokens, dtype)
        if self.spec.scale_embedding:
            x = x * jnp.asarray(math.sqrt(self.spec.dim), dtype)
        return x if self.positions is None else x + self.positions(positions.index, dtype)


def positions_from_zero(tokens: Int[Array, "B T"]) -> Positions:
    """Positions of rows that are one document each and start at position 0."""
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=tokens.dtype)
    return Positions(index=positions, segments=jnp.ones_like(tokens))


def split_caches(
    caches: Caches | None, first: int
) -> tuple[list[Cache] | None, list[Cache] | None, list[Cache] | None]:
    """The caches of the `first` blocks, of the stack, and of the blocks after it."""
    return (None, None, None) if caches is None else (caches["rest"][:first], caches["stack"], caches["rest"][first:])


def join_caches(first: StackOutput, stack: StackOutput, rest: StackOutput) -> Caches | None:
    """The inverse of `split_caches`, for the caches of results."""
    if first.caches is None or stack.caches is None or rest.caches is None:
        return None
    return {"stack": stack.caches, "rest": first.caches + rest.caches}


def stats_by_name(
    first: Sequence[RouterStats | None], stack: Sequence[RouterStats | None], rest: Sequence[RouterStats | None]
) -> dict[str, RouterStats]:
    """Router statistics by the names of their blocks in the parameters."""
    groups = {"first": first, "stack": stack, "rest": rest}
    return {
        f"{group}.{index}": stats
        for group, blocks in groups.items()
        for index, stats in enumerate(blocks)
        if stats is not None
    }

"""The decoder: a language model made of a repeating pattern of blocks."""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ..layers.block import Block
from ..layers.linear.linear import Embedding, to_logits
from ..layers.mixers.mixer import Cache, Positions
from ..layers.moe.routing import Routing
from ..layers.norm import Norm, RMSNorm
from ..layers.sharding import stages
from ..layers.spec import Spec

Remat = Literal["none", "full", "dots", "dots_no_batch", "full_offload", "dots_offload"]


def all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """A remat policy: what devices gathered from each other for a product, they gather again for its gradient."""
    return primitive.name != "all_gather" and parameters.get("name") != "gathered"


def _offloaded(*names: str) -> Any:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


POLICIES = {
    "none": all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names("product", "attention")
    ),
    "dots_no_batch": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("product"),
    ),
    "full_offload": _offloaded("stream"),
    "dots_offload": _offloaded("stream", "product", "attention"),
}
"""What the backward pass of a block keeps, by name; "none" computes nothing again, but gathers weights.

The last two keep what "full" and "dots" do in the memory of the host: inputs of blocks, products, attention.
"""

Caches = dict[str, Any]
"""The caches of all blocks: `{"stack": one per block of the pattern, "rest": one per remaining block}`."""


@dataclass(frozen=True, kw_only=True)
class Decoder(Spec):
    """A decoder-only language model.

    Its `layers` blocks repeat the pattern `block`; whole repeats are stacked and scanned, so that neither the program
    nor the time to compile it grows with depth. `first` blocks stand before the pattern, an incomplete last repeat
    after it.
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
    """Rows of a learned table of absolute positions (GPT-2); 0: none."""
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
        """How many whole repeats of the pattern are stacked."""
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
        """The same decoder with none of its blocks stacked."""
        return self.replace(first=self.all_blocks)

    def build(self, *, rngs: nnx.Rngs) -> "DecoderModel":
        """The model with fresh parameters, float32."""
        return DecoderModel(self, rngs=rngs)

    def abstract(self) -> "DecoderModel":
        """The model with shapes in place of arrays: nothing is computed or stored."""
        return jax.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))

    def flops(self, length: int) -> float:
        """Floating-point operations of one token in the forward pass, averaged over a document of `length` tokens.

        Matmuls and attention only, as is the custom (2204.02311, appendix B); attention counts visible keys.
        """
        blocks = sum(b.mixer.flops(self.dim, length) + b.ffn.flops(self.dim) for b in self.all_blocks)
        return blocks + 2 * self.dim * self.vocab

    def unused(self) -> int:
        """How many parameters take no part in what becomes of a token: those of experts it does not go to."""
        return sum(block.ffn.unused(self.dim) for block in self.all_blocks)

    def cache(self, batch: int, length: int, dtype: Any) -> Caches:
        """Empty caches for `batch` documents of up to `length` tokens; `dtype` int8: quantized."""

        def stacked(block: Block) -> Cache:
            one = block.mixer.cache(batch, length, dtype)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.repeats, *x.shape)), one)

        rest = [block.mixer.cache(batch, length, dtype) for block in (*self.first, *self.rest)]
        return {"stack": [stacked(block) for block in self.block], "rest": rest}


class DecoderModel(nnx.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, spec: Decoder, *, rngs: nnx.Rngs):
        def stack(block: Block) -> nnx.Module:
            keys = jax.random.split(rngs.params(), spec.repeats)
            return jax.vmap(lambda key: block.build(spec.dim, rngs=nnx.Rngs(key)))(keys)

        self.spec = spec
        std = 0.02 if not spec.scale_embedding else 1 / math.sqrt(spec.dim)
        self.embedding = Embedding("V D", spec.vocab, spec.dim, rngs=rngs, std=std)
        self.positions = Embedding("S D", spec.max_positions, spec.dim, rngs=rngs) if spec.max_positions else None
        self.first = nnx.List([block.build(spec.dim, rngs=rngs) for block in spec.first])
        self.stack = nnx.List([stack(block) for block in spec.block] if spec.repeats else [])
        self.rest = nnx.List([block.build(spec.dim, rngs=rngs) for block in spec.rest])
        self.norm = spec.norm.build("D", spec.dim) if spec.norm else None
        self.head = None if spec.tied else Embedding("V D", spec.vocab, spec.dim, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions | None = None,
        caches: Caches | None = None,
        *,
        dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "B T V"], Caches | None]:
        """Float32 logits of the next token, and the caches with these tokens in them."""
        x, caches = self.hidden(tokens, positions, caches, dtype=dtype)
        return self.logits(x), caches

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions | None = None,
        caches: Caches | None = None,
        *,
        dtype: Any = jnp.float32,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B T D"], Caches | None]:
        """Final hidden states, computed in `dtype`, and the caches with these tokens in them.

        Without `positions`, each row is one document from position 0 on. Raises ValueError where it is longer than the
        table of learned positions.
        """
        return self.hidden_and_routing(tokens, positions, caches, dtype=dtype, remat=remat)[:2]

    def hidden_and_routing(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions | None = None,
        caches: Caches | None = None,
        *,
        dtype: Any = jnp.float32,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B T D"], Caches | None, dict[str, Routing]]:
        """What `hidden` gives, and what each router did, by the name of its block in the parameters ("stack.0").

        That of a stack has a leading axis L.
        """
        stages.check_none()
        if self.positions is not None and positions is None and caches is None:
            _check_positions(tokens.shape[1], self.spec.max_positions)
        positions = positions_from_zero(tokens) if positions is None else positions
        x = self._embedded(tokens, positions, dtype)
        count = len(self.first)
        rest = [] if caches is None else caches["rest"]
        x, first, first_done = self._unrolled(list(self.first), x, positions, rest[:count], remat)
        x, stack, stack_done = self._scanned(x, positions, None if caches is None else caches["stack"], remat)
        x, last, last_done = self._unrolled(list(self.rest), x, positions, rest[count:], remat)
        caches = None if caches is None else {"stack": stack, "rest": first + last}
        return self.normed(x), caches, routing_by_name(first_done, stack_done, last_done)

    def apart(self) -> tuple["DecoderModel", nnx.List]:
        """The model without its stack, and the stack."""
        outer = jax.tree.map(lambda leaf: leaf, self)
        outer.stack = nnx.List([])
        return outer, self.stack

    def enter(
        self, tokens: Int[Array, "B T"], positions: Positions, *, dtype: Any, remat: Remat
    ) -> tuple[Float[Array, "B T D"], list[Routing | None]]:
        """What comes before the stack, and what the routers there did."""
        x, _, done = self._unrolled(list(self.first), self._embedded(tokens, positions, dtype), positions, None, remat)
        return x, done

    def leave(
        self, x: Float[Array, "B T D"], positions: Positions, *, remat: Remat
    ) -> tuple[Float[Array, "B T D"], list[Routing | None]]:
        """What comes after the stack, before the final norm, and what the routers there did."""
        x, _, done = self._unrolled(list(self.rest), x, positions, None, remat)
        return x, done

    def normed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Final hidden states."""
        return x if self.norm is None else self.norm(x)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states."""
        logits = to_logits(x, self.output_embedding.astype(x.dtype))
        cap = self.spec.soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def output_embedding(self) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits: the input embedding where they are tied."""
        return (self.embedding if self.head is None else self.head).table[...]

    def _embedded(self, tokens: Array, positions: Positions, dtype: Any) -> Array:
        x = self.embedding(tokens, dtype)
        if self.spec.scale_embedding:
            x = x * jnp.asarray(math.sqrt(self.spec.dim), dtype)
        return x if self.positions is None else x + self.positions(positions.index, dtype)

    def _unrolled(
        self, blocks: list[Any], x: Array, positions: Positions, caches: list[Any] | None, remat: Remat
    ) -> tuple[Array, list[Any], list[Routing | None]]:
        after, done = [], []
        for block, cache in zip(blocks, caches or [None] * len(blocks), strict=True):
            x, *rest = _checkpointed(_apply, remat, scanned=False)(block, x, positions, cache)
            after.append(rest[0])
            done.append(rest[1])
        return x, after, done

    def _scanned(
        self, x: Array, positions: Positions, caches: list[Any] | None, remat: Remat
    ) -> tuple[Array, list[Any] | None, list[Routing | None]]:
        if not self.spec.repeats:
            return x, caches, []

        def step(x: Array, layer: tuple[Any, Any]) -> tuple[Array, Any]:
            x, *rest = repeat(*layer, x, positions, remat)
            return x, rest

        x, (after, done) = jax.lax.scan(step, x, (self.stack, caches))
        return x, after, done


def repeat(
    blocks: Any, caches: list[Any] | None, x: Float[Array, "B T D"], positions: Positions, remat: Remat
) -> tuple[Float[Array, "B T D"], list[Any] | None, list[Routing | None]]:
    """One repeat of the pattern, inside a scan: x after it, the caches, and what its routers did."""

    def apply(blocks: Any, caches: list[Any] | None, x: Array, positions: Positions) -> tuple[Array, Any, Any]:
        after, done = [], []
        for block, cache in zip(blocks, caches or [None] * len(blocks), strict=True):
            x, *rest = _apply(block, x, positions, cache)
            after.append(rest[0])
            done.append(rest[1])
        return x, None if caches is None else after, done

    return _checkpointed(apply, remat, scanned=True)(blocks, caches, x, positions)


def routing_by_name(
    first: list[Routing | None], stack: list[Routing | None], rest: list[Routing | None]
) -> dict[str, Routing]:
    """What routers did, by the names of their blocks in the parameters."""
    done = {"first": first, "stack": stack, "rest": rest}
    return {f"{where}.{i}": one for where, each in done.items() for i, one in enumerate(each) if one is not None}


def _check_positions(length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(f"the model has max_positions={limit} learned positions, got rows of {length} tokens")


def positions_from_zero(tokens: Int[Array, "B T"]) -> Positions:
    """Each row one document from position 0 on."""
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=tokens.dtype)
    return Positions(index=positions, segments=jnp.ones_like(tokens))


def _apply(
    block: Any, x: Array, positions: Positions, cache: Cache | None
) -> tuple[Array, Cache | None, Routing | None]:
    return block(checkpoint_name(x, "stream"), positions, cache)


def _checkpointed(function: Any, remat: Remat, *, scanned: bool) -> Any:
    """Outside a scan, XLA would find what is computed twice, and store it after all, if it were not prevented."""
    if remat == "none" and jax.sharding.get_abstract_mesh().size <= 1:
        return function  # nothing is gathered
    # JAX keeps what it traced of a function: a new one each time, for what is asked for around it may differ.
    function = functools.partial(function)
    return jax.checkpoint(function, policy=POLICIES[remat], prevent_cse=not scanned)

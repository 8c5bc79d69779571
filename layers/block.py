"""A block: a mixer and a feed-forward layer around a residual stream."""

from dataclasses import dataclass, field
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float

from .linear.matmul import Kind
from .mixers.mixer import Cache, Mixer, Positions
from .mlp import FeedForward
from .moe.routing import RouterStats
from .norm import Norm, RMSNorm
from .spec import Spec

Placement = Literal["pre", "post", "output", "sandwich", "parallel"]


@dataclass(frozen=True, kw_only=True)
class Block(Spec):
    """A mixer and a feed-forward layer on one residual stream x.

    Placement of the norms, with f either layer:
    pre: x + f(norm(x)) (GPT-2, Llama); post: norm(x + f(x)) (1706.03762); output: x + norm(f(x)) (OLMo 2);
    sandwich: x + norm(f(norm(x))) (Gemma 2); parallel: x + mixer(norm(x)) + ffn(norm(x)) (GPT-J, PaLM).
    """

    mixer: Mixer
    ffn: FeedForward
    norm: Norm = field(default_factory=RMSNorm)
    placement: Placement = "pre"

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "BlockLayer":
        """The block for hidden size D = `dim`."""
        return BlockLayer(self, dim, rngs=rngs)


class BlockLayer(nnx.Module):
    """One block of a decoder."""

    def __init__(self, spec: Block, dim: int, *, rngs: nnx.Rngs):
        before = spec.placement in ("pre", "sandwich", "parallel")
        after = spec.placement in ("post", "output", "sandwich")
        parallel = spec.placement == "parallel"
        self.spec = spec
        self.mixer_norm = spec.norm.build("D", dim) if before else None
        self.mixer = spec.mixer.build(dim, rngs=rngs)
        self.mixer_output_norm = spec.norm.build("D", dim) if after else None
        self.ffn_norm = spec.norm.build("D", dim) if before and not parallel else None
        self.ffn = spec.ffn.build(dim, rngs=rngs)
        self.ffn_output_norm = spec.norm.build("D", dim) if after else None

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: Cache | None = None, *, kind: Kind = "none"
    ) -> tuple[Float[Array, "B T D"], Cache | None, RouterStats | None]:
        """The residual stream after this block, the mixer's cache, and the statistics of the router, if there is one.

        `kind` is the number format of the matmuls with weights.
        """
        normed = x if self.mixer_norm is None else self.mixer_norm(x)
        mixed, cache = self.mixer(normed, positions, cache, kind=kind)
        if self.spec.placement == "parallel":
            y, router_stats = self._feed_forward(normed, positions, kind)
            return x + mixed + y, cache, router_stats
        x = self._join(x, mixed, self.mixer_output_norm)
        y, router_stats = self._feed_forward(x if self.ffn_norm is None else self.ffn_norm(x), positions, kind)
        return self._join(x, y, self.ffn_output_norm), cache, router_stats

    def _feed_forward(self, x: Array, positions: Positions, kind: Kind) -> tuple[Array, RouterStats | None]:
        return self.ffn(x, positions, kind=kind) if self.spec.ffn.routed else (self.ffn(x, kind=kind), None)

    def _join(self, x: Array, branch: Array, norm: nnx.Module | None) -> Array:
        if norm is None:
            return x + branch
        return norm(x + branch) if self.spec.placement == "post" else x + norm(branch)

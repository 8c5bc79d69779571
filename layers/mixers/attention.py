"""Multi-head, grouped-query and multi-query attention."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..kernels.attention import attend
from ..kernels.attention.masks import Causal, Documents, Mask, Window
from ..kernels.attention.scores import SoftCap
from ..linear.linear import Linear, apply_linears
from ..linear.matmul import Kind
from ..norm import Norm
from ..positions.rope import Rope
from ..positions.scaling import EVERY_LENGTH
from ..sharding.axes import context_axis, parameter
from .caches import KeyValueCache
from .mixer import Mixer, Positions


@dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    """Causal attention with N query heads on K key/value heads of dim H: MHA (K = N), GQA (2305.13245), MQA (K = 1)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None = field(default_factory=Rope)
    bias: bool = False
    """Biases on queries, keys and values."""
    output_bias: bool = False
    qk_norm: Norm | None = None
    """Normalisation of each query and key head (2302.05442)."""
    qk_norm_joint: bool = False
    """All query heads of a token are normalised together, and all key heads (OLMo 2, 2501.00656)."""
    window: int | None = None
    """Number of latest tokens that a query sees, its own included; None: all."""
    soft_cap: float | None = None
    """Logits become cap tanh(logits / cap)."""
    sinks: bool = False
    """A learned logit per head that draws attention to nothing."""
    scale: float | None = None
    """Scale of the logits; by default 1 / sqrt(H)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "kv_heads", "head_dim", "window"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if self.qk_norm_joint and self.qk_norm is None:
            raise ValueError("qk_norm_joint=True needs a qk_norm, got qk_norm=None")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"query heads must be a multiple of key/value heads, got heads={self.heads}, kv_heads={self.kv_heads}"
            )

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "AttentionLayer":
        """The layer for hidden size D = `dim`."""
        return AttentionLayer(self, dim, rngs=rngs)

    def flops(self, dim: int, length: int) -> float:
        """Floating-point operations of one token in the forward pass, averaged over a document of `length` tokens."""
        projections = 2 * dim * self.head_dim * 2 * (self.heads + self.kv_heads)
        seen = min(self.window or length, length)
        keys = seen * (length - (seen - 1) / 2) / length
        return projections + 4 * keys * self.heads * self.head_dim

    def cache(self, batch: int, length: int, dtype: Any) -> KeyValueCache:
        """Keys and values of every token; with a window, a ring."""
        return KeyValueCache.empty(batch, length, self.kv_heads, self.head_dim, dtype, self.window)

    def equal_lengths(self, length: int) -> range:
        """See `Mixer.equal_lengths`."""
        return EVERY_LENGTH if self.rope is None else self.rope.equal_lengths(length)


class AttentionLayer(nnx.Module):
    """Projections to queries, keys and values, RoPE, attention and the output projection."""

    same_input: ClassVar = ("query", "key", "value")
    """Linear maps that `zoo.optimize_for_decoding` may fuse."""

    def __init__(self, spec: Attention, dim: int, *, rngs: nnx.Rngs):
        sizes = {"D": dim, "N": spec.heads, "K": spec.kv_heads, "H": spec.head_dim}
        self.spec = spec
        self.query = Linear("D -> N H", sizes, rngs=rngs, bias=spec.bias)
        self.key = Linear("D -> K H", sizes, rngs=rngs, bias=spec.bias)
        self.value = Linear("D -> K H", sizes, rngs=rngs, bias=spec.bias)
        self.output = Linear("N H -> D", sizes, rngs=rngs, bias=spec.output_bias)
        self.query_norm, self.key_norm = (self._norm(letter, sizes) for letter in "NK")
        self.sinks = parameter("N", jnp.zeros(spec.heads)) if spec.sinks else None

    def _norm(self, heads: str, sizes: dict[str, int]) -> nnx.Module | None:
        axes = f"{heads} H" if self.spec.qk_norm_joint else "H"
        return None if self.spec.qk_norm is None else self.spec.qk_norm.build(axes, *(sizes[a] for a in axes.split()))

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: KeyValueCache | None = None, *, kind: Kind = "none"
    ) -> tuple[Float[Array, "B T D"], KeyValueCache | None]:
        """The layer's output in the dtype of `x`, and the cache with this call's keys and values written into it."""
        spec = self.spec
        query, key, value = apply_linears((self.query, self.key, self.value), x, kind=kind)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if spec.rope is not None:
            query, key = spec.rope(query, positions), spec.rope(key, positions)
        mask: Mask = Causal() if spec.window is None else Causal() & Window(spec.window)
        start: Any = 0
        if cache is None:
            mask = mask & Documents(positions.segments)
        else:
            start = positions.index[:, 0]
            cache, key, value, mask = cache.extend(key, value, positions, mask)
        mixed = attend(
            query,
            key,
            value,
            mask=mask,
            score=None if spec.soft_cap is None else SoftCap(spec.soft_cap),
            sinks=None if self.sinks is None else self.sinks[...],
            scale=spec.scale,
            query_offset=start,
            context_axis=context_axis(query),
            context=positions.context_method,
        )
        return self.output(mixed, kind=kind), cache

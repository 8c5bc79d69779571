"""Multi-head latent attention: keys and values of all heads from one small vector a token."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..kernels.attention import attend
from ..kernels.attention.masks import Causal, Documents, Mask
from ..linear.einsum import einsum
from ..linear.expand import expand
from ..linear.linear import Linear
from ..linear.matmul import Kind
from ..norm import Norm, RMSNorm
from ..positions.rope import Rope
from ..positions.scaling import YarnScaling, yarn_mscale
from ..sharding.axes import context_axis, shards, spec_of, split_as
from ..sharding.collectives import between_norms
from .caches import LatentCache
from .mixer import Mixer, Positions


@dataclass(frozen=True, kw_only=True)
class MLA(Mixer):
    """Causal attention whose keys and values are linear in a latent vector of `kv_rank` (DeepSeek-V2, 2405.04434, 2.1).

    c = norm(x W_down); per head, key = [c W_key, r] and value = c W_value, where r (`rope_dim`) carries the position
    and is shared by the heads; queries likewise, through a latent vector of their own if there is a `query_rank`. Only
    c and r are cached: `kv_rank + rope_dim` numbers a token, whatever the number of heads.

    Keys and values can be computed and attended to (expanded); or, since q (c W_key)^T = (q W_key^T) c^T, queries are
    moved into the space of c, which is then the one key and value of all heads, and the result goes through W_value
    (absorbed). Both give the same; `absorbs` says which costs less.
    """

    heads: int
    kv_rank: int
    nope_dim: int
    """Dim of a query and key head without position."""
    rope_dim: int
    value_dim: int
    query_rank: int | None = None
    rope: Rope = field(default_factory=lambda: Rope(interleaved=True))
    norm: Norm = field(default_factory=RMSNorm)
    """Norm of the latent vectors."""
    bias: bool = False
    """Biases on the projections to latent vectors and on the output."""
    scale: float | None = None
    """Scale of the logits; by default 1 / sqrt(nope_dim + rope_dim), times `yarn_mscale(factor, mscale_all_dim)^2` of a
    RoPE that YaRN scales."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "kv_rank", "nope_dim", "rope_dim", "value_dim", "query_rank"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")

    @property
    def logit_scale(self) -> float:
        """Factor of the products of queries and keys."""
        if self.scale is not None:
            return self.scale
        scaling, temperature = self.rope.scaling, 1.0
        if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
            temperature = yarn_mscale(scaling.factor, scaling.mscale_all_dim)
        return temperature**2 / math.sqrt(self.nope_dim + self.rope_dim)

    def absorbs(self, queries: int, keys: int) -> bool:
        """Whether T queries that look at a cache of S tokens take fewer products absorbed than expanded.

        One token that is decoded does; a long prompt does not. Without a cache, as in training, it is always expanded.
        """
        moved = self.kv_rank * (self.nope_dim + self.value_dim)
        expanded = keys * moved + queries * keys * (self.nope_dim + self.rope_dim + self.value_dim)
        absorbed = queries * moved + queries * keys * (2 * self.kv_rank + self.rope_dim)
        return absorbed < expanded

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "MLALayer":
        """The layer for hidden size D = `dim`."""
        return MLALayer(self, dim, rngs=rngs)

    def flops(self, dim: int, length: int) -> float:
        """Floating-point operations of one token in the forward pass, averaged over a document of `length` tokens."""
        key_dim, rank = self.nope_dim + self.rope_dim, self.query_rank
        queries = dim * self.heads * key_dim if rank is None else rank * (dim + self.heads * key_dim)
        latent = dim * (self.kv_rank + self.rope_dim)
        expanded = self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        output = self.heads * self.value_dim * dim
        seen = (length + 1) / 2
        return 2 * (queries + latent + expanded + output + seen * self.heads * (key_dim + self.value_dim))

    def cache(self, batch: int, length: int, dtype: Any) -> LatentCache:
        """For each token c and r. Raises NotImplementedError for int8."""
        return LatentCache.empty(batch, length, self.kv_rank + self.rope_dim, dtype)

    def equal_lengths(self, length: int) -> range:
        """See `Mixer.equal_lengths`."""
        return self.rope.equal_lengths(length)


class MLALayer(nnx.Module):
    """Projections down to the latent vectors and up from them, attention and the way back."""

    def __init__(self, spec: MLA, dim: int, *, rngs: nnx.Rngs):
        rank = spec.query_rank
        query_sizes = {"D": dim, "R": rank or 0, "N": spec.heads, "H": spec.nope_dim + spec.rope_dim}
        self.spec = spec
        self.query_down = Linear("D -> R", query_sizes, rngs=rngs, bias=spec.bias) if rank else None
        self.query_norm = spec.norm.build("R", rank) if rank else None
        self.query = Linear("R -> N H" if rank else "D -> N H", query_sizes, rngs=rngs)
        self.latent = Linear("D -> R", {"D": dim, "R": spec.kv_rank + spec.rope_dim}, rngs=rngs, bias=spec.bias)
        self.latent_norm = spec.norm.build("R", spec.kv_rank)
        up_sizes = {"R": spec.kv_rank, "N": spec.heads, "H": spec.nope_dim + spec.value_dim}
        self.key_value = Linear("R -> N H", up_sizes, rngs=rngs)
        output_sizes = {"N": spec.heads, "H": spec.value_dim, "D": dim}
        self.output = Linear("N H -> D", output_sizes, rngs=rngs, bias=spec.bias)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, cache: LatentCache | None = None, *, kind: Kind = "none"
    ) -> tuple[Float[Array, "B T D"], LatentCache | None]:
        """The layer's output in the dtype of `x`, and the cache with this call's latent vectors written into it."""
        spec = self.spec
        query, latent = self._query(x, positions, kind), self._latent(x, positions, kind)
        mask: Mask = Causal()
        attend_to = partial(self._expanded, kind=kind)
        options: dict[str, Any] = {"context_axis": context_axis(query), "context": positions.context_method}
        if cache is None:
            mask = mask & Documents(positions.segments)
        else:
            options["query_offset"] = positions.index[:, 0]
            cache, latent = cache.extend(latent, positions)
            if spec.absorbs(x.shape[1], latent.shape[1]):
                attend_to = self._absorbed
        mixed = attend_to(query, latent, mask=mask, scale=spec.logit_scale, **options)
        return self.output(mixed, kind=kind), cache

    def _query(self, x: Array, positions: Positions, kind: Kind) -> Float[Array, "B T N H"]:
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x, kind=kind))
        query = self.query(x, kind=kind)
        plain, turned = jnp.split(query, [self.spec.nope_dim], axis=-1)
        return jnp.concatenate([plain, self.spec.rope(turned, positions)], axis=-1)

    def _latent(self, x: Array, positions: Positions, kind: Kind) -> Float[Array, "B T 1 H"]:
        """What is cached, [c, r]."""
        plain, turned = jnp.split(between_norms(self.latent(x, kind=kind)), [self.spec.kv_rank], axis=-1)
        turned = self.spec.rope(turned[:, :, None], positions)
        return jnp.concatenate([self.latent_norm(plain)[:, :, None], turned], axis=-1)

    def _expanded(self, query: Array, latent: Array, *, kind: Kind, **options: Any) -> Float[Array, "B T N H"]:
        plain, turned = jnp.split(latent, [self.spec.kv_rank], axis=-1)
        key, value = jnp.split(self.key_value(plain[:, :, 0], kind=kind), [self.spec.nope_dim], axis=-1)
        key = jnp.concatenate([key, _of_heads(turned, self.spec.heads, query)], axis=-1)
        return attend(query, key, value, **options)

    def _absorbed(self, query: Array, latent: Array, **options: Any) -> Float[Array, "B T N H"]:
        spec = self.spec
        to_key, to_value = jnp.split(self.key_value.matrix(query.dtype), [spec.nope_dim], axis=-1)
        plain, turned = jnp.split(query, [spec.nope_dim], axis=-1)
        query = jnp.concatenate([einsum("B T N H, R N H -> B T N R", plain, to_key), turned], axis=-1)
        # Where heads are split over a mesh, each device has the one key and value head.
        key = _of_heads(latent, shards(query, 2), query)
        value = key[..., : spec.kv_rank]
        mixed = attend(query, key, value, **options)
        return einsum("B T N R, R N H -> B T N H", mixed, to_value)


def _of_heads(x: Float[Array, "B S 1 H"], heads: int, like: Array) -> Float[Array, "B S K H"]:
    """`x`, B S 1 H, once for each head, with heads split as those of `like`."""
    split = split_as(*spec_of(x)[:2], spec_of(like)[2], None)
    shape = (*x.shape[:2], heads, x.shape[3])
    function = partial(jax.lax.broadcast_in_dim, shape=shape, broadcast_dimensions=(0, 1, 2, 3), out_sharding=split)
    return expand(function, x, dtype=x.dtype)

"""Mixtures of experts: each token is computed by a few of many feed-forward layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ..kernels.grouped.matmul import grouped_product
from ..linear.expand import expand
from ..linear.matmul import Kind
from ..mixers.mixer import Positions
from ..mlp import MLP, FeedForward, GatedMLP
from ..sharding.axes import AXES, names_of, parameter, spec, spec_of, time_after, used_axes
from ..sharding.collectives import gather_shard, reduce_shard
from .exchange import Exchange, dispatched
from .routing import Router, RouterLayer, RouterStats


@dataclass(frozen=True, kw_only=True)
class MoE(FeedForward):
    """y = shared(x) + the sum over the chosen experts e of weight_e expert_e(x) (1701.06538).

    No token is dropped, whatever the loads (2211.15841). Many small experts and shared ones: 2401.06066.
    """

    routed: ClassVar[bool] = True

    experts: int
    expert: MLP | GatedMLP
    """The layer of each expert."""
    router: Router
    shared: MLP | GatedMLP | None = None
    """A layer applied to every token; n shared experts are one that is n times as wide."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.router.check(self.experts)

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "MoELayer":
        """The layer for hidden size D = `dim`."""
        return MoELayer(self, dim, rngs=rngs)

    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass: those of the experts it goes to."""
        shared = 0 if self.shared is None else self.shared.flops(dim)
        return 2 * dim * self.experts + self.router.top_k * self.expert.flops(dim) + shared

    def unused(self, dim: int) -> int:
        """The number of parameters of experts that a token is not sent to."""
        expert = jax.eval_shape(lambda: self.expert.build(dim, rngs=nnx.Rngs(0)))
        return (self.experts - self.router.top_k) * sum(x.size for x in jax.tree.leaves(expert))


class MoELayer(nnx.Module):
    """A router, experts, and an optional layer that all tokens share."""

    def __init__(self, spec: MoE, dim: int, *, rngs: nnx.Rngs):
        def linear(axes: str, sizes: Mapping[str, int], *, rngs: nnx.Rngs, bias: bool) -> ExpertLinear:
            return ExpertLinear(axes, {"E": spec.experts, **sizes}, rngs=rngs, bias=bias)

        self.spec = spec
        self.router = RouterLayer(spec.router, dim, spec.experts, rngs=rngs)
        self.experts = spec.expert.build(dim, rngs=rngs, linear=linear)
        self.shared = None if spec.shared is None else spec.shared.build(dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, *, kind: Kind = "none"
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """The layer's output in the dtype of `x`, and the statistics of the router over tokens that are not padding.

        Raises NotImplementedError for 8-bit matmuls, which experts do not have.
        """
        if kind != "none":
            raise NotImplementedError(f"experts have no matmuls in 8 bits, got kind={kind!r}")
        chosen, weights, router_stats = self.router(x, (positions.segments != 0).astype(jnp.float32))
        y = self._mixed(x, chosen, weights)
        return y if self.shared is None else y + self.shared(x), router_stats

    def _mixed(self, x: Array, chosen: Array, weights: Array) -> Array:
        """The weighted sum of the chosen experts. On a mesh, rows are sent to the devices of their experts."""
        leaves, tree = jax.tree.flatten(self.experts)
        # Biases stay as they are: their gradients are summed over devices too.
        leaves = [leaf.astype(x.dtype) if leaf.ndim > 2 else leaf for leaf in leaves]
        specs, x_spec = [spec_of(leaf) for leaf in leaves], spec_of(x)
        if jax.sharding.get_abstract_mesh().empty:
            return dispatched(tree.unflatten(leaves), x, chosen, weights)
        used = [(each[0], *map(used_axes, each[1:])) for each in specs]
        over = max((names for each in used for names in each[1:]), key=len)
        time = tuple(name for name in names_of(x_spec[1]) if name not in over)
        mixture = Exchange(names_of(specs[0][0]), names_of(x_spec[0]))

        def local(leaves: list[Array], *tokens: Array) -> Array:
            leaves = [gather_shard(leaf, *each) for leaf, *each in zip(leaves, specs, used, strict=True)]
            tokens = tuple(gather_shard(each, x_spec, (x_spec[0], time, None)) for each in tokens)
            return reduce_shard(mixture(tree.unflatten(leaves), tokens), over, 1)

        placement = spec(*x_spec)
        out = spec(x_spec[0], time_after(time, x.shape[1], over), None)
        in_specs = [spec(*each) for each in specs], placement, placement, placement
        mapped = jax.shard_map(local, in_specs=in_specs, out_specs=out, check_vma=False)
        return mapped(leaves, x, chosen, weights)


class ExpertLinear(nnx.Module):
    """y_m = x_m W_e + b_e for rows in order of their experts e: `ExpertLinear("D -> F", {"E": 8, "D": 6, "F": 9})`.

    Each W_e starts normal with standard deviation 1 / sqrt of the input size, b at zero. On a shard of the input axis,
    as inside `jax.shard_map`, it computes a partial sum.
    """

    def __init__(self, axes: str, sizes: Mapping[str, int], *, rngs: nnx.Rngs, bias: bool):
        self.input, self.output = (side.strip() for side in axes.split("->"))
        shape = sizes["E"], sizes[self.input], sizes[self.output]
        self.input_size = sizes[self.input]
        value = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(self.input_size)
        self.weight = parameter(f"E {self.input} {self.output}", value, inputs=1)
        self.bias = parameter(f"E {self.output}", jnp.zeros((shape[0], shape[2]))) if bias else None

    def __call__(self, x: Float[Array, "M D"], sizes: Int[Array, " E"], *, kind: Kind = "none") -> Float[Array, "M F"]:
        """Maps rows, the first `sizes` of each expert, in the dtype of `x`; the values of later rows are undefined.

        Raises NotImplementedError for 8-bit matmuls.
        """
        if kind != "none":
            raise NotImplementedError(f"experts have no matmuls in 8 bits, got kind={kind!r}")
        weight = self.weight[...].astype(x.dtype)
        # Remat policies save y by this name, as in `Linear`.
        y = checkpoint_name(grouped_product(x, weight, sizes), "product")
        if self.bias is None:
            return y
        return y + expand(partial(self._bias_rows, x.shape[0]), self.bias[...], sizes, dtype=x.dtype)

    def _bias_rows(self, rows: int, bias: Float[Array, "E F"], sizes: Int[Array, " E"]) -> Float[Array, "M F"]:
        if self.weight.shape[1] != self.input_size:  # the sum over devices must have it once
            bias = jnp.where(jax.lax.axis_index(AXES[self.input]) == 0, bias, jnp.zeros_like(bias))
        return jnp.repeat(bias, sizes, axis=0, total_repeat_length=rows)

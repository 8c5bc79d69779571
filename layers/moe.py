"""Mixtures of experts: each token is computed by a few of many feed-forward layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from .kernels.grouped import grouped_product
from .mixer import Places
from .mlp import MLP, FeedForward, GatedMLP
from .routing import Router, RouterLayer, Routing
from .sharding import AXES, gather, parameter, spec_of


@dataclass(frozen=True, kw_only=True)
class MoE(FeedForward):
    """y = shared(x) + the sum over the chosen experts e of weight_e expert_e(x) (1701.06538).

    No token is dropped, whatever the loads (2211.15841). Many small experts and shared ones: 2401.06066.
    """

    routed: ClassVar[bool] = True

    experts: int
    expert: MLP | GatedMLP
    """What each expert is."""
    router: Router
    shared: MLP | GatedMLP | None = None
    """A layer that computes every token; n shared experts are one that is n times as wide."""

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
        """How many parameters belong to experts that a token does not go to."""
        one = jax.eval_shape(lambda: self.expert.build(dim, rngs=nnx.Rngs(0)))
        return (self.experts - self.router.top_k) * sum(x.size for x in jax.tree.leaves(one))


class MoELayer(nnx.Module):
    """A router, experts, and perhaps a layer that all tokens share."""

    def __init__(self, spec: MoE, dim: int, *, rngs: nnx.Rngs):
        def linear(axes: str, sizes: Mapping[str, int], *, rngs: nnx.Rngs, bias: bool) -> ExpertLinear:
            return ExpertLinear(axes, {"E": spec.experts, **sizes}, rngs=rngs, bias=bias)

        self.spec = spec
        self.router = RouterLayer(spec.router, dim, spec.experts, rngs=rngs)
        self.experts = spec.expert.build(dim, rngs=rngs, linear=linear)
        self.shared = None if spec.shared is None else spec.shared.build(dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], places: Places) -> tuple[Float[Array, "B T D"], Routing]:
        """The layer's output in the dtype of `x`, and what the router did with the tokens that are no padding."""
        chosen, weights, done = self.router(x, (places.segments != 0).astype(jnp.float32))
        y = self._mixed(x, chosen, weights)
        return y if self.shared is None else y + self.shared(x), done

    def _mixed(self, x: Array, chosen: Array, weights: Array) -> Array:
        """The weighted sum of the chosen experts. A device computes its own tokens, with its part of every expert."""
        leaves, tree = jax.tree.flatten(self.experts)
        leaves = [gather(leaf, x.dtype) for leaf in leaves]
        if jax.sharding.get_abstract_mesh().empty:
            return _dispatched(tree.unflatten(leaves), x, chosen, weights)
        axis = AXES["F"]
        split = any(axis in spec_of(leaf) for leaf in leaves)

        def local(leaves: list[Array], x: Array, chosen: Array, weights: Array) -> Array:
            y = _dispatched(tree.unflatten(leaves), x, chosen, weights)
            return jax.lax.psum(y, axis) if split else y

        arrays = (leaves, x, chosen, weights)
        specs = jax.tree.map(lambda array: PartitionSpec(*spec_of(array)), arrays)
        return jax.shard_map(local, in_specs=specs, out_specs=specs[1], check_vma=False)(*arrays)


class ExpertLinear(nnx.Module):
    """y_m = x_m W_e + b_e for rows in order of their experts e: `ExpertLinear("D -> F", {"E": 8, "D": 6, "F": 9})`.

    Each W_e starts normal with standard deviation 1 / sqrt of the input size, b at zero. On a part of the input axis,
    as inside `jax.shard_map`, it computes a part of the sum.
    """

    def __init__(self, axes: str, sizes: Mapping[str, int], *, rngs: nnx.Rngs, bias: bool):
        self.input, self.output = (side.strip() for side in axes.split("->"))
        shape = sizes["E"], sizes[self.input], sizes[self.output]
        self.input_size = sizes[self.input]
        value = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(self.input_size)
        self.weight = parameter(f"E {self.input} {self.output}", value, inputs=1)
        self.bias = parameter(f"E {self.output}", jnp.zeros((shape[0], shape[2]))) if bias else None

    def __call__(self, x: Float[Array, "M D"], experts: Int[Array, " M"], sizes: Int[Array, " E"]) -> Array:
        """Maps rows of which `sizes` belong to each expert, in the dtype of `x`."""
        weight = self.weight[...].astype(x.dtype)
        # By this name a remat policy keeps y, as in `Linear`.
        y = checkpoint_name(grouped_product(x, weight, sizes), "product")
        if self.bias is None:
            return y
        bias = self.bias[...].astype(x.dtype)
        if weight.shape[1] != self.input_size:  # the sum over devices must have it once
            bias = jnp.where(jax.lax.axis_index(AXES[self.input]) == 0, bias, jnp.zeros_like(bias))
        return y + bias[experts]


def _dispatched(experts: Any, x: Array, chosen: Array, weights: Array) -> Array:
    """Rows in order of their experts, through them, and back: the weighted sum of what the chosen experts make of x."""
    dim, top_k = x.shape[-1], chosen.shape[-1]
    owners = chosen.reshape(-1)
    order = jnp.argsort(owners)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    sizes = jnp.zeros(experts.down.weight.shape[0], jnp.int32).at[owners].add(1)
    rows = jnp.broadcast_to(x.reshape(-1, 1, dim), (x.size // dim, top_k, dim)).reshape(-1, dim)
    rows = experts(_permuted(rows, order), owners[order], sizes)
    rows = _permuted(rows, back).reshape(*chosen.shape, dim)
    return jnp.einsum("btkd,btk->btd", rows, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def _permuted(rows: Array, order: Array) -> Array:
    """`rows[order]`, of a permutation: that lets the gradient be written without adding up."""
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")

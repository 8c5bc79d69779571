"""Feed-forward layers."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .linear.linear import Linear, products
from .spec import Spec

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) * jax.nn.relu(x),
}
"""Activations by the names the field uses.

`quick_gelu` is the approximation by a sigmoid (1606.08415, section 2), `relu2` the squared ReLU (2109.08668).
"""

MakeLinear = Callable[..., Any]
"""Makes a linear map, with the arguments of `Linear`; what it makes may take more than x when it is called."""


@dataclass(frozen=True, kw_only=True)
class FeedForward(Spec):
    """A position-wise layer B T D -> B T D.

    Its layer is called as `layer(x)` and returns y; where it is `routed`, as `layer(x, places)`, and it returns y and
    what its router did (`layers/moe/routing.py`).
    """

    routed: ClassVar[bool] = False

    @abc.abstractmethod
    def build(self, dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """The layer for hidden size D = `dim`."""

    @abc.abstractmethod
    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass."""

    def unused(self, dim: int) -> int:
        """How many of its parameters take no part in what becomes of a token."""
        return 0


@dataclass(frozen=True, kw_only=True)
class MLP(FeedForward):
    """y = act(x W_up) W_down."""

    hidden: int
    activation: Activation = "gelu_tanh"
    bias: bool = True

    def build(self, dim: int, *, rngs: nnx.Rngs, linear: MakeLinear = Linear) -> "MLPLayer":
        """The layer for hidden size D = `dim`, of linear maps that `linear` makes."""
        return MLPLayer(self, dim, rngs=rngs, linear=linear)

    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass."""
        return 4 * dim * self.hidden


class MLPLayer(nnx.Module):
    """Two linear maps with an activation between."""

    def __init__(self, spec: MLP, dim: int, *, rngs: nnx.Rngs, linear: MakeLinear):
        sizes = {"D": dim, "F": spec.hidden}
        self.spec = spec
        self.up = linear("D -> F", sizes, rngs=rngs, bias=spec.bias)
        self.down = linear("F -> D", sizes, rngs=rngs, bias=spec.bias)

    def __call__(self, x: Float[Array, "... D"], *which: Array) -> Float[Array, "... D"]:
        """The layer's output, in the dtype of `x`; the linear maps are given `which`."""
        return self.down(_activate(self.spec.activation, self.up(x, *which)), *which)


@dataclass(frozen=True, kw_only=True)
class GatedMLP(FeedForward):
    """y = (act(x W_gate) * x W_up) W_down; SwiGLU with `silu` (2002.05202).

    gpt-oss: `activation="quick_gelu", limit=7.0, offset=1.0, bias=True`.
    """

    hidden: int
    activation: Activation = "silu"
    bias: bool = False
    limit: float | None = None
    """x W_gate is at most so large, and x W_up at most so large in either direction."""
    offset: float = 0.0
    """Is added to x W_up."""

    def build(self, dim: int, *, rngs: nnx.Rngs, linear: MakeLinear = Linear) -> "GatedMLPLayer":
        """The layer for hidden size D = `dim`, of linear maps that `linear` makes."""
        return GatedMLPLayer(self, dim, rngs=rngs, linear=linear)

    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass."""
        return 6 * dim * self.hidden


class GatedMLPLayer(nnx.Module):
    """Three linear maps, one of them through an activation as a gate."""

    same_input: ClassVar = ("gate", "up")
    """Linear maps that `zoo.for_decoding` may make one."""

    def __init__(self, spec: GatedMLP, dim: int, *, rngs: nnx.Rngs, linear: MakeLinear):
        sizes = {"D": dim, "F": spec.hidden}
        self.spec = spec
        self.gate = linear("D -> F", sizes, rngs=rngs, bias=spec.bias)
        self.up = linear("D -> F", sizes, rngs=rngs, bias=spec.bias)
        self.down = linear("F -> D", sizes, rngs=rngs, bias=spec.bias)

    def __call__(self, x: Float[Array, "... D"], *which: Array) -> Float[Array, "... D"]:
        """The layer's output, in the dtype of `x`; the linear maps are given `which`."""
        gate, up = products((self.gate, self.up), x, *which)
        return self.down(_gated(self.spec, gate, up), *which)


@partial(jax.checkpoint, static_argnums=0)
def _activate(name: Activation, x: Array) -> Array:
    """act(x), recomputed in the backward pass: that costs less than storing what is between."""
    return ACTIVATIONS[name](x)


@partial(jax.checkpoint, static_argnums=0)
def _gated(spec: GatedMLP, gate: Array, up: Array) -> Array:
    """act(gate) * up, recomputed in the backward pass."""
    if spec.limit is not None:
        gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
    return ACTIVATIONS[spec.activation](gate) * (up + spec.offset if spec.offset else up)

"""Feed-forward layers."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from .linear import Linear
from .spec import Spec

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) * jax.nn.relu(x),
}
"""Activations by the names the field uses; `relu2` is the squared ReLU (2109.08668)."""


@dataclass(frozen=True, kw_only=True)
class FeedForward(Spec):
    """A position-wise layer B T D -> B T D."""

    @abc.abstractmethod
    def build(self, dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """The layer for hidden size D = `dim`."""

    @abc.abstractmethod
    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass."""


@dataclass(frozen=True, kw_only=True)
class MLP(FeedForward):
    """y = act(x W_up) W_down."""

    hidden: int
    activation: Activation = "gelu_tanh"
    bias: bool = True

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "MLPLayer":
        """The layer for hidden size D = `dim`."""
        return MLPLayer(self, dim, rngs=rngs)

    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass."""
        return 4 * dim * self.hidden


class MLPLayer(nnx.Module):
    """Two linear maps with an activation between."""

    def __init__(self, spec: MLP, dim: int, *, rngs: nnx.Rngs):
        sizes = {"D": dim, "F": spec.hidden}
        self.spec = spec
        self.up = Linear("D -> F", sizes, rngs=rngs, bias=spec.bias)
        self.down = Linear("F -> D", sizes, rngs=rngs, bias=spec.bias)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output, in the dtype of `x`."""
        return self.down(_activate(self.spec.activation, self.up(x)))


@dataclass(frozen=True, kw_only=True)
class GatedMLP(FeedForward):
    """y = (act(x W_gate) * x W_up) W_down; SwiGLU with `silu` (2002.05202)."""

    hidden: int
    activation: Activation = "silu"
    bias: bool = False

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "GatedMLPLayer":
        """The layer for hidden size D = `dim`."""
        return GatedMLPLayer(self, dim, rngs=rngs)

    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass."""
        return 6 * dim * self.hidden


class GatedMLPLayer(nnx.Module):
    """Three linear maps, one of them through an activation as a gate."""

    def __init__(self, spec: GatedMLP, dim: int, *, rngs: nnx.Rngs):
        sizes = {"D": dim, "F": spec.hidden}
        self.spec = spec
        self.gate = Linear("D -> F", sizes, rngs=rngs, bias=spec.bias)
        self.up = Linear("D -> F", sizes, rngs=rngs, bias=spec.bias)
        self.down = Linear("F -> D", sizes, rngs=rngs, bias=spec.bias)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output, in the dtype of `x`."""
        return self.down(_activate(self.spec.activation, self.gate(x), self.up(x)))


@partial(jax.checkpoint, static_argnums=0)
def _activate(name: Activation, x: Array, factor: Array | None = None) -> Array:
    """act(x) * factor, recomputed in the backward pass: that costs less than storing what is between."""
    y = ACTIVATIONS[name](x)
    return y if factor is None else y * factor

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

from .linear.linear import Linear, apply_linears
from .linear.matmul import Kind
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
"""A constructor of linear maps with the arguments of `Linear`; experts' maps take group sizes when they are called."""


@dataclass(frozen=True, kw_only=True)
class FeedForward(Spec):
    """A position-wise layer B T D -> B T D.

    Its layer is called as `layer(x, kind=...)` and returns y. A `routed` layer is called as
    `layer(x, positions, kind=...)` and returns y and its `RouterStats` (`layers/moe/routing.py`). `kind` is the number
    format of matmuls with weights.
    """

    routed: ClassVar[bool] = False

    @abc.abstractmethod
    def build(self, dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """The layer for hidden size D = `dim`."""

    @abc.abstractmethod
    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass."""

    def unused(self, dim: int) -> int:
        """The number of parameters that a token does not use."""
        return 0


@dataclass(frozen=True, kw_only=True)
class MLP(FeedForward):
    """y = act(x W_up) W_down."""

    hidden: int
    activation: Activation = "gelu_tanh"
    bias: bool = True

    def build(self, dim: int, *, rngs: nnx.Rngs, linear: MakeLinear = Linear) -> "MLPLayer":
        """The layer for hidden size D = `dim`; `linear` constructs its linear maps."""
        return MLPLayer(self, dim, rngs=rngs, linear=linear)

    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass."""
        return 4 * dim * self.hidden


class MLPLayer(nnx.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, spec: MLP, dim: int, *, rngs: nnx.Rngs, linear: MakeLinear):
        sizes = {"D": dim, "F": spec.hidden}
        self.spec = spec
        self.up = linear("D -> F", sizes, rngs=rngs, bias=spec.bias)
        self.down = linear("F -> D", sizes, rngs=rngs, bias=spec.bias)

    def __call__(self, x: Float[Array, "... D"], *group_sizes: Array, kind: Kind = "none") -> Float[Array, "... D"]:
        """The layer's output, in the dtype of `x`; `group_sizes` are for linear maps of experts."""
        hidden = _activate(self.spec.activation, self.up(x, *group_sizes, kind=kind))
        return self.down(hidden, *group_sizes, kind=kind)


@dataclass(frozen=True, kw_only=True)
class GatedMLP(FeedForward):
    """y = (act(x W_gate) * x W_up) W_down; SwiGLU with `silu` (2002.05202).

    gpt-oss: `activation="quick_gelu", limit=7.0, offset=1.0, bias=True`.
    """

    hidden: int
    activation: Activation = "silu"
    bias: bool = False
    limit: float | None = None
    """Upper bound of x W_gate, and bound of the magnitude of x W_up."""
    offset: float = 0.0
    """Added to x W_up."""

    def build(self, dim: int, *, rngs: nnx.Rngs, linear: MakeLinear = Linear) -> "GatedMLPLayer":
        """The layer for hidden size D = `dim`; `linear` constructs its linear maps."""
        return GatedMLPLayer(self, dim, rngs=rngs, linear=linear)

    def flops(self, dim: int) -> float:
        """Floating-point operations of one token in the forward pass."""
        return 6 * dim * self.hidden


class GatedMLPLayer(nnx.Module):
    """Three linear maps; the output of one passes through an activation and multiplies that of another."""

    same_input: ClassVar = ("gate", "up")
    """Linear maps of the same input, which `zoo.optimize_for_decoding` may fuse."""

    def __init__(self, spec: GatedMLP, dim: int, *, rngs: nnx.Rngs, linear: MakeLinear):
        sizes = {"D": dim, "F": spec.hidden}
        self.spec = spec
        self.gate = linear("D -> F", sizes, rngs=rngs, bias=spec.bias)
        self.up = linear("D -> F", sizes, rngs=rngs, bias=spec.bias)
        self.down = linear("F -> D", sizes, rngs=rngs, bias=spec.bias)

    def __call__(self, x: Float[Array, "... D"], *group_sizes: Array, kind: Kind = "none") -> Float[Array, "... D"]:
        """The layer's output, in the dtype of `x`; `group_sizes` are for linear maps of experts."""
        gate, up = apply_linears((self.gate, self.up), x, *group_sizes, kind=kind)
        return self.down(_gated(self.spec, gate, up), *group_sizes, kind=kind)


@partial(jax.checkpoint, static_argnums=0)
def _activate(name: Activation, x: Array) -> Array:
    """act(x), recomputed in the backward pass: that costs less than saving its intermediate values."""
    return ACTIVATIONS[name](x)


@partial(jax.checkpoint, static_argnums=0)
def _gated(spec: GatedMLP, gate: Array, up: Array) -> Array:
    """act(gate) * up, recomputed in the backward pass."""
    if spec.limit is not None:
        gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
    return ACTIVATIONS[spec.activation](gate) * (up + spec.offset if spec.offset else up)

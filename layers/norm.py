"""Normalisation over the last axis, always computed in float32."""

import abc
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .sharding import parameter
from .spec import Spec


@dataclass(frozen=True, kw_only=True)
class Norm(Spec):
    """A normalisation of the last axis."""

    eps: float = 1e-6

    @abc.abstractmethod
    def build(self, axis: str, size: int) -> nnx.Module:
        """The layer for the axis with this letter and size."""


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * scale (1910.07467)."""

    zero_centered: bool = False
    """The parameter is scale - 1, as Gemma stores it."""

    def build(self, axis: str, size: int) -> "RMSNormLayer":
        """The layer for the axis with this letter and size."""
        return RMSNormLayer(self, axis, size)


class RMSNormLayer(nnx.Module):
    """Root-mean-square normalisation."""

    def __init__(self, spec: RMSNorm, axis: str, size: int):
        self.spec = spec
        self.scale = parameter(axis, jnp.zeros(size) if spec.zero_centered else jnp.ones(size))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """`x` normalised, in its dtype."""
        scale = self.scale[...] + 1.0 if self.spec.zero_centered else self.scale[...]
        return _normalise(x, scale, None, self.spec.eps, False)


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias (1607.06450)."""

    eps: float = 1e-5
    bias: bool = True

    def build(self, axis: str, size: int) -> "LayerNormLayer":
        """The layer for the axis with this letter and size."""
        return LayerNormLayer(self, axis, size)


class LayerNormLayer(nnx.Module):
    """Layer normalisation."""

    def __init__(self, spec: LayerNorm, axis: str, size: int):
        self.spec = spec
        self.scale = parameter(axis, jnp.ones(size))
        self.bias = parameter(axis, jnp.zeros(size)) if spec.bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """`x` normalised, in its dtype."""
        bias = None if self.bias is None else self.bias[...]
        return _normalise(x, self.scale[...], bias, self.spec.eps, True)


@partial(jax.checkpoint, static_argnums=(3, 4))
def _normalise(x: Array, scale: Array, bias: Array | None, eps: float, centre: bool) -> Array:
    """Recomputed in the backward pass, which so stores `x` in its own dtype, and nothing in float32."""
    wide = x.astype(jnp.float32)
    if centre:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * scale
    return (wide if bias is None else wide + bias).astype(x.dtype)

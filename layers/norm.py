"""Normalisation over the last axis or axes, always computed in float32."""

import abc
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .sharding.axes import parameter
from .spec import Spec


@dataclass(frozen=True, kw_only=True)
class Norm(Spec):
    """A normalisation of the last axis, or of several last axes together."""

    eps: float = 1e-6

    @abc.abstractmethod
    def build(self, axes: str, *sizes: int) -> nnx.Module:
        """The layer for the last axes, with these letters and sizes; several axes are normalised together."""


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * scale (1910.07467)."""

    zero_centered: bool = False
    """The parameter is scale - 1, as Gemma stores it."""

    def build(self, axes: str, *sizes: int) -> "RMSNormLayer":
        """The layer for the last axes, with these letters and sizes."""
        return RMSNormLayer(self, axes, *sizes)


class RMSNormLayer(nnx.Module):
    """Root-mean-square normalisation."""

    def __init__(self, spec: RMSNorm, axes: str, *sizes: int):
        self.spec = spec
        self.scale = parameter(axes, jnp.zeros(sizes) if spec.zero_centered else jnp.ones(sizes))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """`x` normalised, in its dtype."""
        scale = self.scale[...].astype(jnp.float32)
        return _normalise(x, scale + 1.0 if self.spec.zero_centered else scale, None, self.spec.eps, False)


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias (1607.06450)."""

    eps: float = 1e-5
    bias: bool = True

    def build(self, axes: str, *sizes: int) -> "LayerNormLayer":
        """The layer for the last axes, with these letters and sizes."""
        return LayerNormLayer(self, axes, *sizes)


class LayerNormLayer(nnx.Module):
    """Layer normalisation."""

    def __init__(self, spec: LayerNorm, axes: str, *sizes: int):
        self.spec = spec
        self.scale = parameter(axes, jnp.ones(sizes))
        self.bias = parameter(axes, jnp.zeros(sizes)) if spec.bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """`x` normalised, in its dtype."""
        bias = None if self.bias is None else self.bias[...].astype(jnp.float32)
        return _normalise(x, self.scale[...].astype(jnp.float32), bias, self.spec.eps, True)


@partial(jax.checkpoint, static_argnums=(3, 4))
def _normalise(x: Array, scale: Array, bias: Array | None, eps: float, centre: bool) -> Array:
    """Recomputed in the backward pass, so that only `x` is saved, in its own dtype, and nothing in float32."""
    wide, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    if centre:
        wide = wide - jnp.mean(wide, axis=axes, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps) * scale
    return (wide if bias is None else wide + bias).astype(x.dtype)

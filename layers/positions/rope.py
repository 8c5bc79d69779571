"""Rotary position embedding and every scaling of its frequencies, as specs."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..kernels.by_platform import by_platform
from ..kernels.transposable import linear
from ..spec import Spec

Frequencies = Float[np.ndarray, "R"] | Float[Array, "R"]


def rope_frequencies(theta: float, dim: int) -> Float[np.ndarray, "R"]:
    """The unscaled frequencies `theta^(-2i/dim)` for i < R = dim/2, in radians per position (2104.09864, 3.2.2)."""
    return 1 / _periods(theta, dim)


def _periods(theta: float, dim: int) -> Float[np.ndarray, "R"]:
    # Every step rounds to float32 as in the code the checkpoints were trained with: at position 1M the last bit of a
    # frequency is worth 0.06 radians. The power alone is taken in float64: float32 powers differ between libraries.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / dim
    return np.power(float(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature `0.1 * mscale * ln(factor) + 1`, 1 where the factor is at most 1 (2309.00071, 3.4).

    DeepSeek multiplies its softmax scale by `yarn_mscale(factor, mscale_all_dim)**2` on top of what `YarnScaling` does.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Spec, ABC):
    """How frequencies change to reach past the length a model was trained on; a new scaling is one more subclass."""

    by_length: ClassVar[bool] = False
    """Whether `length` changes anything."""

    @abstractmethod
    def frequencies(self, theta: float, dim: int, length: int | Int[Array, ""]) -> tuple[Frequencies, float]:
        """The dim/2 frequencies in float32 and the attention factor, which multiplies both sine and cosine.

        Args:
            theta: base of the unscaled frequencies.
            dim: how many dimensions of a head are rotated, even.
            length: the largest position of the batch plus one, possibly traced; most scalings ignore it.
        """


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Position interpolation: every frequency is divided by the factor, `f' = f / factor` (2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _positive(self, "factor")

    def frequencies(self, theta: float, dim: int, length: int | Int[Array, ""]) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`."""
        return rope_frequencies(theta, dim) / np.float32(self.factor), 1.0


@dataclass(frozen=True, kw_only=True)
class NTKScaling(RopeScaling):
    """NTK-aware scaling: a larger base, `theta' = theta * factor^(dim / (dim - 2))` (bloc97; 2309.00071, 3.1)."""

    factor: float

    def __post_init__(self) -> None:
        _positive(self, "factor")

    def frequencies(self, theta: float, dim: int, length: int | Int[Array, ""]) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`. Raises ValueError where fewer than 4 dimensions are rotated."""
        return rope_frequencies(theta * self.factor ** _ntk_exponent(dim), dim), 1.0


@dataclass(frozen=True, kw_only=True)
class DynamicNTKScaling(RopeScaling):
    """NTK-aware scaling that grows with the sequence: `factor' = factor * length / original_length - (factor - 1)`.

    `length` is the largest position of the batch plus one, at least `original_length`, so that short sequences are
    unscaled (emozilla; 2309.00071, 3.3; transformers' "dynamic"). While decoding, keys that are already in the cache
    keep the frequencies of the step that wrote them, as in transformers.
    """

    by_length: ClassVar[bool] = True

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_length")

    def frequencies(self, theta: float, dim: int, length: int | Int[Array, ""]) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`. Raises ValueError where fewer than 4 dimensions are rotated."""
        beyond = jnp.maximum(jnp.asarray(length).astype(jnp.float32) / self.original_length - 1, 0)
        # theta'^(-2i/dim) = theta^(-2i/dim) * factor'^(-2i/(dim-2)): the first part is static, so unscaled is exact.
        exponents = -_ntk_exponent(dim) * np.arange(0, dim, 2) / dim
        growth = (1 + self.factor * beyond) ** exponents.astype(np.float32)
        return rope_frequencies(theta, dim) * growth, 1.0


@dataclass(frozen=True, kw_only=True)
class ProportionalScaling(RopeScaling):
    """Only the fastest share of the pairs turns: `f_i / factor` for i < fraction * dim/2, else 0 (Gemma 4).

    Unlike `Rope.fraction` the frequencies are those of the whole head, and pairs are as far apart as without it.
    """

    fraction: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "fraction", "factor")
        if self.fraction > 1:
            raise ValueError(f"fraction must be at most 1, got {self.fraction}")

    def frequencies(self, theta: float, dim: int, length: int | Int[Array, ""]) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`."""
        turning = np.arange(dim // 2) < int(self.fraction * dim // 2)
        scaled = rope_frequencies(theta, dim) / np.float32(self.factor)
        return np.where(turning, scaled, np.float32(0)), 1.0


@dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling):
    """YaRN: slow pairs are interpolated, fast ones kept, `f' = f / factor * ramp + f * (1 - ramp)` (2309.00071).

    The ramp goes from 0 at the pair that turns `beta_fast` times within `original_length` to 1 at the one that turns
    `beta_slow` times; `truncate` moves both ends outwards to whole pairs. Sine and cosine are multiplied by
    `attention_factor`, by default `yarn_mscale(factor)`, or with DeepSeek's pair of settings
    `yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)`.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_length", "beta_fast", "beta_slow")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast must be above beta_slow, got {self.beta_fast} and {self.beta_slow}")
        if bool(self.mscale) != bool(self.mscale_all_dim):
            raise ValueError(
                "mscale and mscale_all_dim work only together (without one, implementations disagree: give "
                f"attention_factor instead), got mscale={self.mscale}, mscale_all_dim={self.mscale_all_dim}"
            )

    def frequencies(self, theta: float, dim: int, length: int | Int[Array, ""]) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`."""
        periods = _periods(theta, dim)
        low, high = self._range(theta, dim)
        keep = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        scaled = 1 / (np.float32(self.factor) * periods) * (1 - keep) + 1 / periods * keep
        return scaled, self._attention_factor()

    def _range(self, theta: float, dim: int) -> tuple[float, float]:
        """The pairs between which the ramp goes from 0 to 1."""

        def pair(turns: float) -> float:
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high + 0.001 if low == high else high

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1: waves longer than `original_length / low` are divided by the factor, short ones kept, else smoothed.

    With t = original_length * f / 2pi turns: f' = f / factor where t < low_frequency_factor, f where
    t > high_frequency_factor, and between them `(1 - s) * f / factor + s * f`, s = (t - low) / (high - low)
    (github.com/meta-llama/llama-models, `apply_scaling`).
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self) -> None:
        _positive(self, "factor", "low_frequency_factor", "high_frequency_factor", "original_length")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                "low_frequency_factor must be below high_frequency_factor, "
                f"got {self.low_frequency_factor} and {self.high_frequency_factor}"
            )

    def frequencies(self, theta: float, dim: int, length: int | Int[Array, ""]) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`."""
        low, high, factor = self.low_frequency_factor, self.high_frequency_factor, np.float32(self.factor)
        kept = rope_frequencies(theta, dim)
        wavelengths = 1 / kept * np.float32(2 * math.pi)
        smooth = (1 / wavelengths * np.float32(self.original_length) - low) / (high - low)
        smoothed = (1 - smooth) * kept / factor + smooth * kept
        scaled = np.where(wavelengths < self.original_length / high, kept, smoothed)
        return np.where(wavelengths > self.original_length / low, kept / factor, scaled), 1.0


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE: one searched divisor a pair, `f'_i = f_i / factors_i`, one set for short and one for long (2402.13753).

    The long set serves a batch whose largest position is at or past `original_length`, for all of its positions, as
    in transformers. While decoding, keys that are already in the cache keep the set of the step that wrote them: a
    cache that crosses `original_length` must be filled anew. Sine and cosine are multiplied by `attention_factor`, by
    default `sqrt(1 + ln(length / original_length) / ln(original_length))`, `length` being the longest the model takes.
    """

    by_length: ClassVar[bool] = True

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    length: int
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "original_length", "length")
        if len(self.short_factors) != len(self.long_factors):
            raise ValueError(
                "short_factors and long_factors must be as many, "
                f"got {len(self.short_factors)} and {len(self.long_factors)}"
            )

    def frequencies(self, theta: float, dim: int, length: int | Int[Array, ""]) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`. Raises ValueError where the factors are not one for each pair."""
        if len(self.short_factors) != dim // 2:
            raise ValueError(
                f"LongRoPE takes one factor for each rotated pair, got {len(self.short_factors)} factors for "
                f"{dim} rotated dimensions, {dim // 2} pairs"
            )
        periods = _periods(theta, dim)
        sets = np.asarray((self.short_factors, self.long_factors), np.float32)
        short, long = 1 / (sets * periods)
        return jnp.where(jnp.asarray(length) > self.original_length, long, short), self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.length / self.original_length
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self.original_length))


@dataclass(frozen=True, kw_only=True)
class Rope(Spec):
    """Rotary position embedding: pair i of a head turns by `position * theta^(-2i/R)` (RoFormer, 2104.09864).

    `(a, b) -> (a cos - b sin, b cos + a sin)`, in float32, over the first `R = int(fraction * H)` dimensions; the rest
    passes. Pairs are `(i, i + R/2)`, or `(2i, 2i + 1)` where `interleaved` (GPT-J, Llama's own checkpoints).
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _positive(self, "theta", "fraction")
        if self.fraction > 1:
            raise ValueError(f"fraction must be at most 1, got {self.fraction}")

    def __call__(self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        """`x` (queries or keys) turned by its positions, with the dtype it came in.

        Raises ValueError where H or the rotated R is odd, or R is 0.
        """
        cos, sin = self.rotation(positions, x.shape[-1])

        def turn(rotation: tuple[Array, Array], x: Array) -> Array:
            return by_platform({"tpu": self._by_product, "default": self._by_parts}, (*rotation, x), x)

        def back(rotation: tuple[Array, Array], x: Array) -> Array:
            return turn((rotation[0], -rotation[1]), x)

        return linear(turn, back, (cos, sin), x, x)

    def _by_parts(
        self, cos: Float[Array, "B T R"], sin: Float[Array, "B T R"], x: Float[Array, "B T N H"]
    ) -> Float[Array, "B T N H"]:
        cos, sin, dim = cos[:, :, None], sin[:, :, None], 2 * cos.shape[-1]
        turned, passed = x[..., :dim].astype(jnp.float32), x[..., dim:]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = jnp.stack((a * cos - b * sin, b * cos + a * sin), axis=-1).reshape(turned.shape)
        else:
            a, b = turned[..., : dim // 2], turned[..., dim // 2 :]
            turned = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)
        turned = turned.astype(x.dtype)
        return jnp.concatenate((turned, passed), axis=-1) if passed.shape[-1] else turned

    def _by_product(
        self, cos: Float[Array, "B T R"], sin: Float[Array, "B T R"], x: Float[Array, "B T N H"]
    ) -> Float[Array, "B T N H"]:
        """The same (of finite numbers) where parts of a head are parts of registers, and cost more than a product: with
        the matrix of 0, 1 and -1 that puts -b in the place of a and a in that of b, which rounds nothing.
        """
        count, size = cos.shape[-1], x.shape[-1]
        first = np.arange(count) * (2 if self.interleaved else 1)
        second = first + (1 if self.interleaved else count)
        swap = np.zeros((size, size), np.float32)
        swap[second, first], swap[first, second] = -1, 1
        exact = jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
        wide = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
        kinds: Any = {"precision": exact, "preferred_element_type": jnp.float32}
        other = jnp.einsum("BTNH,HJ->BTNJ", wide, jnp.asarray(swap, wide.dtype), **kinds)

        def both(each: Array, rest: float) -> Array:
            each = jnp.repeat(each, 2, axis=-1) if self.interleaved else jnp.concatenate((each, each), axis=-1)
            return jnp.pad(each, ((0, 0), (0, 0), (0, size - 2 * count)), constant_values=rest)[:, :, None]

        return (x.astype(jnp.float32) * both(cos, 1.0) + other * both(sin, 0.0)).astype(x.dtype)

    def rotation(
        self, positions: Int[Array, "B T"], head_dim: int
    ) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
        """Cosine and sine of every rotated pair's angle, times the attention factor; float32. Raises as `__call__`."""
        dim = self._rotated(head_dim)
        if self.scaling is None:
            frequencies, factor = rope_frequencies(self.theta, dim), 1.0
        else:
            frequencies, factor = self.scaling.frequencies(self.theta, dim, positions.max(initial=-1) + 1)
        # Whole numbers up to 2^24 are exact in float32.
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor

    def _rotated(self, head_dim: int) -> int:
        dim = int(self.fraction * head_dim)
        if head_dim % 2 or dim % 2 or dim == 0:
            raise ValueError(
                "RoPE rotates pairs: the head dim and the rotated int(fraction * H) must be even and above 0, "
                f"got H={head_dim}, fraction={self.fraction}, {dim} rotated"
            )
        return dim


def _ntk_exponent(dim: int) -> float:
    if dim < 4:
        raise ValueError(f"NTK-aware scaling needs at least 4 rotated dimensions, got {dim}")
    return dim / (dim - 2)


def _positive(spec: Spec, *names: str) -> None:
    for name in names:
        if getattr(spec, name) <= 0:
            raise ValueError(f"{type(spec).__name__}.{name} must be above 0, got {getattr(spec, name)}")

"""Scalings of RoPE's frequencies, with which a model reads further than it was trained for."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..spec import Spec

Frequencies = Float[np.ndarray, " R"] | Float[Array, "... R"]
Length = int | Int[Array, "..."]

EVERY_LENGTH = range(2**31 - 1)
"""All lengths that a text can have."""


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

    @abstractmethod
    def frequencies(self, theta: float, dim: int, length: Length) -> tuple[Frequencies, float]:
        """The R = dim/2 frequencies in float32 and the attention factor, which multiplies both sine and cosine.

        Args:
            theta: base of the unscaled frequencies.
            dim: number of rotated dimensions of a head, even.
            length: tokens in the document, possibly traced; with an array of lengths, a scaling that depends on them
                returns frequencies with its dimensions in front. Most scalings ignore it.
        """

    def equal_lengths(self, length: int) -> range:
        """The range of lengths that have the same frequencies as `length`, which is in it.

        Keys and values that were cached at a length in this range are valid at another one in it. A scaling whose
        `frequencies` depend on `length` must override this.
        """
        return EVERY_LENGTH


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Position interpolation: every frequency is divided by the factor, `f' = f / factor` (2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        check_positive(self, "factor")

    def frequencies(self, theta: float, dim: int, length: Length) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`."""
        return rope_frequencies(theta, dim) / np.float32(self.factor), 1.0


@dataclass(frozen=True, kw_only=True)
class NTKScaling(RopeScaling):
    """NTK-aware scaling: a larger base, `theta' = theta * factor^(dim / (dim - 2))` (bloc97; 2309.00071, 3.1)."""

    factor: float

    def __post_init__(self) -> None:
        check_positive(self, "factor")

    def frequencies(self, theta: float, dim: int, length: Length) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`. Raises ValueError where fewer than 4 dimensions are rotated."""
        return rope_frequencies(theta * self.factor ** _ntk_exponent(dim), dim), 1.0


@dataclass(frozen=True, kw_only=True)
class DynamicNTKScaling(RopeScaling):
    """NTK-aware scaling that grows with the document: `factor' = factor * length / original_length - (factor - 1)`.

    A document of up to `original_length` tokens is not scaled (emozilla; 2309.00071, 3.3; transformers' "dynamic").
    Each token past `original_length` changes the frequencies of all tokens, so generation recomputes the whole KV cache
    for each of them. transformers does not, and its output past that length depends on how the text was cut into calls.
    """

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        check_positive(self, "factor", "original_length")

    def frequencies(self, theta: float, dim: int, length: Length) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`. Raises ValueError where fewer than 4 dimensions are rotated."""
        beyond = jnp.maximum(jnp.asarray(length).astype(jnp.float32) / self.original_length - 1, 0)[..., None]
        # theta'^(-2i/dim) = theta^(-2i/dim) * factor'^(-2i/(dim-2)): the first part is static, so unscaled is exact.
        exponents = -_ntk_exponent(dim) * np.arange(0, dim, 2) / dim
        growth = (1 + self.factor * beyond) ** exponents.astype(np.float32)
        return rope_frequencies(theta, dim) * growth, 1.0

    def equal_lengths(self, length: int) -> range:
        """See `RopeScaling.equal_lengths`: past `original_length`, no two lengths are equal."""
        return range(self.original_length + 1) if length <= self.original_length else range(length, length + 1)


@dataclass(frozen=True, kw_only=True)
class ProportionalScaling(RopeScaling):
    """Only the fastest share of the pairs is rotated: `f_i / factor` for i < fraction * dim/2, else 0 (Gemma 4).

    Unlike `Rope.fraction` the frequencies are those of the whole head, and pairs are as far apart as without it.
    """

    fraction: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "fraction", "factor")
        if self.fraction > 1:
            raise ValueError(f"fraction must be at most 1, got {self.fraction}")

    def frequencies(self, theta: float, dim: int, length: Length) -> tuple[Frequencies, float]:
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
        check_positive(self, "factor", "original_length", "beta_fast", "beta_slow")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast must be above beta_slow, got {self.beta_fast} and {self.beta_slow}")
        if bool(self.mscale) != bool(self.mscale_all_dim):
            raise ValueError(
                "mscale and mscale_all_dim work only together (without one, implementations disagree: give "
                f"attention_factor instead), got mscale={self.mscale}, mscale_all_dim={self.mscale_all_dim}"
            )

    def frequencies(self, theta: float, dim: int, length: Length) -> tuple[Frequencies, float]:
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
        check_positive(self, "factor", "low_frequency_factor", "high_frequency_factor", "original_length")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                "low_frequency_factor must be below high_frequency_factor, "
                f"got {self.low_frequency_factor} and {self.high_frequency_factor}"
            )

    def frequencies(self, theta: float, dim: int, length: Length) -> tuple[Frequencies, float]:
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

    All tokens of a document of more than `original_length` tokens use the long set. As in transformers, generation
    recomputes the KV cache when a text grows past `original_length`; unlike there, this is decided for each row of a
    batch. Sine and cosine are multiplied by `attention_factor`, by default
    `sqrt(1 + ln(length / original_length) / ln(original_length))`, `length` being the longest the model takes.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    length: int
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_positive(self, "original_length", "length")
        if len(self.short_factors) != len(self.long_factors):
            raise ValueError(
                "short_factors and long_factors must be as many, "
                f"got {len(self.short_factors)} and {len(self.long_factors)}"
            )

    def frequencies(self, theta: float, dim: int, length: Length) -> tuple[Frequencies, float]:
        """See `RopeScaling.frequencies`. Raises ValueError where the factors are not one for each pair."""
        if len(self.short_factors) != dim // 2:
            raise ValueError(
                f"LongRoPE takes one factor for each rotated pair, got {len(self.short_factors)} factors for "
                f"{dim} rotated dimensions, {dim // 2} pairs"
            )
        periods = _periods(theta, dim)
        sets = np.asarray((self.short_factors, self.long_factors), np.float32)
        short, long = 1 / (sets * periods)
        is_long = (jnp.asarray(length) > self.original_length)[..., None]
        return jnp.where(is_long, long, short), self._attention_factor()

    def equal_lengths(self, length: int) -> range:
        """See `RopeScaling.equal_lengths`: up to `original_length`, and past it."""
        short = range(self.original_length + 1)
        return short if length in short else range(short.stop, EVERY_LENGTH.stop)

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.length / self.original_length
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self.original_length))


def _ntk_exponent(dim: int) -> float:
    if dim < 4:
        raise ValueError(f"NTK-aware scaling needs at least 4 rotated dimensions, got {dim}")
    return dim / (dim - 2)


def check_positive(spec: Spec, *names: str) -> None:
    """Raises ValueError where a field of a spec is not a finite number above 0."""
    for name in names:
        if not 0 < getattr(spec, name) < math.inf:
            raise ValueError(f"{type(spec).__name__}.{name} must be a finite number above 0, got {getattr(spec, name)}")

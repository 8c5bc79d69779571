"""Rotary position embedding."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..kernels.by_platform import by_platform
from ..kernels.transposable import with_transpose
from ..spec import Spec
from .positions import Positions
from .scaling import EVERY_LENGTH, RopeScaling, check_positive, rope_frequencies


@dataclass(frozen=True, kw_only=True)
class Rope(Spec):
    """Rotary position embedding: pair i of a head is rotated by `position * theta^(-2i/R)` (RoFormer, 2104.09864).

    `(a, b) -> (a cos - b sin, b cos + a sin)`, in float32, over the first `R = int(fraction * H)` dimensions; the rest
    is unchanged. Pairs are `(i, i + R/2)`, or `(2i, 2i + 1)` where `interleaved` (GPT-J, Llama's own checkpoints).
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_positive(self, "theta", "fraction")
        if self.fraction > 1:
            raise ValueError(f"fraction must be at most 1, got {self.fraction}")

    def equal_lengths(self, length: int) -> range:
        """The range of document lengths that have the same frequencies as `length` (`RopeScaling.equal_lengths`)."""
        return EVERY_LENGTH if self.scaling is None else self.scaling.equal_lengths(length)

    def __call__(self, x: Float[Array, "B T N H"], positions: Positions) -> Float[Array, "B T N H"]:
        """`x` (queries or keys) rotated by its positions, in the dtype it came in.

        Raises ValueError where H or the rotated R is odd, or R is 0.
        """
        cos, sin = self.rotation(positions, x.shape[-1])

        def turn(rotation: tuple[Array, Array], x: Array) -> Array:
            return by_platform({"tpu": self._by_product, "default": self._by_parts}, (*rotation, x), x)

        def back(rotation: tuple[Array, Array], x: Array) -> Array:
            return turn((rotation[0], -rotation[1]), x)

        return with_transpose(turn, back, (cos, sin), x, x)

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

    def rotation(self, positions: Positions, head_dim: int) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
        """Cosine and sine of every rotated pair's angle, times the attention factor; float32. Raises as `__call__`."""
        dim = self._rotated(head_dim)
        if self.scaling is None:
            frequencies, factor = rope_frequencies(self.theta, dim), 1.0
        else:
            constant = self.equal_lengths(1) == EVERY_LENGTH
            length = 1 if constant else positions.document_lengths()
            frequencies, factor = self.scaling.frequencies(self.theta, dim, length)
        # Integers up to 2^24 are exact in float32.
        angles = positions.index[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor

    def _rotated(self, head_dim: int) -> int:
        dim = int(self.fraction * head_dim)
        if head_dim % 2 or dim % 2 or dim == 0:
            raise ValueError(
                "RoPE rotates pairs: the head dim and the rotated int(fraction * H) must be even and above 0, "
                f"got H={head_dim}, fraction={self.fraction}, {dim} rotated"
            )
        return dim

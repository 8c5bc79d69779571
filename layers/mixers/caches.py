"""KV caches of attention: one slot for each position or a ring buffer, in a floating-point type or int8.

The token at position p is in slot p mod S. Where S is the greatest length of a document, that is slot p, and keys are
in order. With a window, S is little more than the window, and older tokens are overwritten. Which token is in which
slot follows from the latest position and is not stored. A token that is written again (after a rejected draft token, or
a rewind) takes its old slot.

Arrays are B K S H, the slots of each head together: attention reads them in this order without a copy.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from ..kernels.attention.masks import KeysAt, Mask
from ..kernels.cache_update import write_token
from ..sharding.axes import partition, zeros
from ..sharding.collectives import per_device, reshard_like
from .mixer import Positions

SLACK = 16
"""Slots of a ring beyond its window. A call of up to SLACK + 1 tokens finds all keys that it sees in the ring, and up
to SLACK of the latest tokens can be discarded."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """Vectors as int8, with a scale for each token and head: x = values * scale, |error| <= scale / 2."""

    values: Int8[Array, "B K S H"]
    scale: Float[Array, "B K S"]

    @classmethod
    def of(cls, x: Float[Array, "B S K H"]) -> "Quantized":
        """`x` rounded; the greatest number of each vector becomes 127."""
        wide = jnp.swapaxes(x, 1, 2).astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=-1) / 127
        values = jnp.round(wide / jnp.where(scale == 0.0, 1.0, scale)[..., None])
        return cls(values.astype(jnp.int8), scale)

    def read(self, dtype: Any) -> Float[Array, "B S K H"]:
        """The vectors, in `dtype`."""
        return jnp.swapaxes((self.values.astype(jnp.float32) * self.scale[..., None]).astype(dtype), 1, 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plain:
    """Vectors as they are."""

    values: Float[Array, "B K S H"]

    @classmethod
    def of(cls, x: Float[Array, "B S K H"]) -> "Plain":
        """`x` itself."""
        return cls(jnp.swapaxes(x, 1, 2))

    def read(self, dtype: Any) -> Float[Array, "B S K H"]:
        """The vectors, in `dtype`."""
        return jnp.swapaxes(self.values.astype(dtype), 1, 2)


Vectors = Plain | Quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of up to S tokens a row."""

    key: Vectors
    value: Vectors
    window: int | None = field(metadata={"static": True})
    """Window of a ring; None if every position has a slot."""

    @classmethod
    def empty(
        cls, batch: int, length: int, kv_heads: int, head_dim: int, dtype: Any, window: int | None = None
    ) -> "KeyValueCache":
        """An empty cache for `length` tokens, of which no query sees more than the `window` latest.

        `dtype` int8 stores each vector quantized; anything else is a floating-point type.
        """
        ring = window is not None and window + SLACK < length
        slots = window + SLACK if window is not None and ring else length
        shape = (batch, kv_heads, slots, head_dim)
        if jnp.dtype(dtype) == jnp.int8:
            vectors: Vectors = Quantized(_zeros("B K S H", shape, jnp.int8), _zeros("B K S", shape[:3], jnp.float32))
        else:
            vectors = Plain(_zeros("B K S H", shape, dtype))
        return cls(vectors, vectors, window if ring else None)

    @property
    def slots(self) -> int:
        """S."""
        return self.key.values.shape[-2]

    @property
    def max_rewind(self) -> int:
        """All tokens, or SLACK if this is a ring (`Cache.max_rewind`)."""
        return self.slots if self.window is None else SLACK

    def extend(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], positions: Positions, mask: Mask
    ) -> tuple["KeyValueCache", Array, Array, Mask]:
        """The cache with the keys and values of more tokens, and the keys, values and mask of attention.

        Each row goes on at the position of its first token. Padding (segment 0) may stand on the right, and is not
        written. `mask` is over positions; what is returned is over the keys that are returned.
        """
        start, real = positions.index[:, 0], positions.segments > 0
        last = start + jnp.sum(real, axis=1, dtype=jnp.int32) - 1
        after = self._written(key, value, start, real)
        dtype = key.dtype
        if self.window is None:
            return after, after.key.read(dtype), after.value.read(dtype), mask
        if key.shape[1] - 1 <= SLACK:
            return after, after.key.read(dtype), after.value.read(dtype), KeysAt(self.positions_in_slots(last), mask)
        # The first queries see keys that the last ones overwrite: those from before this call go in front.
        at = start[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)
        at = jnp.concatenate([self.positions_in_slots(start - 1), jnp.where(real, at, -1)], axis=1)
        return (
            after,
            _joined(self.key, key),
            _joined(self.value, value),
            KeysAt(at, mask),
        )

    def positions_in_slots(self, last: Int[Array, " B"]) -> Int[Array, "B S"]:
        """The position of the token in each slot, negative where there is none yet, when `last` is the latest."""
        slot = jnp.arange(self.slots, dtype=jnp.int32)
        return last[:, None] - jnp.mod(last[:, None] - slot, self.slots)

    def _written(self, key: Array, value: Array, start: Array, real: Array) -> "KeyValueCache":
        """The cache with new vectors in the slots of their positions; of a ring, the latest of each slot."""
        count = jnp.sum(real, axis=1, dtype=jnp.int32)[:, None]
        index = jnp.arange(key.shape[1], dtype=jnp.int32)
        kept = real if self.window is None else real & (index >= count - self.slots)
        slot = start[:, None] + index
        slot = slot if self.window is None else jnp.mod(slot, self.slots)
        slot = jnp.where(kept, slot, self.slots)  # past the end: not written
        stored = {
            name: jax.tree.map(lambda old, new: _put(old, new, slot), getattr(self, name), type(self.key).of(new))
            for name, new in (("key", key), ("value", value))
        }
        return dataclasses.replace(self, **stored)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """The latent vectors of up to S tokens a row (MLA), as the key of a single head."""

    latent: Float[Array, "B 1 S R"]

    @classmethod
    def empty(cls, batch: int, length: int, size: int, dtype: Any) -> "LatentCache":
        """Room for `length` tokens. Raises NotImplementedError for int8."""
        if not jnp.issubdtype(dtype, jnp.floating):
            raise NotImplementedError(f"the cache of latent attention is not quantized, got {jnp.dtype(dtype).name}")
        return cls(jnp.zeros((batch, 1, length, size), dtype))

    @property
    def max_rewind(self) -> int:
        """All tokens: each has a slot."""
        return self.latent.shape[-2]

    def extend(
        self, latent: Float[Array, "B T 1 R"], positions: Positions
    ) -> tuple["LatentCache", Float[Array, "B S 1 R"]]:
        """The cache with the vectors of more tokens, and all vectors in it; padding is not written."""
        index = positions.index[:, :1] + jnp.arange(latent.shape[1], dtype=jnp.int32)
        slot = jnp.where(positions.segments > 0, index, self.max_rewind)
        after = _put(self.latent, jnp.swapaxes(latent, 1, 2), slot)
        return LatentCache(after), jnp.swapaxes(after.astype(latent.dtype), 1, 2)


def _joined(old: Vectors, new: Float[Array, "B T K H"]) -> Float[Array, "B U K H"]:
    """Stored vectors and new ones, rounded as they will be when they are stored."""
    return jnp.concatenate([reshard_like(old.read(new.dtype), new), type(old).of(new).read(new.dtype)], axis=1)


def _zeros(axes: str, shape: tuple[int, ...], dtype: Any) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    return zeros(shape, dtype, () if mesh.empty else tuple(partition(axes, mesh)))


def _put(slots: Array, new: Array, index: Int[Array, "B T"]) -> Array:
    """`slots[b, :, index[b, t]] = new[b, :, t]` unless the index is past the end; the slots are sharded as `new` is."""

    def local(new: Array, slots: Array, index: Array) -> Array:
        if new.shape[2] == 1:
            return write_token(slots, new, index[:, 0])
        row = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
        return slots.at[row, :, index].set(jnp.swapaxes(new, 1, 2), mode="drop")

    new = new.astype(slots.dtype)
    return per_device(local, new, reshard_like(slots, new), index)

"""Dropout decided by a hash of where a pair stands, so that every implementation drops the same pairs.

Neither block sizes nor the mesh nor the platform change what is dropped, and nothing is stored for the backward pass.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

MIXERS = (0x7FEB352D, 0x846CA68B)
"""Multipliers of a 32-bit mixing function with low bias (Wellons, hash-prospector)."""


def rows(seed: Int[Array, ""], batch: int, heads: int) -> UInt32[Array, "B N 1"]:
    """A number for each sequence and head."""
    start = _mix(jnp.asarray(seed).astype(jnp.uint32))
    sequence = _mix(jnp.arange(batch, dtype=jnp.uint32)[:, None, None] + start)
    return _mix(jnp.arange(heads, dtype=jnp.uint32)[None, :, None] + sequence)


def kept(
    row: UInt32[Array, "..."], query: Int[Array, "..."], key: Int[Array, "..."], rate: float
) -> Bool[Array, "..."]:
    """Whether a pair is kept, with probability 1 - rate; `row` is the number of its sequence and head."""
    bits = _mix(_mix(query.astype(jnp.uint32) + row) + _mix(key.astype(jnp.uint32)))
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(MIXERS[0])
    x = (x ^ (x >> 15)) * jnp.uint32(MIXERS[1])
    return x ^ (x >> 16)

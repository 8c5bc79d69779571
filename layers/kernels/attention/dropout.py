"""Dropout by a hash of the indices of a pair, so that every implementation drops the same pairs.

Block sizes, mesh and platform do not change the dropped pairs, and nothing is stored for the backward pass. The hash
consists of int32 operations (which wrap), since these are what the vector unit of a TPU supports.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

MIXERS = [np.uint32(number).view(np.int32) for number in (0x7FEB352D, 0x846CA68B)]
"""Multipliers of a 32-bit mixing function with low bias (Wellons, hash-prospector)."""


def rows(seed: Int[Array, ""], batch: int, heads: int) -> Int32[Array, "B N 1"]:
    """A number for each sequence and head."""
    start = _mix(jnp.asarray(seed).astype(jnp.int32))
    sequence = _mix(jnp.arange(batch, dtype=jnp.int32)[:, None, None] + start)
    return _mix(jnp.arange(heads, dtype=jnp.int32)[None, :, None] + sequence)


def kept(row: Int32[Array, "..."], query: Int[Array, "..."], key: Int[Array, "..."], rate: float) -> Bool[Array, "..."]:
    """Whether a pair is kept, with probability 1 - rate; `row` is the number of its sequence and head."""
    bits = _mix(of_query(row, query) + _mix(key))
    return bits >= jnp.int32(min(round(rate * 2**32), 2**32 - 1) - 2**31)


def of_query(row: Int32[Array, "..."], query: Int[Array, "..."]) -> Int32[Array, "..."]:
    """A number for a query of a sequence and head.

    The query is mixed before it is combined with the row: else one head would drop what another does
    some queries later.
    """
    return _mix(_mix(query) ^ row)


def _mix(x: Int32[Array, "..."]) -> Int32[Array, "..."]:
    x = (x ^ jax.lax.shift_right_logical(x, jnp.int32(16))) * MIXERS[0]
    x = (x ^ jax.lax.shift_right_logical(x, jnp.int32(15))) * MIXERS[1]
    return x ^ jax.lax.shift_right_logical(x, jnp.int32(16))

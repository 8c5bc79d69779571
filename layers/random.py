"""Random keys from seeds of 64 bits."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from .spec import SEED


def check_seed(seed: int) -> int:
    """`seed`, or ValueError unless it is an integer of at least 0 and below 2**64."""
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if value not in SEED:
        raise ValueError(f"a seed must be an integer of at least 0 and below 2**64, got {seed!r}")
    return value


def random_key(seed: int) -> Key[Array, ""]:
    """A random key that differs for each seed of at least 0 and below 2**64; below 2**32 it is `jax.random.key(seed)`.

    `jax.random.key` keeps the lower 32 bits of larger seeds, unless JAX computes in 64 bits. Raises ValueError as
    `check_seed`.
    """
    value = check_seed(seed)
    if value < 2**32:
        return jax.random.key(value)
    size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).size
    words = np.array([value >> 32, value % 2**32], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(np.tile(words, size // 2)))

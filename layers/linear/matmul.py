"""Matmuls in 8 bits, for training: both operands are scaled row by row and rounded, sums have 32 bits (qwix)."""

from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["none", "int8", "fp8"]
"""The number format of matmuls with weights: that of the operands, or 8 bits."""
TYPES: dict[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),  # gradients need the wider range (2209.05433, 3)
}
"""The dtypes that values and gradients are rounded to."""


def typed_einsum(
    kind: Kind,
    text: str,
    left: Float[Array, "..."],
    right: Float[Array, "..."],
    *,
    gradient: Literal["", "left", "right"] = "",
    **options: Any,
) -> Float[Array, "..."]:
    """`jnp.einsum` of two arrays in the number format `kind`; the result has the dtype of the left one.

    `gradient` says which operand is a gradient. Each operand has one scale for all entries that are summed together,
    chosen so that the largest magnitude is the largest number of the format: nothing is clipped, and the scales are
    multiplied onto the sums. Raises ValueError if the format needs qwix and qwix is not installed.
    """
    if kind == "none":
        return jnp.einsum(text, left, right, **options)
    qwix = _qwix()
    sides, result = text.split("->")
    arrays = []
    for side, letters, array in zip(("left", "right"), sides.split(","), (left, right), strict=True):
        rows = [dim for dim, letter in enumerate(letters) if letter in result]
        dtype = TYPES[kind][side == gradient]
        arrays.append(qwix.quantize(array, dtype, channelwise_axes=rows, scale_dtype=jnp.float32))
    with jax.numpy_dtype_promotion("standard"):
        y = qwix.einsum(text, *arrays, preferred_element_type=jnp.float32)
    return y.astype(options.get("preferred_element_type") or left.dtype)


def _qwix() -> ModuleType:
    try:
        import qwix
    except ImportError as error:
        raise ValueError("matmuls in 8 bits need qwix: pip install 'flaxzoo[quantized]'") from error
    return qwix

"""Products in 8 bits, for training: both sides are scaled row by row and rounded, and summed up in more bits (qwix)."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["none", "int8", "fp8"]
TYPES: dict[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),  # gradients need the wider range (2209.05433, 3)
}
"""What values and gradients are rounded to, by kind."""

_kind: ContextVar[Kind] = ContextVar("kind", default="none")


@contextlib.contextmanager
def quantized(kind: Kind) -> Iterator[None]:
    """Products with weights that are traced inside are computed in 8 bits, forward and backward.

    Raises ValueError where qwix, which does it, is not installed.
    """
    if kind != "none":
        _qwix()
    token = _kind.set(kind)
    try:
        yield
    finally:
        _kind.reset(token)


def current() -> Kind:
    """The kind of products that are asked for here."""
    return _kind.get()


def product(
    kind: Kind,
    text: str,
    left: Float[Array, "..."],
    right: Float[Array, "..."],
    *,
    gradient: Literal["", "left", "right"] = "",
    **options: Any,
) -> Float[Array, "..."]:
    """`jnp.einsum` of two arrays, in the dtype of the left one; `gradient` says which side is one.

    Each side has one scale for all that is summed up together, by which its largest magnitude takes up the range of the
    numbers there are. So nothing is lost to clipping, and the scales come out of the sum.
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
        found = qwix.einsum(text, *arrays, preferred_element_type=jnp.float32)
    return found.astype(options.get("preferred_element_type") or left.dtype)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ValueError("products in 8 bits need qwix: pip install 'flaxzoo[quantized]'") from error
    return qwix

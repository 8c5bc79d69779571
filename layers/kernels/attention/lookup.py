"""Indexing of an array in a mask or score, as a primitive that attention recognises in the jaxpr."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Int, Shaped


def lookup(
    table: Shaped[Array, "..."] | np.ndarray,
    *indices: Int[Array, "..."],
    axes: str,
    name: str,
    size: int = 1,
    kind: str | None = None,
) -> Shaped[Array, "..."]:
    """`table[indices]`, where `axes` ("B T") says which index each dimension takes: B, N, T or S, or 1 for none.

    Unlike `[]`, it becomes a slice if the indices are in order, and an array whose shape does not fit raises ValueError
    with its `name`. Dimensions T and S have an entry for each `size` positions. `kind` ("integer" or "bool"), if given,
    is checked. Integers of 8 and 16 bits are converted to int32.
    """
    if not isinstance(table, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an array, got {table!r}")
    if kind is not None:
        check_kind(table, kind, name)
    if jnp.issubdtype(table.dtype, jnp.integer) and table.dtype.itemsize < 4:
        table = table.astype(jnp.int32)  # kernels compare numbers of 32 bits
    if table.ndim != len(axes.split()) or len(indices) != table.ndim:
        raise ValueError(f"{name} must have the axes {axes}, got shape {table.shape}")
    return lookup_p.bind(table, *indices, axes=axes, name=name, size=size)


def check_kind(numbers: Any, kind: str, name: str) -> None:
    """Raises ValueError if numbers are not of a kind, "integer" or "bool"."""
    try:
        dtype: Any = np.dtype(np.int32) if type(numbers) is int else jnp.result_type(numbers)  # of any size
    except TypeError as error:
        raise ValueError(f"{name} must be a number or an array of type {kind}, got {numbers!r}") from error
    if not jnp.issubdtype(dtype, jnp.integer if kind == "integer" else jnp.bool_):
        raise ValueError(f"{name} must be of type {kind}, got {dtype}")


def _gather(table: Any, *indices: Any, **_: Any) -> Array:
    return jnp.asarray(table)[indices] if indices else jnp.asarray(table)


lookup_p = Primitive("lookup")
lookup_p.def_impl(_gather)
lookup_p.def_abstract_eval(
    lambda table, *indices, **_: ShapedArray(jnp.broadcast_shapes(*(index.shape for index in indices)), table.dtype)
)
mlir.register_lowering(lookup_p, mlir.lower_fun(_gather, multiple_results=False))


def _lookup_jvp(primals: Sequence[Any], tangents: Sequence[Any], **options: Any) -> tuple[Array, Any]:
    _, *indices = primals
    tangent = ad.instantiate_zeros(tangents[0])
    return lookup_p.bind(*primals, **options), _gather(tangent, *indices)


def _lookup_batch(arrays: Sequence[Any], dims: Sequence[Any], **_: Any) -> tuple[Array, int]:
    return jax.vmap(_gather, in_axes=tuple(dims))(*arrays), 0


ad.primitive_jvps[lookup_p] = _lookup_jvp
batching.primitive_batchers[lookup_p] = _lookup_batch

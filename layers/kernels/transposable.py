"""A linear function with a transpose of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Flat = Callable[..., list[Array]]
"""A function of residuals and arguments, as flat lists of arrays."""
Avals = tuple[ShapedArray, ...]


def with_transpose(
    forward: Callable[[Any, Any], Any], transpose: Callable[[Any, Any], Any], residuals: Any, x: Any, like: Any
) -> Any:
    """`forward(residuals, x)`, linear in x, with the transpose `transpose(residuals, y)`.

    With `jax.custom_jvp` this gives a function both modes of differentiation, each with a program of its own. Unlike
    `jax.custom_derivatives.linear_call` it works under `jax.vmap`, and it does not trace the mode that is not used.

    Args:
        forward: returns a pytree of the structure and types of `like`.
        transpose: returns a pytree of the structure and types of `x`.
        residuals: a pytree.
        x: a pytree.
        like: a pytree of arrays or shapes.
    """
    leaves, tree = jax.tree.flatten((residuals, x))
    count = len(jax.tree.leaves(residuals))
    like_leaves, like_tree = jax.tree.flatten(like)
    residuals_tree = jax.tree.structure(residuals)

    def flat_forward(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(forward(*tree.unflatten(leaves)))

    def flat_transpose(*leaves: Array) -> list[Array]:
        cotangents = transpose(residuals_tree.unflatten(leaves[:count]), like_tree.unflatten(leaves[count:]))
        assert jax.tree.structure(cotangents) == jax.tree.structure(x), (cotangents, x)
        return jax.tree.leaves(cotangents)

    results = linear_p.bind(
        *leaves,
        forward=flat_forward,
        transpose=flat_transpose,
        count=count,
        results=tuple(map(jax.typeof, like_leaves)),
        arguments=tuple(map(jax.typeof, leaves[count:])),
    )
    return like_tree.unflatten(results)


def _apply(*leaves: Array, forward: Flat, **_: Any) -> list[Array]:
    return forward(*leaves)


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], count: int, **rest: Any) -> Any:
    if not all(isinstance(tangent, ad.Zero) for tangent in tangents[:count]):
        raise NotImplementedError(
            "a linear function has no derivatives in its residuals; for attention, only implementation='reference' "
            "has second derivatives"
        )
    moved = [ad.instantiate_zeros(tangent) for tangent in tangents[count:]]
    return tuple(linear_p.bind(*values, count=count, **rest) for values in (primals, (*primals[:count], *moved)))


def _transpose(
    cotangents: Sequence[Any],
    *values: Any,
    count: int,
    forward: Flat,
    transpose: Flat,
    results: Avals,
    arguments: Avals,
) -> list[Any]:
    inputs = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    outputs = linear_p.bind(
        *values[:count],
        *inputs,
        count=count,
        forward=transpose,
        transpose=forward,
        results=arguments,
        arguments=results,
    )
    needed = (y if ad.is_undefined_primal(x) else None for x, y in zip(values[count:], outputs, strict=True))
    return [None] * count + list(needed)


def _batch(
    values: Sequence[Array],
    dims: Sequence[int | None],
    count: int,
    forward: Flat,
    transpose: Flat,
    results: Avals,
    arguments: Avals,
) -> tuple[list[Array], list[int]]:
    """Residuals without a batch dimension stay without it; every argument gets one."""
    size = next(x.shape[dim] for x, dim in zip(values, dims, strict=True) if dim is not None)

    def front(x: Array, dim: int | None) -> Array:
        return jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)

    moved = [
        x if dim is None and index < count else front(x, dim)
        for index, (x, dim) in enumerate(zip(values, dims, strict=True))
    ]
    axes = [None if dim is None else 0 for dim in dims[:count]]

    def mapped(function: Flat) -> Flat:
        return lambda *leaves: jax.vmap(function, in_axes=(*axes, *[0] * (len(leaves) - count)))(*leaves)

    def batched(avals: Avals) -> Avals:
        return tuple(ShapedArray((size, *aval.shape), aval.dtype) for aval in avals)

    outputs = linear_p.bind(
        *moved,
        count=count,
        forward=mapped(forward),
        transpose=mapped(transpose),
        results=batched(results),
        arguments=batched(arguments),
    )
    return outputs, [0] * len(outputs)


linear_p = Primitive("linear")
linear_p.multiple_results = True
linear_p.def_impl(_apply)
linear_p.def_abstract_eval(lambda *_, results, **__: list(results))
ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch
mlir.register_lowering(linear_p, mlir.lower_fun(_apply, multiple_results=True))

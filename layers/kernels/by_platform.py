"""Calls the function for the platform that a program is lowered for.

As `jax.lax.platform_dependent`, but a kernel is traced only if the program is lowered for its platform, so programs for
the CPU do not wait for kernels of others.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array


def by_platform(
    functions: Mapping[str, Callable[..., Any]], arguments: Any, like: Any, *, early: Collection[str] = ()
) -> Any:
    """`functions[platform](*arguments)`, or `functions["default"]`; arguments and result are pytrees.

    All functions must return results of the structure and types of `like`, which may be shapes. Without a default,
    lowering for another platform raises NotImplementedError. The functions of platforms in `early` are traced before
    lowering, when JAX looks for calls that XLA may partition among devices, such as those of cuDNN.
    """
    leaves, tree = jax.tree.flatten(arguments)
    like_leaves, like_tree = jax.tree.flatten(like)
    mesh = jax.sharding.get_abstract_mesh()

    def flat(function: Callable[..., Any]) -> Callable[..., list[Array]]:
        def call(*leaves: Array) -> list[Array]:
            with jax.sharding.use_abstract_mesh(mesh):  # lowering may happen outside of it
                outputs = function(*tree.unflatten(leaves))
            assert jax.tree.structure(outputs) == like_tree, (outputs, like_tree)
            return jax.tree.leaves(outputs)

        return call

    results = tuple(ShapedArray(x.shape, x.dtype) for x in like_leaves)
    late = tuple((name, flat(function)) for name, function in functions.items() if name not in early)
    traced: dict[str, Any] = {name: flat(function) for name, function in functions.items() if name in early}
    bind = partial(platform_p.bind, functions=late, results=results)
    if late and traced:
        traced["default"] = bind
    return like_tree.unflatten(jax.lax.platform_dependent(*leaves, **traced) if traced else bind(*leaves))


def _choose(functions: Sequence[tuple[str, Any]], platform: str) -> Callable[..., list[Array]]:
    by_name = dict(functions)
    function = by_name.get(platform, by_name.get("default"))
    if function is None:
        raise NotImplementedError(
            f"this call is implemented for {', '.join(by_name)} only, and the program is for another platform"
        )
    return function


def _eagerly(*leaves: Array, functions: Any, results: Any) -> list[Array]:
    if jax.config.jax_disable_jit:
        backend = jax.default_backend()
        return _choose(functions, "cuda" if backend == "gpu" else backend)(*leaves)
    return jax.jit(lambda *leaves: platform_p.bind(*leaves, functions=functions, results=results))(*leaves)


def _batch(values: Sequence[Any], dims: Sequence[Any], functions: Any, results: Any) -> tuple[list[Array], list[int]]:
    size = next(x.shape[dim] for x, dim in zip(values, dims, strict=True) if dim is not None)
    moved = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(values, dims, strict=True)]
    axes = tuple(None if dim is None else 0 for dim in dims)
    mapped = tuple((name, jax.vmap(function, in_axes=axes)) for name, function in functions)
    wide = tuple(ShapedArray((size, *aval.shape), aval.dtype) for aval in results)
    return platform_p.bind(*moved, functions=mapped, results=wide), [0] * len(wide)


def _lowered(platform: str) -> Any:
    def call(*leaves: Array, functions: Any, results: Any) -> list[Array]:
        return _choose(functions, platform)(*leaves)

    return mlir.lower_fun(call, multiple_results=True)


platform_p = Primitive("by_platform")
platform_p.multiple_results = True
platform_p.def_impl(_eagerly)
platform_p.def_abstract_eval(lambda *_, results, **__: list(results))
batching.primitive_batchers[platform_p] = _batch
mlir.register_lowering(platform_p, _lowered("default"))
for _platform in ("tpu", "cuda"):
    mlir.register_lowering(platform_p, _lowered(_platform), platform=_platform)

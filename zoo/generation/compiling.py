"""Functions compiled with the options that the compiler of a platform needs."""

import functools
from collections.abc import Callable
from typing import Any

import jax

OPTIONS: dict[str, dict[str, Any]] = {"tpu": {"xla_tpu_enable_dot_strength_reduction": False}}
"""Without it, XLA takes the products of a single row off the matrix units of a TPU, which are faster at them."""


def compiled_for(**jit: Any) -> Callable[[Callable[..., Any]], Callable[[str], Any]]:
    """Makes a function of a platform out of a function: that gives it under `jax.jit`, with arguments `jit`."""

    def decorate(function: Callable[..., Any]) -> Callable[[str], Any]:
        @functools.cache
        def on(platform: str) -> Any:
            return jax.jit(function, compiler_options=OPTIONS.get(platform), **jit)

        return on

    return decorate

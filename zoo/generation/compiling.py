"""Compilation with compiler options of the platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax

OPTIONS: dict[str, dict[str, Any]] = {"tpu": {"xla_tpu_enable_dot_strength_reduction": False}}
"""Otherwise XLA moves matmuls of a single row off the matrix units of a TPU, where they are faster."""


def compiled_for(**jit: Any) -> Callable[[Callable[..., Any]], Callable[[str], Any]]:
    """Decorates a function: called with a platform, it gives the function under `jax.jit(**jit)` for it."""

    def decorate(function: Callable[..., Any]) -> Callable[[str], Any]:
        @functools.cache
        def on(platform: str) -> Any:
            return jax.jit(function, compiler_options=OPTIONS.get(platform), **jit)

        return on

    return decorate

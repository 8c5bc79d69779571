"""The compilation cache of runs and commands."""

import jax

from ..data.cache import cache_folder


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in the cache folder unless JAX is configured with another one."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

"""The tests run on 8 CPU devices, with strict dtype promotion, shapes and types checked, and a cache of their own."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# JAX reads these when it is imported. A sharding that does nothing on one device hides bugs, hence 8.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
# The TPU compiler needs no TPU: do not look for one, and let several test processes load it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import hypothesis
import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Like static checkers, take an int where a float is annotated. beartype cannot resolve Self outside its own classes.
CHECKER = (
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, "
    "hint_overrides=beartype.FrozenDict({__import__('typing').Self: object})))"
)


def unchecked(register: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves the constructor of a registered dataclass unchecked: JAX calls it with whatever stands in for arrays."""

    @functools.wraps(register)
    def registered(nodetype: Any, *args: Any, **kwargs: Any) -> Any:
        if nodetype.__module__.startswith("flaxzoo."):
            nodetype.__no_type_check__ = True  # on a class, jaxtyping applies it to the constructor alone
        return register(nodetype, *args, **kwargs)

    return registered


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-jaxtyping", action="store_true", help="do not check shapes and types at run time")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("no_jaxtyping"):
        jax.tree_util.register_dataclass = unchecked(jax.tree_util.register_dataclass)
        jaxtyping.install_import_hook("flaxzoo", CHECKER)

    cache = tempfile.TemporaryDirectory(prefix="flaxzoo-tests-")
    os.environ["FLAXZOO_CACHE"] = cache.name
    config.add_cleanup(cache.cleanup)

    common = hypothesis.settings(deadline=None, derandomize="CI" in os.environ)
    hypothesis.settings.register_profile("quick", common, max_examples=10)
    hypothesis.settings.register_profile("thorough", common, max_examples=200)
    if not config.getoption("hypothesis_profile", None):
        marks = str(config.getoption("markexpr"))
        hypothesis.settings.load_profile("thorough" if "slow" in marks and "not slow" not in marks else "quick")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compilation cache of this process and of those that it starts."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", autouse=True)
def _compilation_cache(programs: Path) -> Iterator[None]:
    """Compiles programs that several tests have only once."""
    settings = {"jax_compilation_cache_dir": str(programs), "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def quick_compiler() -> Iterator[None]:
    """Compiles in half the time, for modules whose programs run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

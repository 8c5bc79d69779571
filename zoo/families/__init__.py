"""One file a family; each is found by being here."""

import importlib
import pkgutil

from .family import Family


def _found() -> tuple[Family, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Family))


FAMILIES = _found()
"""All families, in the order of their files."""

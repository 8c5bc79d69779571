"""Models and runs by name, as plain Python functions that return values."""

import inspect
from collections.abc import Callable
from pathlib import Path

from ..layers.spec import unknown
from ..zoo.decoder import Decoder
from . import files, models, runs
from .run import Balance as Balance
from .run import Data as Data
from .run import Optimizer as Optimizer
from .run import Run as Run


def _named[T](module: object, kind: type[T]) -> dict[str, Callable[[], T]]:
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name: made for name, made in functions if made.__annotations__.get("return") is kind and _plain(made)}


def _plain(function: Callable) -> bool:
    return all(p.default is not p.empty for p in inspect.signature(function).parameters.values())


MODELS = _named(models, Decoder)
"""Functions that make the named models."""

RUNS = _named(runs, Run)
"""Functions that make the named runs."""


def get(name: str) -> Decoder | Run:
    """The model or run of this name. Raises ValueError, with what is close to it, where there is none."""
    known = MODELS | RUNS
    if name not in known:
        raise unknown("model or run", name, known)
    return known[name]()


def get_run(name: str, *, ignore: tuple[str, ...] = (), text_only: bool = False) -> Run:
    """The run of this name or in this file (`files.load_run`).

    For the name of a model it is a run with the usual settings, for a checkpoint `runs.finetune`.

    Args:
        name: of the run, the model or the checkpoint.
        ignore: for a checkpoint, as of `zoo.load`.
        text_only: for a checkpoint, as of `zoo.load`.

    Raises ValueError on another name, and where the file or checkpoint can't be read.
    """
    if files.is_run_file(name):
        return files.load_run(name)
    if name in MODELS:
        return Run(model=MODELS[name]())
    if name in RUNS:
        return RUNS[name]()
    if "/" in name or Path(name).exists():
        return runs.finetune(name, ignore=ignore, text_only=text_only)
    raise unknown("run", name, RUNS)


def get_model(name: str) -> Decoder:
    """The model of this name, or that of the run of this name. Raises ValueError where there is none."""
    found = get(name)
    return found.model if isinstance(found, Run) else found

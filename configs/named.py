"""The named models and runs, and what a name, a file or a checkpoint stands for as a run."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..layers.spec import unknown
from ..zoo.decoder import Decoder
from . import files, models, runs
from .run import Run


def functions_returning[T](kind: type[T], module: ModuleType) -> dict[str, Callable[[], T]]:
    """The functions of a module, by name, that are annotated to return `kind` and can be called without arguments."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if function.__annotations__.get("return") is kind and _has_defaults(function)
    }


def _has_defaults(function: Callable[..., object]) -> bool:
    return all(p.default is not p.empty for p in inspect.signature(function).parameters.values())


MODELS = functions_returning(Decoder, models)
"""Functions that return the named models."""

RUNS = functions_returning(Run, runs)
"""Functions that return the named runs."""


def unknown_name(name: str, others: tuple[str, ...] = ()) -> ValueError:
    """The error for a name that no model, run, file or folder has; `others` are further names that are accepted."""
    return unknown("model or run", name, (*MODELS, *RUNS, *others))


def get(name: str) -> Decoder | Run:
    """The model or run of this name. Raises ValueError, with similar names, if there is none."""
    if name in MODELS:
        return MODELS[name]()
    if name in RUNS:
        return RUNS[name]()
    raise unknown_name(name)


def get_run(
    name: str,
    *,
    ignore: tuple[str, ...] = (),
    text_only: bool = False,
    devices: int = 1,
    accelerator: bool = False,
) -> Run:
    """The run that a name stands for: a named run, one in a file, or the usual run for a model or checkpoint.

    Args:
        name: a named run; a file (`files.load_run`); a named model, trained from random parameters
            (`runs.from_scratch`); or a checkpoint, which is fine-tuned (`runs.finetune`).
        ignore: for a checkpoint, as of `zoo.load`.
        text_only: for a checkpoint, as of `zoo.load`.
        devices: for a named model, as of `runs.from_scratch`.
        accelerator: for a named model, as of `runs.from_scratch`.

    Raises ValueError if the name is unknown, or the file or checkpoint cannot be read.
    """
    if files.is_run_file(name):
        return files.load_run(name)
    if name in MODELS:
        return runs.from_scratch(MODELS[name](), devices=devices, accelerator=accelerator)
    if name in RUNS:
        return RUNS[name]()
    if "/" in name or Path(name).exists():
        return runs.finetune(name, ignore=ignore, text_only=text_only)
    raise unknown_name(name)


def get_model(name: str) -> Decoder:
    """The model of this name, or that of the run of this name. Raises ValueError if there is none."""
    spec = get(name)
    return spec.model if isinstance(spec, Run) else spec

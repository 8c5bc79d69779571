"""Runs in a file of the user's own: Python, or JSON as a run's `config.json`."""

import contextlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .run import Run

SUFFIXES = (".py", ".json")


def is_run_file(name: str) -> bool:
    """Whether a name is that of a file with a run: `FILE.py`, `FILE.py:NAME` or `FILE.json`."""
    return _parts(name)[0].suffix in SUFFIXES


def run_name(name: str) -> str:
    """What a run from this file is called: NAME of `FILE.py:NAME`, else the name of the file without its suffix."""
    file, chosen = _parts(name)
    return chosen or file.stem


def load_run(name: str) -> Run:
    """The run in a file.

    A Python file defines a `Run`, or a function without required arguments that is annotated `-> Run`; where it defines
    several, NAME of `FILE.py:NAME` chooses one. A JSON file holds what `Run.to_dict()` returns.

    Raises ValueError where there is no such file, or it does not define a run.
    """
    file, chosen = _parts(name)
    if not file.is_file():
        raise ValueError(f"there is no file {file} (searched from {Path.cwd()})")
    return _from_json(file) if file.suffix == ".json" else _from_python(file, chosen)


def _parts(name: str) -> tuple[Path, str]:
    file, _, chosen = name.rpartition(":")
    return (Path(file), chosen) if file.endswith(".py") else (Path(name), "")


def _from_json(file: Path) -> Run:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"a run is a JSON object, got {type(data).__name__}")
        return Run.from_dict(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} does not hold a run: {error}; Run.to_dict() has the format") from error


def _from_python(file: Path, chosen: str) -> Run:
    module = f"flaxzoo_run_{file.stem}"
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded  # dataclasses look their module up
    with _beside(file):
        try:
            spec.loader.exec_module(loaded)
            candidates = {name: value for name, value in vars(loaded).items() if _makes_run(value, module)}
            if chosen and chosen not in candidates:
                raise ValueError(f"it defines no run {chosen!r}, but {', '.join(candidates) or 'none'}")
            if not chosen and len(candidates) != 1:
                raise ValueError(_choose(file, candidates))
            value = candidates[chosen or next(iter(candidates))]
            run = value if isinstance(value, Run) else value()
            if not isinstance(run, Run):
                raise ValueError(f"a function annotated -> Run must return one, got {type(run).__name__}")
            return run
        except Exception as error:  # the file may raise anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"cannot read a run from {file}{_line(error, file)}: {kind}{error}") from error


def _makes_run(value: Any, module: str) -> bool:
    if isinstance(value, Run):
        return True
    if not inspect.isfunction(value) or value.__module__ != module:
        return False
    returned = inspect.signature(value).return_annotation
    required = [p for p in inspect.signature(value).parameters.values() if p.default is p.empty]
    named = returned is Run or (isinstance(returned, str) and returned.rpartition(".")[2] == "Run")
    return named and not required


def _choose(file: Path, candidates: dict[str, Any]) -> str:
    if candidates:
        return f"it defines several runs; choose one: {', '.join(f'{file}:{name}' for name in candidates)}"
    return "it defines no run; write e.g. `run = configs.get_run('shakespeare').replace(steps=100)`"


def _line(error: Exception, file: Path) -> str:
    """The last line of the file that an error came from."""
    number, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            number = trace.tb_lineno
        trace = trace.tb_next
    return f", line {number}" if number else ""


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[None]:
    """Lets a file import what lies beside it, as a script does."""
    folder = str(file.absolute().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)

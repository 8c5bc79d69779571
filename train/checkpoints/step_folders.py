"""Folders named by step: listed, published and deleted whole, and the error for a disk that does not let us."""

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from . import manifest
from .array_store import required_bytes

_PARTIAL, _DELETED, _REPLACED = ".partial", ".deleted", ".replaced"


class SaveFailed(OSError):
    """A checkpoint could not be written; those that were whole before still are."""


def check_space(folder: Path, state: Any, copies: int) -> None:
    """Raise SaveFailed unless `folder` can be written and holds `copies` checkpoints of `state` (arrays or shapes).

    Those it holds already count as room: new ones take their place. A run needs `keep_last + keep_best + 1` copies.
    """
    need = copies * required_bytes(state)
    place = _existing(folder)
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise SaveFailed(report("hold checkpoints", folder, need, f"{place} is not a folder that can be written"))
    held = sum(path.stat().st_size for step in steps(folder) for path in (folder / str(step)).rglob("*"))
    if need > free(folder) + held:
        cause = f"{copies} copies of the state need {need - held:,} bytes more than it holds now"
        raise SaveFailed(report("hold checkpoints", folder, need, cause))


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, ascending; a folder that has no manifest is none."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if (path / manifest.NAME).is_file()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def partial(folder: Path, step: int) -> Path:
    """Where a checkpoint is written until it is whole."""
    return folder / f"{step}{_PARTIAL}"


def publish(folder: Path, step: int) -> None:
    """Give the complete folder of `step` its name; one that was there makes room, and comes back if we are killed."""
    final, old = folder / str(step), folder / f"{step}{_REPLACED}"
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial(folder, step).rename(final)
    manifest.sync(folder)
    if old.exists():
        shutil.rmtree(old)


def delete(path: Path) -> None:
    """Delete a checkpoint so that it is whole or unlisted at any moment."""
    away = path.with_name(path.name + _DELETED)
    path.rename(away)
    shutil.rmtree(away)


def clear(folder: Path) -> None:
    """Remove what a killed job left: half-written and half-deleted checkpoints."""
    for path in folder.iterdir():
        if not re.fullmatch(r"\d+\.(partial|deleted|replaced)", path.name):
            continue
        if path.suffix == _REPLACED and not (path.with_suffix("") / manifest.NAME).is_file():
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path)


def free(folder: Path) -> int:
    """Bytes that can still be written to `folder`."""
    return shutil.disk_usage(_existing(folder)).free


def command(folder: Path, *options: str) -> str:
    """The command that goes on with the run whose checkpoints are in `folder`."""
    run = folder.parent if folder.name == "checkpoints" else folder
    return f"`{shlex.join(['zoo', 'train', str(run), *options])}`"


def saved(folder: Path) -> str:
    """What of the run in `folder` is saved, and the command that goes on from there."""
    whole = steps(folder)
    if not whole:
        return f"no checkpoint is whole yet: {command(folder)} starts anew"
    return f"the last whole checkpoint is that of step {whole[-1]}: {command(folder)} goes on from there"


def report(doing: str, folder: Path, need: int | None, cause: str) -> str:
    """The message of SaveFailed: what, why, how much is needed and free, what is still there, the way out."""
    needs = "" if need is None else f"{need:,} bytes are needed and "
    whole = steps(folder)
    kept = f"the last whole checkpoint is step {whole[-1]}, still intact" if whole else "no checkpoint is whole yet"
    resume = f"; then {command(folder)} continues" if whole else ""
    return (
        f"cannot {doing} in {folder}: {cause}; {needs}{free(folder):,} are free there; {kept}. "
        f"Free space there, make it writable, or choose another folder{resume}"
    )


def cause(error: Exception) -> str:
    """What an error of the file system says, in one line."""
    text = f"{getattr(error, 'strerror', None) or error}".strip()
    if "No space left" in text:
        return "no space left on the device"
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"


def _existing(folder: Path) -> Path:
    """`folder`, or the closest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())

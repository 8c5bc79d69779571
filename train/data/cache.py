"""The cache folder. An entry is written under another name, behind a lock, and renamed when it is complete."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock


class CacheError(OSError, ValueError):
    """The cache folder cannot be written: no permission, no space, not a folder."""


class DamagedEntryError(ValueError):
    """A cache entry is not what was written there."""

    def __init__(self, entry: Path, reason: object):
        super().__init__(f"the cache entry {entry} is damaged ({reason}); delete it, and it is written again")


def cache_folder(cache: Path | None = None) -> Path:
    """The folder of tokenizers and tokens: `cache`, else $FLAXZOO_CACHE, else ~/.cache/flaxzoo."""
    return Path(cache or os.environ.get("FLAXZOO_CACHE") or "~/.cache/flaxzoo").expanduser().absolute()


def digest(*parts: Any) -> str:
    """20 hex digits that name plain data (numbers, strings, lists, dicts), the same in every process."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()


def filled(entry: Path, fill: Callable[[Path], None]) -> Path:
    """The cache entry, written by `fill(aside)` if it does not exist yet.

    If several processes need it, one writes it and the others wait. Remains of a killed process are removed.

    Args:
        entry: path of the file or folder.
        fill: writes a file or folder at the path it is given; OSErrors that are not the cache's it turns into others.

    Returns:
        The path of the complete entry.

    Raises:
        CacheError: the entry cannot be written.
    """
    if entry.exists():
        return entry
    aside = entry.with_name(entry.name + ".part")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_name(entry.name + ".lock")):
            if not entry.exists():
                _remove(aside)
                try:
                    fill(aside)
                    _flush(aside)
                    aside.replace(entry)
                finally:
                    _remove(aside)
    except OSError as error:
        raise CacheError(
            error.errno,
            f"cannot write the cache entry {entry} ({error.strerror or error}); "
            "free some space or name another folder in $FLAXZOO_CACHE",
        ) from error
    return entry


def _flush(path: Path) -> None:
    """Onto the disk before it is renamed: a machine that loses power leaves no empty entry."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

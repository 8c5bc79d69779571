"""Checksums of a checkpoint's files: written once all of them are whole, checked before any of them is read."""

import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1


class Damage(ValueError):
    """A file is not the one that was saved: `file`, relative to the checkpoint, and `problem` in words."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file = file
        self.problem = problem


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Force every file below `folder` to disk, then write the manifest: `facts`, and size and CRC-32 of each file."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _size_and_checksum(path, sync=True) for path in paths}
    content = {"format": FORMAT, **facts, "files": files}
    path = folder / NAME
    path.write_text(json.dumps({"checksum": _checksum_of(content), "content": content}, indent=1), encoding="utf-8")
    for each in (path, *folders):
        sync(each)


def read(folder: Path) -> dict[str, Any]:
    """The facts that `seal` wrote, and `"files"`; raises Damage where the manifest itself is missing or changed."""
    try:
        data = json.loads((folder / NAME).read_bytes())
        content, checksum = data["content"], data["checksum"]
    except FileNotFoundError:
        raise Damage(NAME, "missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damage(NAME, f"not readable as a manifest ({error})") from error
    if _checksum_of(content) != checksum:
        raise Damage(NAME, f"checksum {_checksum_of(content)}, its own record says {checksum}")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{folder} has the checkpoint format {content['format']}, this flaxzoo reads format {FORMAT}: "
            "install the flaxzoo that wrote it"
        )
    return content


def verify(folder: Path, files: dict[str, Any], wanted: Callable[[str], bool] = lambda name: True) -> int:
    """Compare the `wanted` ones of a manifest's `files` with those in `folder`; returns the bytes that were read.

    Raises Damage at the first file that is missing, or of another size or checksum.
    """
    files = {name: tuple(record) for name, record in files.items() if wanted(name)}
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            raise Damage(name, "missing")
        if path.stat().st_size != size:
            raise Damage(name, f"size {path.stat().st_size:,} bytes, {size:,} were saved")
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # zlib and reads release the interpreter's lock
        found = pool.map(lambda name: _size_and_checksum(folder / name), files)
        for (name, (_, checksum)), (_, now) in zip(files.items(), found, strict=True):
            if now != checksum:
                raise Damage(name, f"checksum {now}, {checksum} was saved: its content changed")
    return sum(size for size, _ in files.values())


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size_and_checksum(path: Path, *, sync: bool = False) -> tuple[int, str]:
    size = checksum = 0
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
            size += count
        if sync:
            os.fsync(file.fileno())
    return size, f"{checksum:08x}"


def _checksum_of(content: Any) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"

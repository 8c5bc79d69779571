"""The header of a GGUF file: metadata and where each tensor lies, of a file that nobody vouches for.

The reader of the `gguf` package trusts its file: a length past the end makes it loop for hours, and its arrays take one
object per element. This one checks every count against the bytes that are left before it believes it.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..json_file import JsonObject
from .blocks import Format, format_of

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
"""The letter that `struct` and numpy have for each of the format's numeric types, by its number there."""
BOOL, STRING, ARRAY = 7, 8, 9

_MAX_DIMS = 4
_MAX_NAME = 2**16  # bytes; the specification's limit of a key


@dataclass(frozen=True)
class Stored:
    """Where and how a tensor is stored."""

    shape: tuple[int, ...]
    """As in numpy: the fastest dimension last (GGUF itself has it first)."""
    format: Format
    offset: int
    """From the start of the file, in bytes."""
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data."""

    metadata: Mapping[str, object]
    """Strings, numbers, booleans; arrays are numpy arrays, or lists of strings."""
    tensors: Mapping[str, Stored]


def read_header(path: Path, data: np.ndarray) -> Header:
    """Reads and checks the header of a file whose bytes are `data`.

    Raises:
        ValueError: the file is no GGUF file of version 2 or 3, or it is cut off, contradicts itself, or holds what is
            not supported; the message names the file, the place and the value.
    """
    reader = _Reader(path, data)
    _check_version(reader)
    tensor_count, pair_count = reader.number("Q", "the number of tensors"), reader.number("Q", "the number of keys")
    # No entry can be shorter than so many bytes, so that absurd counts are known for what they are.
    reader.fits(pair_count, 8 + 4 + 1, f"{pair_count} metadata entries")
    reader.fits(tensor_count, 8 + 4 + 8 + 4 + 8, f"{tensor_count} tensors")
    metadata: JsonObject = {}
    for _ in range(pair_count):
        key = reader.name("a metadata key")
        if key in metadata:
            raise reader.error(f"the metadata key {key!r} occurs twice")
        metadata[key] = reader.value(key)
    if (parts := metadata.get("split.count", 1)) not in (0, 1):  # 0: merged again
        raise ValueError(f"{path} is one of {parts} parts of a model: merge them with `llama-gguf-split --merge`")
    entries = {}
    for _ in range(tensor_count):
        name = reader.name("a tensor's name")
        if name in entries:
            raise reader.error(f"the tensor {name!r} occurs twice")
        entries[name] = _entry(reader, name)
    return Header(metadata, _placed(reader, entries, metadata.get("general.alignment", 32)))


def _check_version(reader: "_Reader") -> None:
    if bytes(reader.take(4, "the magic number")) != b"GGUF":
        raise ValueError(f"{reader.path} is no GGUF file: it does not start with the bytes GGUF")
    version = reader.number("I", "the version")
    if version and not version & 0xFFFF:
        raise ValueError(f"{reader.path} is big-endian, which is not supported: convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise ValueError(f"{reader.path} has GGUF version {version}; versions 2 and 3 are supported: convert it anew")


def _entry(reader: "_Reader", name: str) -> tuple[tuple[int, ...], Format, int]:
    """Shape, format and relative offset of the next tensor."""
    dims = reader.number("I", f"the number of dimensions of {name!r}")
    if not 1 <= dims <= _MAX_DIMS:
        raise reader.error(f"a tensor has 1 to {_MAX_DIMS} dimensions, {name!r} has {dims}")
    shape = tuple(reader.number("Q", f"a dimension of {name!r}") for _ in range(dims))[::-1]
    number = reader.number("I", f"the format of {name!r}")
    offset = reader.number("Q", f"the offset of {name!r}")
    try:
        format = format_of(number)
    except ValueError as error:
        raise reader.error(f"the tensor {name!r} has {error}") from None
    if not all(shape) or shape[-1] % format.block:
        raise reader.error(
            f"the tensor {name!r} has shape {shape}; dimensions must be positive, and rows of {format.name} whole "
            f"blocks of {format.block}"
        )
    return shape, format, offset


def _placed(reader: "_Reader", entries: dict[str, tuple[tuple[int, ...], Format, int]], alignment: object) -> dict:
    """Where the tensors lie: each inside the file, aligned, apart from the others."""
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.error(f"general.alignment must be a power of two, got {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, (shape, format, offset) in entries.items():
        size = math.prod(shape) // format.block * format.bytes
        if offset % alignment or start + offset + size > reader.size:
            raise reader.error(
                f"the tensor {name!r} {format.name}{shape} takes the {size} bytes from {start} + {offset} on, which "
                f"must be a multiple of {alignment} and end inside the file of {reader.size} bytes"
            )
        tensors[name] = Stored(shape, format, start + offset, size)
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise reader.error(f"the tensors {before!r} and {name!r} overlap at byte {tensor.offset}")
        end, before = tensor.offset + tensor.size, name
    return tensors


class _Reader:
    """Reads one value after the other, and knows how many bytes are left."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.size, self.at = path, memoryview(data), data.size, 0

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged (near byte {self.at}): {what}")

    def fits(self, count: int, size: int, what: str) -> None:
        left = self.size - self.at
        if count * size > left:
            raise self.error(f"at least {count * size} bytes are needed for {what}, and {left} are left")

    def take(self, count: int, what: str) -> memoryview:
        self.fits(1, count, what)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter), what))[0]

    def text(self, what: str, most: int | None = None) -> str:
        length = self.number("Q", f"the length of {what}")
        if most is not None and not 0 < length <= most:
            raise self.error(f"{what} has 1 to {most} bytes, got {length}")
        raw = bytes(self.take(length, what))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {raw[:40]!r}") from error

    def strings(self, count: int, what: str) -> list[str]:
        """As `text` does, for vocabularies of hundreds of thousands."""
        found, length = [], struct.Struct("<Q")
        data, size, at = self.data, self.size, self.at
        for _ in range(count):
            end = at + 8 + (length.unpack_from(data, at)[0] if at + 8 <= size else 0)
            if end > size:
                self.at = at
                raise self.error(f"one of {what} ends at byte {end}, after the file's {size}")
            try:
                found.append(str(data[at + 8 : end], "utf-8"))
            except UnicodeDecodeError as error:
                self.at = at
                raise self.error(f"one of {what} is not UTF-8: {bytes(data[at + 8 : end])[:40]!r}") from error
            at = end
        self.at = at
        return found

    def name(self, what: str) -> str:
        return self.text(what, _MAX_NAME)

    def value(self, key: str) -> Any:
        kind = self.number("I", f"the type of {key!r}")
        return self.array(key) if kind == ARRAY else self.scalar(kind, key)

    def scalar(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind == STRING:
            return self.text(key)
        if kind == BOOL:
            value = self.number("B", key)
            if value > 1:
                raise self.error(f"the boolean {key!r} must be 0 or 1, got {value}")
            return bool(value)
        raise self.error(f"{key!r} has the type {kind}, which GGUF does not have")

    def array(self, key: str) -> Any:
        kind, count = self.number("I", f"the type of {key!r}"), self.number("Q", f"the length of {key!r}")
        what = f"the {count} elements of {key!r}"
        if kind in SCALARS or kind == BOOL:
            dtype = np.dtype("<" + SCALARS.get(kind, "B"))
            self.fits(count, dtype.itemsize, what)
            found = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
            return found if kind != BOOL else found != 0
        if kind == STRING:
            self.fits(count, 8, what)
            return self.strings(count, what)
        raise self.error(f"{key!r} is an array of type {kind}, which is not supported")

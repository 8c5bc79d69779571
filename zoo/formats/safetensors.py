"""One safetensors file, checked before anything is read from it.

The format: 8 bytes with the length of a JSON header (little endian), the header, then the bytes of the tensors without
gaps (https://huggingface.co/docs/safetensors). The `safetensors` library maps files into memory, so that a file cut
short while it is read kills the process, and gives slices of bfloat16 only to PyTorch; hence plain reads here.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .json_file import JsonObject
from .source import TensorInfo

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
"""Element types by the format's names."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The format's names of element types."""

MOST_HEADER = 100_000_000
"""Bytes that the format allows a header."""


class SafetensorsFile:
    """A file whose header is sound: every tensor lies inside, none over another, and no byte is left.

    Raises ValueError where it is not, naming file and tensor. Nothing is allocated for sizes that the header merely
    claims.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if length < 2 or length > min(MOST_HEADER, size - 8):
                raise self._bad(f"its header claims {length:,} bytes of a file of {size:,}")
            header = self._parsed(file.read(length))
        self._start, self._bytes = 8 + length, size - 8 - length
        self._offsets: dict[str, tuple[int, int]] = {}
        self.tensors: Mapping[str, TensorInfo] = {name: self._entry(name, entry) for name, entry in header.items()}
        self._check_cover()

    def read(self, name: str) -> np.ndarray:
        """One tensor, read from the file into memory of its own."""
        info, (begin, _) = self.tensors[name], self._offsets[name]
        count = math.prod(info.shape)
        data = np.fromfile(self.path, info.dtype, count, offset=self._start + begin)
        if data.size != count:
            raise self._bad(f"it was cut short while {name!r} was read")
        return data.reshape(info.shape)

    def _parsed(self, text: bytes) -> JsonObject:
        def once(pairs: list[tuple[str, Any]]) -> JsonObject:
            found = dict(pairs)
            if len(found) < len(pairs):
                raise ValueError("a name stands twice")
            return found

        try:
            header = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise self._bad("its __metadata__ is not an object of strings")
        return header

    def _entry(self, name: str, entry: object) -> TensorInfo:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"tensor {name!r} must have dtype, shape and data_offsets, got {str(entry)[:80]}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._bad(f"tensor {name!r} has the unknown dtype {str(dtype)[:20]!r}; known: {', '.join(DTYPES)}")
        if not _naturals(shape) or len(shape) > 8:
            raise self._bad(f"tensor {name!r} must have a shape of at most 8 natural numbers, got {str(shape)[:80]}")
        if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= self._bytes:
            raise self._bad(f"tensor {name!r} lies at {str(offsets)[:80]} of {self._bytes:,} bytes")
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if needed != offsets[1] - offsets[0]:
            raise self._bad(f"tensor {name!r} needs {needed:,} bytes for {dtype}{shape}, and has {offsets}")
        self._offsets[name] = (offsets[0], offsets[1])
        return TensorInfo(tuple(shape), DTYPES[dtype])

    def _check_cover(self) -> None:
        end, before = 0, "the header"
        for name, (begin, stop) in sorted(self._offsets.items(), key=lambda item: item[1]):
            if begin != end:
                raise self._bad(f"tensor {name!r} starts at {begin:,}, and {before} ends at {end:,}")
            end, before = stop, repr(name)
        if end != self._bytes:
            raise self._bad(f"its tensors end at {end:,} of {self._bytes:,} bytes")

    def _bad(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not a sound safetensors file: {what}; fetch it anew")


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**48 for v in value)

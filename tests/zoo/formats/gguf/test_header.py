"""Damaged and hostile files: one clear error each, without a crash, a long wait or a large allocation."""

import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flaxzoo.zoo.formats.gguf import GgufFile
from hypothesis import given
from hypothesis import strategies as st

HEAD = b"GGUF" + struct.pack("<I", 3)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*pairs: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    return HEAD + struct.pack("<QQ", tensor_count, pair_count) + b"".join(pairs) + b"".join(tensors)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, value: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    counted = struct.pack("<I", len(dims) if count is None else count)
    return text(name) + counted + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


A, B = tensor(b"a", (4,)), tensor(b"b", (4,), offset=32)
ALIGN = pair(b"general.alignment", 4, struct.pack("<I", 0))
DAMAGED = {
    "empty": (b"", "shorter than the header"),
    "magic": (b"GGML" + bytes(40), "does not start with the bytes GGUF"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1; versions 2 and 3"),
    "version 0": (b"GGUF" + bytes(40), "version 0"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "too many keys": (header(counts=(0, 2**60)), f"needed for {2**60} metadata entries"),
    "too many tensors": (header(counts=(2**63, 0)), f"needed for {2**63} tensors"),
    "cut in a key": (
        header(counts=(0, 1)) + struct.pack("<Q", 9) + b"general",
        "needed for a metadata key, and 7 are left",
    ),
    "long key": (header(counts=(0, 1)) + struct.pack("<Q", 2**40) + bytes(99), "1 to 65536 bytes, got 1099511627776"),
    "empty key": (header(pair(b"", 4, bytes(4))), "a metadata key has 1 to"),
    "not UTF-8": (header(pair(b"\xff\xfe", 4, bytes(4))), "not UTF-8"),
    "bad string": (header(pair(b"k", 8, text(b"\xc3("))), "k is not UTF-8"),
    "long string": (header(pair(b"k", 8, struct.pack("<Q", 2**62) + b"x")), "needed for k"),
    "unknown type": (header(pair(b"k", 13, bytes(8))), "the type 13, which GGUF does not have"),
    "boolean": (header(pair(b"k", 7, b"\x02")), "must be 0 or 1, got 2"),
    "twice": (header(pair(b"k", 4, bytes(4)), pair(b"k", 4, bytes(4))), "'k' occurs twice"),
    "huge array": (header(pair(b"k", 9, array(4, 2**61))), f"needed for the {2**61} elements of 'k'"),
    "huge array of strings": (header(pair(b"k", 9, array(8, 2**61))), f"needed for the {2**61} elements of 'k'"),
    "long string in an array": (
        header(pair(b"k", 9, array(8, 2, text(b"a") + bytes(7)))),
        "one of the 2 elements of 'k' ends",
    ),
    "bad string in an array": (
        header(pair(b"k", 9, array(8, 1, text(b"\xc3(")))),
        "one of the 1 elements of 'k' is not UTF-8",
    ),
    "nested arrays": (header(pair(b"k", 9, array(9, 1, array(4, 1, bytes(4))))), "'k' is an array of type 9"),
    "alignment 0": (header(ALIGN, tensors=(A,)) + bytes(99), "alignment must be a power of two, got 0"),
    "same name": (header(tensors=(A, A)) + bytes(99), "the tensor 'a' occurs twice"),
    "no dimensions": (header(tensors=(tensor(b"a", ()),)) + bytes(99), "1 to 4 dimensions, 'a' has 0"),
    "many dimensions": (header(tensors=(tensor(b"a", (), count=2**31),)) + bytes(99), f"'a' has {2**31}"),
    "dimension 0": (header(tensors=(tensor(b"a", (0,)),)) + bytes(99), r"shape \(0,\); dimensions must be positive"),
    "past the end": (header(tensors=(tensor(b"a", (2**20,)),)) + bytes(99), "end inside the file"),
    "overflow": (header(tensors=(tensor(b"a", (2**62, 2**62)),)) + bytes(99), "end inside the file"),
    "far away": (header(tensors=(tensor(b"a", (4,), offset=2**63),)) + bytes(99), "end inside the file"),
    "crooked": (header(tensors=(tensor(b"a", (4,), offset=8),)) + bytes(99), "must be a multiple of 32"),
    "overlap": (header(tensors=(A, tensor(b"b", (4,)))) + bytes(99), "'a' and 'b' overlap"),
    "half a block": (header(tensors=(tensor(b"a", (40,), kind=8),)) + bytes(99), "whole blocks of 32"),
    "format": (header(tensors=(tensor(b"a", (4,), kind=77),)) + bytes(99), "unknown format 77; supported are"),
    "parts": (header(pair(b"split.count", 2, struct.pack("<H", 3))), "one of 3 parts .*llama-gguf-split --merge"),
    "nothing in it": (header(tensors=(A, B)) + bytes(199), "has a matrix token_embd.weight, and this file has none"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(name: str, tmp_path: Path) -> None:
    data, message = DAMAGED[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data if len(data) >= 24 or not data else data + bytes(24 - len(data)))
    with pytest.raises(ValueError, match=message) as raised:
        GgufFile(path)
    assert str(path) in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.gguf"):
        with pytest.raises(ValueError, match="there is no file"):
            GgufFile(path)


def test_every_length_is_an_error(make: Any, llama: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """A file that is cut off anywhere is refused."""
    path = make(llama, weights)
    data = path.read_bytes()
    for length in [*range(0, 1800, 11), *range(1800, len(data) - 32, 2999)]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="GGUF|damaged"):
            GgufFile(path)


def check(path: Path) -> None:
    """Opens a file and reads all there is; errors are ValueErrors, and memory and time stay small."""
    start = time.monotonic()
    tracemalloc.start()
    try:
        file = GgufFile(path)
        for name, info in file.tensors.items():
            assert file.read(name).shape == info.shape
        file.tokenizer()
    except ValueError as error:
        if str(path) not in str(error):
            raise
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**24
    assert time.monotonic() - start < 20


@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes(changes: list[tuple[int, int]], valid: Path) -> None:
    data = bytearray(valid.read_bytes())
    for place, value in changes:
        data[place % 1600] = value  # the header takes about so much
    path = valid.with_name("changed.gguf")
    path.write_bytes(data)
    check(path)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
def test_changed_fields(seed: int, count: int, valid: Path) -> None:
    """Whole numbers at once become absurd: the large, the negative and the zero."""
    draw, data = random.Random(seed), bytearray(valid.read_bytes())
    for _ in range(count):
        at, value = draw.randrange(8, 1600), draw.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**20))
        data[at : at + 8] = struct.pack("<Q", value)
    path = valid.with_name("changed.gguf")
    path.write_bytes(data)
    check(path)


@given(data=st.binary(max_size=600), counts=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_random_headers(data: bytes, counts: tuple[int, int], valid: Path) -> None:
    path = valid.with_name("random.gguf")
    path.write_bytes(header(counts=counts) + data)
    check(path)

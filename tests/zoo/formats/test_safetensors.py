"""Safetensors files that cannot be trusted: a clear ValueError, and no crash, hang or giant allocation."""

import json
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flaxzoo.zoo.formats.safetensors import DTYPES, SafetensorsFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
    "scalar": np.asarray(2, np.int64),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("safetensors") / "good.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path.read_bytes()


def written(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_what_the_library_writes_is_read(tmp_path, good):
    (tmp_path / "a.safetensors").write_bytes(good)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert set(file.tensors) == set(TENSORS)
    for name, wanted in TENSORS.items():
        assert file.tensors[name].shape == wanted.shape
        np.testing.assert_array_equal(file.read(name), wanted, strict=True)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_the_librarys(tmp_path, name):
    if name == "BOOL":
        value = np.asarray([True, False])
    else:
        value = np.asarray([1, 2]).astype(DTYPES[name])
    path = written(tmp_path / "a", {"x": entry(0, value.nbytes, [2], name)}, value.tobytes())
    np.testing.assert_array_equal(SafetensorsFile(path).read("x"), value, strict=True)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", 0, "claims 0 bytes"),
        (b"[]", 0, "not a JSON object"),
        (b"{nonsense", 0, "not JSON"),
        (b"\xff\xfe{}", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
        (b'{"x":' + b"9" * 10_000 + b"}", 0, "not JSON"),
        (b'{"x": 1, "x": 2}', 0, "a name stands twice"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__"),
        ({"x": 3}, 0, "'x' must have dtype, shape and data_offsets"),
        ({"x": entry(0, 4) | {"more": 1}}, 4, "'x' must have dtype, shape and data_offsets"),
        ({"x": entry(0, 4, dtype="F31")}, 4, "unknown dtype 'F31'; known: F64"),
        ({"x": entry(0, 4, dtype=["F32"])}, 4, "unknown dtype"),
        ({"x": entry(0, 4, [-1])}, 4, "natural numbers"),
        ({"x": entry(0, 4, [True])}, 4, "natural numbers"),
        ({"x": entry(0, 4, [1.0])}, 4, "natural numbers"),
        ({"x": entry(0, 4, [1] * 9)}, 4, "at most 8 natural numbers"),
        ({"x": entry(0, 4, [2**47, 2**47])}, 4, "needs .* bytes"),
        ({"x": entry(0, 4, [2**62])}, 4, "natural numbers"),
        ({"x": entry(0, 4, [2])}, 4, "needs 8 bytes for F32.2., and has .0, 4."),
        ({"x": entry(0, 8)}, 4, r"lies at \[0, 8\] of 4 bytes"),
        ({"x": entry(4, 0, [])}, 4, r"lies at \[4, 0\]"),
        ({"x": entry(0, 8), "y": entry(4, 8)}, 8, "'y' starts at 4, and 'x' ends at 8"),
        ({"x": entry(0, 4), "y": entry(8, 12)}, 12, "'y' starts at 8, and 'x' ends at 4"),
        ({"x": entry(4, 8)}, 8, "'x' starts at 4, and the header ends at 0"),
        ({"x": entry(0, 4)}, 8, "end at 4 of 8 bytes"),
    ],
)
def test_bad_headers_are_told(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(written(tmp_path / "a", header, bytes(data)))


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 100_000_001, 3])
def test_a_length_beyond_the_file_is_told(tmp_path, length):
    with pytest.raises(ValueError, match="claims"):
        SafetensorsFile(written(tmp_path / "a", b"{}", length=length))


def test_a_file_cut_short_is_told(tmp_path, good):
    path = tmp_path / "a"
    for size in (0, 7, 8, 20, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="not a sound safetensors file: .*; fetch it anew"):
            SafetensorsFile(path)
    path.write_bytes(good)
    file = SafetensorsFile(path)
    path.write_bytes(good[:-70])
    with pytest.raises(ValueError, match="cut short while 'a.weight' was read"):
        file.read("a.weight")
    with pytest.raises(ValueError, match="is missing"):
        SafetensorsFile(tmp_path / "none")


LEAVES = st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.sampled_from([*DTYPES])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*DTYPES]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
OFFSETS = st.lists(st.integers(-2, 80), min_size=2, max_size=2)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES]) | JSON,
        "shape": st.lists(st.integers(-1, 20) | st.sampled_from([2**40, 2**63]), max_size=3) | JSON,
        "data_offsets": OFFSETS | JSON,
    }
)
HEADERS = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRIES | JSON, max_size=4) | JSON


def opened(path: Path) -> None:
    """Opens and reads everything, or raises ValueError; in little memory either way."""
    tracemalloc.start()
    try:
        file = SafetensorsFile(path)
        for name in file.tensors:
            file.read(name)
    except ValueError as error:
        if str(path) not in str(error):  # not one of ours
            raise
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1_000_000 + 50 * path.stat().st_size


@given(header=HEADERS, data=st.binary(max_size=80))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_or_told(tmp_path, header, data):
    opened(written(tmp_path / "a", header, data))


@given(place=st.integers(0, 10_000), new=st.binary(min_size=1, max_size=9), cut=st.integers(0, 10_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_read_or_told(tmp_path, good, place, new, cut):
    place, cut = place % len(good), cut % (len(good) + 1)
    (tmp_path / "a").write_bytes((good[:place] + new + good[place + len(new) :])[: len(good) - cut % 40])
    opened(tmp_path / "a")

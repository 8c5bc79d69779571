"""Every format reads to what llama.cpp's reference makes of it (tests/truth/README.md)."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flaxzoo.zoo.formats.gguf import GgufFile, blocks

TRUTH = np.load(Path(__file__).parents[3] / "truth/gguf/blocks.npz")
NAME = "blk.0.ffn_up.weight"


@pytest.mark.parametrize("format", [name for name in blocks.FORMATS if f"{name}/raw" in TRUTH])
def test_blocks(format: str, make: Any, llama: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    del weights[NAME]
    file = GgufFile(make(llama, {**weights, f"{NAME}@{format}": TRUTH[f"{format}/raw"]}))
    x = file.read("model.layers.0.mlp.up_proj.weight")
    np.testing.assert_array_equal(x, TRUTH[f"{format}/f32"])
    assert file.tensors["model.layers.0.mlp.up_proj.weight"].shape == x.shape
    assert file.tensors["model.layers.0.mlp.up_proj.weight"].dtype == x.dtype == np.float32


def test_every_format_is_tested() -> None:
    plain = {"F32", "F16", "BF16"}
    assert {name for name in blocks.FORMATS if f"{name}/raw" in TRUTH} | plain == set(blocks.FORMATS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain(dtype: Any, make: Any, llama: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    x = weights[NAME].astype(dtype)
    del weights[NAME]
    stored = {f"{NAME}@BF16": x.view(np.uint8)} if dtype is ml_dtypes.bfloat16 else {NAME: x}
    file = GgufFile(make(llama, {**weights, **stored}))
    found = file.read("model.layers.0.mlp.up_proj.weight")
    assert found.dtype == file.tensors["model.layers.0.mlp.up_proj.weight"].dtype == x.dtype
    np.testing.assert_array_equal(found, x)
    assert not found.flags.writeable  # a view of the file


def test_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are dequantized a few at a time, the last ones too."""
    raw = np.concatenate([TRUTH["Q4_K/raw"]] * 5)
    monkeypatch.setattr(blocks, "_SLAB", 3 * 1024)
    x = blocks.decode(raw, blocks.format_of(12), (10, 1024))
    np.testing.assert_array_equal(x, np.concatenate([TRUTH["Q4_K/f32"]] * 5))


def test_encode() -> None:
    q8 = blocks.format_of(8)
    np.testing.assert_array_equal(blocks.encode(TRUTH["Q8_0/source"], q8), TRUTH["Q8_0/raw"])
    np.testing.assert_array_equal(blocks.encode(TRUTH["Q8_0/f32"], q8), TRUTH["Q8_0/raw"])  # again: nothing changes
    with pytest.raises(ValueError, match="up to 65504, got 70000"):
        blocks.encode(np.array([1, -70000], np.float32), blocks.format_of(1))
    with pytest.raises(ValueError, match="got nan"):
        blocks.encode(np.full(32, np.nan, np.float32), q8)


@pytest.mark.parametrize(("number", "name"), [(16, "IQ2_XXS"), (28, "F64"), (9, "Q8_1"), (4, "unknown format 4")])
def test_other_formats(number: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}; supported are F32, F16"):
        blocks.format_of(number)

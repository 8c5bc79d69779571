"""Converting: from tensor to tensor, with everything that came along."""

import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo import zoo
from safetensors.numpy import load_file, save_file

TRUTH = Path(__file__).parents[2] / "truth"


def test_a_folder_is_copied_with_its_companions(tmp_path):
    source = Path(shutil.copytree(TRUTH / "qwen3", tmp_path / "source"))
    for name in ("generation_config.json", "tokenizer_config.json", "pytorch_model.bin", "modeling.py"):
        (source / name).write_text("{}")
    told: list[tuple[int, int]] = []
    zoo.convert(source, tmp_path / "out", dtype="bfloat16", progress=lambda *now: told.append(now))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    wanted = load_file(source / "model.safetensors")
    found = zoo.open_source(tmp_path / "out")
    assert found.tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found.read(name), value.astype(jnp.bfloat16), strict=True)
    size = sum(value.nbytes for value in wanted.values())
    assert told[-1] == (size, size)


def test_what_cannot_be_loaded_is_not_converted(tmp_path):
    source = Path(shutil.copytree(TRUTH / "qwen3", tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match="missing model.norm.weight"):
        zoo.convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("destination", "dtype", "message"),
    [
        ("out", "Q8_0", "unknown dtype for out, a folder, 'Q8_0'. Known: bfloat16, float16, float32"),
        ("out.gguf", "bfloat16", "unknown dtype for out.gguf, a .gguf file, 'bfloat16'. Known: F16, Q8_0"),
        ("file", "", "file exists already"),
        ("folder.gguf", "", "folder.gguf exists already"),
    ],
)
def test_mistakes_are_told(tmp_path, destination, dtype, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ValueError, match=message):
        zoo.convert(TRUTH / "llama", tmp_path / destination, dtype=dtype)


def test_the_folder_of_a_run_needs_training_to_be_imported(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"kind": "Run"}')
    monkeypatch.delitem(sys.modules, "flaxzoo.train", raising=False)
    with pytest.raises(ValueError, match="is the folder of a run: `import flaxzoo.train` first"):
        zoo.convert(tmp_path, tmp_path / "out")

"""The cache of tokens and tokenizers is checked before it is used."""

import json
from pathlib import Path

import numpy as np
import pytest
from flaxzoo.configs.run import Data
from flaxzoo.train import data as text


def load(tmp_path: Path, verify: bool = False) -> text.Batches:
    if not (tmp_path / "a.txt").exists():
        (tmp_path / "a.txt").write_text("some words that are trained on\n" * 100)
    data = Data(source=(str(tmp_path / "a.txt"),))
    return text.load(data, vocab=300, length=16, batch=2, seed=0, cache=tmp_path / "cache", verify=verify)


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """The folder of a source's tokens."""
    load(tmp_path)
    (folder,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    return folder


def change(file: Path, damage: str) -> None:
    data = file.read_bytes()
    if damage == "half":
        file.write_bytes(data[: len(data) // 4 * 2])
    elif damage == "longer":
        file.write_bytes(data + data[:2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "missing":
        file.unlink()
    elif damage == "id":
        tokens = np.frombuffer(data, "<u2").copy()
        tokens[-3] = 60000
        file.write_bytes(tokens.tobytes())
    elif damage == "list":
        file.write_bytes(b"[]")
    elif damage == "number":
        content = json.loads(data)
        content["meta"]["heldout"] = []
        file.write_bytes(json.dumps(content).encode())
    elif damage == "not utf-8":
        file.write_bytes(b"\xff" + data)


@pytest.mark.parametrize("damage", ["half", "longer", "empty", "missing", "id"])
def test_damaged_tokens_name_the_entry(tmp_path: Path, entry: Path, damage: str):
    change(entry / "tokens", damage)
    with pytest.raises(ValueError, match=rf"the cache entry {entry} is damaged .*; delete it"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["half", "empty", "missing", "list", "number", "not utf-8"])
def test_a_damaged_description_names_the_entry(tmp_path: Path, entry: Path, damage: str):
    change(entry / "meta.json", damage)
    with pytest.raises(ValueError, match=rf"the cache entry {entry} is damaged .*; delete it"):
        load(tmp_path)


def test_a_resumed_run_compares_the_checksum(tmp_path: Path, entry: Path):
    assert load(tmp_path, verify=True).order == load(tmp_path).order
    tokens = np.fromfile(entry / "tokens", "<u2")
    tokens[[3, 4]] = tokens[[4, 3]]
    tokens.tofile(entry / "tokens")
    load(tmp_path)
    with pytest.raises(ValueError, match=rf"{entry} is damaged \(the checksum of tokens is"):
        load(tmp_path, verify=True)


@pytest.mark.parametrize("damage", ["half", "empty", "list"])
def test_a_damaged_tokenizer_names_the_entry(tmp_path: Path, entry: Path, damage: str):
    (file,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    change(file, damage)
    with pytest.raises(ValueError, match=rf"the cache entry {file} is damaged .*; delete it"):
        load(tmp_path)

"""Recommended sampling settings and named special tokens go into a GGUF file and back."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from chat_checkpoint import checkpoint, tokenizer_of_bytes
from flaxzoo import zoo
from flaxzoo.zoo.formats.gguf.sampling import read_sampling

ALL = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}


@pytest.mark.parametrize("fields", [ALL, {"temperature": 0.3}, {"do_sample": False, "top_k": 20}, {"top_p": 1}, {}])
def test_folder_to_gguf_and_back(fields: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", tokenizer_of_bytes("<s>", "<|im_end|>"))
    (source / "generation_config.json").write_text(json.dumps(fields))
    zoo.convert(source, tmp_path / "model.gguf")
    zoo.convert(tmp_path / "model.gguf", tmp_path / "again")
    sampling = zoo.open(source).sampling
    for name in ("model.gguf", "again"):
        assert zoo.open(tmp_path / name).sampling == sampling, name
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {name: value for name, value in written.items() if name != "eos_token_id"} == (
        {"do_sample": True} if "temperature" in fields else {}
    ) | fields | ({"temperature": 0.0} if fields.get("do_sample") is False else {})
    keys = {
        name.removeprefix("general.sampling."): field.contents()
        for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()
        if name.startswith("general.sampling.")
    }
    names = {"temperature": "temp", "repetition_penalty": "penalty_repeat"}
    assert keys.keys() - {"penalty_last_n"} == {names.get(name, name) for name in written} - {
        "do_sample",
        "eos_token_id",
    }
    assert keys.get("penalty_last_n") == (-1 if "repetition_penalty" in fields else None)


def test_what_gguf_has_no_key_for_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = checkpoint(tmp_path / "source", tokenizer_of_bytes("<s>", "<|im_end|>"))
    fields = {"max_new_tokens": 512, "typical_p": None, "eos_token_id": 258, "transformers_version": "5.0.0"}
    (source / "generation_config.json").write_text(json.dumps(fields))
    zoo.convert(source, tmp_path / "model.gguf")
    assert "no key for these fields of generation_config.json: max_new_tokens: left out" in caplog.text


def test_values_of_llama_cpp(caplog: pytest.LogCaptureFixture) -> None:
    """Values that switch a filter off in llama.cpp do here, too; keys that no field has are logged."""
    off = {"temp": -1.0, "top_k": -1, "top_p": 1.5, "min_p": -0.5, "penalty_repeat": 1.0, "penalty_last_n": -1}
    fields = read_sampling({f"general.sampling.{key}": value for key, value in off.items()})
    assert fields == {
        **{"do_sample": False, "temperature": 0, "top_k": 0, "top_p": 1.0, "min_p": 0, "repetition_penalty": 1.0}
    }
    assert not caplog.text
    assert read_sampling({"general.sampling.mirostat": 2, "general.sampling.xtc_probability": 0.0}) == {}
    assert "sampling settings that are not supported: mirostat=2: left out" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"), [("temp", "hot", "must be a number, got 'hot'"), ("top_p", -0.5, "top_p must be")]
)
def test_damaged_settings(
    key: str, value: Any, message: str, make: Any, llama: dict[str, Any], weights: dict[str, Any]
) -> None:
    path: Path = make({**llama, f"general.sampling.{key}": value}, weights)
    zoo.load(path)  # the model does not depend on them
    with pytest.raises(ValueError, match=f"general.sampling.*{message}"):
        zoo.open(path)


def test_special_tokens_that_only_other_files_name(tmp_path: Path) -> None:
    tokenizer = tokenizer_of_bytes("<s>", "<|im_end|>", "<pad>")
    source = checkpoint(tmp_path / "source", tokenizer)
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (source / "generation_config.json").write_text('{"pad_token_id": 259, "eos_token_id": 258}')
    config = json.loads((source / "config.json").read_text())
    assert config["bos_token_id"] is config["pad_token_id"] is None
    zoo.convert(source, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "padding")]
    assert ids == [257, 258, 259]

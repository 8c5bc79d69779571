"""Unknown fields that the caller vouches for, and the text model of a multimodal checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from flaxzoo import configs, zoo
from flaxzoo.train.commands import cli
from flaxzoo.train.runs import loop
from flaxzoo.zoo.families import registry
from flaxzoo.zoo.formats.gguf import GgufFile
from flaxzoo.zoo.parameters import split
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[2] / "truth"
ODD = {"odd_field": 3}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "odd_rope_field": 1}


def folder_of(path: Path, name: str, config: dict[str, Any], prefix: str = "") -> Path:
    """A tiny checkpoint with another config, and with names of tensors as in a multimodal one."""
    shutil.copytree(TRUTH / name, path)
    tensors = load_file(path / "model.safetensors")
    if prefix:
        outer = {prefix.format(key): value for key, value in tensors.items()}
        if prefix.startswith("model."):
            outer = {
                key if key.startswith("lm_head") else f"model.language_model.{key.removeprefix('model.')}": value
                for key, value in tensors.items()
            }
        tensors = outer | {"vision_tower.patch.weight": next(iter(tensors.values()))}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a")).save(str(path / "tokenizer.json"))
    return path


def fields(name: str) -> dict[str, Any]:
    return json.loads((TRUTH / name / "config.json").read_text())


def test_ignored_fields_at_every_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = fields("llama") | ODD | {"rope_parameters": ROPE}
    odd = folder_of(tmp_path / "odd", "llama", config)
    ignore = ["odd_field", "odd_rope_field"]
    with pytest.raises(ValueError, match=r"odd_rope_field.*ignore=.*--ignore"):
        zoo.load(odd, ignore=ignore[:1])
    with pytest.raises(ValueError, match=r"do not know|does not know: odd_field=3.*--ignore odd_field"):
        zoo.load(odd, ignore=ignore[1:])
    model = zoo.load(odd, ignore=ignore)[0]
    assert "ignored fields of the config: odd_field, odd_rope_field" in caplog.text
    assert zoo.load(odd, ignore=["odd_field", "rope_parameters.odd_rope_field"])[0].spec == model.spec
    source = zoo.open_source(odd, ignore=ignore)
    assert "odd_field" not in source.config
    assert zoo.load(zoo.open_source(TRUTH / "llama"), ignore=ignore)[0].spec.dim == model.spec.dim
    zoo.convert(odd, tmp_path / "new", ignore=ignore)
    (odd / "tokenizer.json").unlink()
    zoo.convert(odd, tmp_path / "new.gguf", ignore=ignore)
    assert zoo.load(tmp_path / "new")[0].spec == zoo.load(tmp_path / "new.gguf")[0].spec == model.spec
    run = configs.get_run(str(odd), ignore=tuple(ignore))
    assert run.ignore == tuple(ignore)


def test_known_fields_are_not_ignored() -> None:
    config = fields("mistral")
    assert registry.read(config, ignore=["sliding_window", "hidden_size"]) == registry.read(config)
    assert registry.ignored_fields(config | ODD, ["sliding_window", "odd_field"]) == ["odd_field"]


def test_ignored_keys_of_gguf(tmp_path: Path) -> None:
    import gguf

    zoo.convert(TRUTH / "llama", tmp_path / "plain.gguf")
    reader, writer = gguf.GGUFReader(tmp_path / "plain.gguf"), gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:])
    writer.add_float32("llama.odd_key", 2.0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"llama\.odd_key=2\.0.*--ignore llama\.odd_key"):
        GgufFile(tmp_path / "odd.gguf")
    assert zoo.load(tmp_path / "odd.gguf", ignore=["llama.odd_key"])[0].spec


@pytest.mark.parametrize("prefix", ["language_model.{}", "model.language_model."])
def test_text_only(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inner = fields("gemma3_text")
    config = {"model_type": "gemma3", "text_config": inner, "vision_config": {"a": 1}, "mm_tokens_per_image": 256}
    both = folder_of(tmp_path / "both", "gemma3_text", config, prefix)
    with pytest.raises(ValueError, match="multimodal, .* family 'gemma3_text': .*text_only=True .*--text-only"):
        zoo.load(both)
    model, tokenizer = zoo.load(both, text_only=True)
    assert tokenizer is not None
    alone = split(zoo.load(TRUTH / "gemma3_text")[0])
    assert all((alone[name] == value).all() for name, value in split(model).items())
    assert "left out 1 of" in caplog.text
    assert "vision_tower.patch" in caplog.text
    assert "(mm_tokens_per_image, vision_config)" in caplog.text
    zoo.convert(both, tmp_path / "text", text_only=True)
    assert zoo.load(tmp_path / "text")[0].spec == model.spec
    assert configs.get_run(str(both), text_only=True).model == model.spec


def test_gemma3_4b_as_published() -> None:
    """Its text_config leaves out what the config class of transformers has as defaults."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    assert not registry.differences(registry.read(text), configs.get_model("gemma3_4b").replace(vocab=262_208))


def test_no_family_of_the_text_part(tmp_path: Path) -> None:
    config = {"model_type": "odd_vl", "text_config": {"model_type": "odd"}}
    folder = folder_of(tmp_path / "odd", "llama", config, "language_model.{}")
    with pytest.raises(ValueError, match="no family has the model_type 'odd_vl'"):
        zoo.load(folder)
    with pytest.raises(ValueError, match="the text part .* is of the model_type 'odd', and no family has it"):
        zoo.load(folder, text_only=True)


@pytest.mark.parametrize(
    ("name", "close"),
    [("mistrl", "mistral"), ("gema2", "gemma2"), ("qwn3", "qwen3")]
    + [(name, None) for name in ("llama4", "gemma4_text", "llava", "rwkv", "qwen3_next", "phi", "mamba2", None, 5)],
)
def test_did_you_mean_is_for_typos(name: Any, close: str | None) -> None:
    with pytest.raises(ValueError, match="no family has the model_type") as raised:
        registry.find({"model_type": name})
    assert ("did you mean" in str(raised.value)) == (close is not None)
    assert close is None or f"did you mean {close!r}" in str(raised.value)
    assert "deepseek_v2, deepseek_v3, gemma" in str(raised.value)


def test_flags_of_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    odd = folder_of(tmp_path / "odd", "llama", fields("llama") | ODD)
    cli.dispatch(["convert", str(odd), str(tmp_path / "new"), "--ignore", "odd_field"])
    assert zoo.load(tmp_path / "new")[0].spec
    cli.dispatch(["generate", str(odd), "--ignore", "odd_field", "--max-tokens", "1", "--prompt", "a"])
    runs: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda run, *_, **__: runs.append(run))
    cli.dispatch(["train", str(odd), "--ignore", "odd_field", "other", "--steps", "1"])
    assert runs[0].ignore == ("odd_field", "other")
    for command in ("generate", "chat", "eval", "convert", "show", "shard", "diff", "plan"):
        with pytest.raises(SystemExit):
            cli.dispatch([command, "--help"])
        help_text = capsys.readouterr().out
        assert "--ignore" in help_text
        assert "--text-only" in help_text

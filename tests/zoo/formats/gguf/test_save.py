"""What is written: readable by others, complete or not there, and nothing the format cannot say."""

import contextlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from flaxzoo import zoo
from flaxzoo.zoo.formats.gguf import GgufFile, save_gguf
from flaxzoo.zoo.formats.gguf.save import _special, architecture_for, complete_config

TRUTH = Path(__file__).parents[3] / "truth"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 5,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": [0, 3, 4],
    "tie_word_embeddings": True,
}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    layer = {
        "self_attn.q_proj.weight": (32, 32),
        "self_attn.k_proj.weight": (16, 32),
        "self_attn.v_proj.weight": (16, 32),
        "self_attn.o_proj.weight": (32, 32),
        "mlp.gate_proj.weight": (48, 32),
        "mlp.up_proj.weight": (48, 32),
        "mlp.down_proj.weight": (32, 48),
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
    }
    shapes = {"model.embed_tokens.weight": (5, 32), "model.norm.weight": (32,)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_q8_0(memory: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Numbers are those of the `gguf` package's quantization, and quantizing them again changes nothing."""
    path = tmp_path / "model.gguf"
    save_gguf(memory(CONFIG, arrays), path, "Q8_0", chat_template="{{ messages }}")
    file, q8 = GgufFile(path), gguf.GGMLQuantizationType.Q8_0
    assert file.chat_template == "{{ messages }}"
    for name, x in arrays.items():
        down = name.endswith("down_proj.weight")  # rows of 48 are not whole blocks of 32
        if x.ndim == 1:
            wanted = x
        elif down:
            wanted = x.astype(np.float16)
        else:
            wanted = gguf.dequantize(gguf.quantize(x, q8), q8)
        np.testing.assert_array_equal(file.read(name), wanted)
    save_gguf(file, tmp_path / "again.gguf", "Q8_0")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_others_read_it(memory: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_gguf(memory(CONFIG, arrays), tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["llama.rope.dimension_count"] == values["llama.attention.key_length"] == 8
    assert values["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert values["llama.vocab_size"] == 5
    assert values["general.name"] == "model"
    assert [values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "eom")] == [0, 0, 3, 4]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    q = arrays["model.layers.0.self_attn.q_proj.weight"].astype(np.float16)
    found = tensors["blk.0.attn_q.weight"].data
    for head in range(4):  # the first rows of the halves of a head lie side by side
        np.testing.assert_array_equal(found[8 * head : 8 * head + 4], q[[8 * head + i for i in (0, 4, 1, 5)]])
    assert GgufFile(tmp_path / "model.gguf").config["eos_token_id"] == [0, 3, 4]


def test_bfloat16(memory: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    import ml_dtypes

    halves = {name: x.astype(ml_dtypes.bfloat16) for name, x in arrays.items()}
    save_gguf(memory(CONFIG, halves), tmp_path / "model.gguf")
    file = GgufFile(tmp_path / "model.gguf")
    for name, x in halves.items():  # 8 bits of mantissa fit F16, whose exponents these numbers do not leave
        np.testing.assert_allclose(file.read(name).astype(np.float32), x.astype(np.float32), rtol=0, atol=2**-24)


def test_chat_template(memory: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """It goes from a Hugging Face folder into the file and back."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    save_gguf(memory(CONFIG, arrays), tmp_path / "plain.gguf")
    zoo.convert(tmp_path / "plain.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder/chat_template.jinja").exists()
    for name, described in (("one", template), ("several", [{"name": "default", "template": template}])):
        text = json.dumps({"chat_template": described})
        (tmp_path / "folder/tokenizer_config.json").write_text(text, encoding="utf-8")
        zoo.convert(tmp_path / "folder", tmp_path / f"{name}.gguf")
        assert GgufFile(tmp_path / f"{name}.gguf").chat_template == template
        zoo.convert(tmp_path / f"{name}.gguf", tmp_path / name)
        assert (tmp_path / name / "chat_template.jinja").read_text(encoding="utf-8") == template


def test_tokens_that_are_none() -> None:
    """Many configs have a pad_token_id of -1."""
    assert _special({"pad_token_id": -1, "eos_token_id": [2, -1]}, None) == {"tokenizer.ggml.eos_token_id": 2}


WRONG = {
    "unknown type": ({"model_type": "rwkv"}, {}, "of type 'rwkv' cannot be written as GGUF; known are deepseek_v2"),
    "no type": ({"model_type": None}, {}, "of type None cannot be written"),
    "window": (
        {"model_type": "mistral", "sliding_window": 4096},
        {},
        "GGUF cannot say sliding_window=4096 of a mistral model: .* assume None",
    ),
    "activation": ({"hidden_act": "gelu"}, {}, "hidden_act='gelu' of a llama model"),
    "rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, "this RoPE scaling cannot be said in GGUF"),
    "factors": (
        {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}},
        {},
        "this RoPE scaling cannot be said",
    ),
    "mscale": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {},
        "RoPE scaling cannot be said",
    ),
    "missing": ({"hidden_size": None}, {}, "'llama': the config has no hidden_size"),
    "length": ({"max_position_embeddings": "64"}, {}, "max_position_embeddings must be a whole number"),
    "pads": ({"pad_token_id": [1, 2]}, {}, "room for 1 token as pad_token_id"),
    "left over": ({}, {"model.extra.weight": np.zeros(3)}, "1 tensors are not known .* llama: model.extra.weight"),
    "large": (
        {},
        {"model.embed_tokens.weight": np.full((5, 32), 1e6)},
        "token_embd.weight cannot be written: F16 holds",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str, memory: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Each has one clear error, and what was there before stays."""
    config, more, message = WRONG[name]
    path = tmp_path / "model.gguf"
    path.write_text("before")
    with pytest.raises(ValueError, match=message):
        save_gguf(memory(CONFIG | config, arrays | more), path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_more_ends_than_llama_cpp_reads(
    memory: Any, arrays: dict[str, np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are in the key that Ollama reads, and come back; llama.cpp's first three have their own keys."""
    save_gguf(memory(CONFIG | {"eos_token_id": [4, 1, 2, 3]}, arrays), tmp_path / "model.gguf")
    assert "it will not end texts at [3]" in caplog.text
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")] == [4, 1, 2]
    assert GgufFile(tmp_path / "model.gguf").config["eos_token_id"] == [4, 1, 2, 3]
    save_gguf(GgufFile(tmp_path / "model.gguf"), tmp_path / "again.gguf", name="model")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.parametrize("value", ["two", 2.0, True, ["two"]])
def test_ids_of_special_tokens_must_be_ids(
    value: Any, make: Any, llama: dict[str, Any], weights: dict[str, np.ndarray]
) -> None:
    for name in ("eos_token_id", "eos_token_ids", "bos_token_id", "padding_token_id"):
        with pytest.raises(ValueError, match=f"tokenizer.ggml.{name} must hold token ids"):
            GgufFile(make({**llama, f"tokenizer.ggml.{name}": value}, weights))


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in TRUTH.glob("*/config.json")))
def test_damaged_configs(folder: str) -> None:
    """Any field with any value is written, or a ValueError."""
    config = json.loads((TRUTH / folder / "config.json").read_text())
    for name in (*config, "rope_scaling", "rope_parameters", "original_max_position_embeddings"):
        for value in (None, [], {}, "64", 2.5, 1, -1, float("inf"), 10**400):
            with contextlib.suppress(ValueError):
                architecture = architecture_for(config)
                metadata = architecture.metadata(complete_config(config | {name: value}, architecture))
                if name == "max_position_embeddings" and architecture.name != "gpt2":
                    assert metadata["context_length"] == (architecture.context_length if value is None else 1)


@pytest.mark.parametrize("value", [[1], {}, 2**70, -7, [None], "2"])
def test_damaged_ids_of_special_tokens(value: Any, memory: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """They are written where they are ids, and left out where they are none."""
    config = CONFIG | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), value)
    save_gguf(memory(config, arrays), tmp_path / "model.gguf")
    written = GgufFile(tmp_path / "model.gguf").config
    assert [written.get(f"{name}_token_id") for name in ("bos", "eos", "pad")] == [1 if value == [1] else None] * 3


def test_keys_with_a_value_for_each_layer(make: Any, llama: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    file = GgufFile(make(llama, weights))
    same: dict[str, Any] = {"llama.block_count": [1], "llama.attention.clamp_kqv": [0.0], "llama.expert_count": [0]}
    assert GgufFile(make({**llama, **same}, weights)).config == file.config
    for value in ([0.0, 1.0], [1.0]):
        with pytest.raises(ValueError, match="not supported for the architecture llama: llama.attention.clamp_kqv"):
            GgufFile(make({**llama, "llama.attention.clamp_kqv": value}, weights))


def test_wrong_quantization(memory: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of F16, Q8_0, got 'Q4_K'"):
        save_gguf(memory(CONFIG, arrays), tmp_path / "model.gguf", "Q4_K")


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"general.architecture": "rwkv6"}, {}, "'rwkv6' is not supported; known are deepseek2, gemma, gemma2"),
        ({"llama.block_count": 2**31}, {}, f"each layer have tensors, got {2**31} layers"),
        ({"llama.block_count": 0}, {}, "block_count must be positive"),
        ({"llama.attention.head_count": 0}, {}, "head_count must be positive, got 0"),
        ({"llama.attention.head_count": 5}, {}, "attn_q.weight does not fit the metadata: 5 heads of even size"),
        ({"llama.attention.head_count": "four"}, {}, "must be one int for all layers, got 'four'"),
        ({"llama.attention.head_count_kv": [2, 4]}, {}, "must be one int for all layers"),
        ({"llama.rope.scaling.type": "odd"}, {}, "RoPE scaling of type 'odd' is not supported"),
        (
            {},
            {"blk.0.ffn_gate_inp.bias": (4,)},
            "1 tensors are not known in the architecture llama: blk.0.ffn_gate_inp",
        ),
        ({}, {"blk.1.attn_norm.weight": (32,)}, "1 tensors are not known"),
        ({"llama.rope.scaling.type": "odd"}, {"rope_freqs.weight": (4,)}, "rope_freqs.weight together with .* 'odd'"),
        ({}, {"rope_freqs.weight": (4,)}, "must hold Llama 3.1's factors for 8 dimensions"),
    ],
)
def test_wrong_file(
    changes: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    message: str,
    make: Any,
    llama: dict[str, Any],
    weights: dict[str, np.ndarray],
) -> None:
    path = make({**llama, **changes}, weights | {name: np.ones(shape, np.float32) for name, shape in tensors.items()})
    with pytest.raises(ValueError, match=message) as raised:
        GgufFile(path)
    assert str(path) in str(raised.value)


def test_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, valid: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="take the package gguf, which is not installed: .* -m pip install gguf"):
        GgufFile(valid)


def test_name_and_ends_of_a_folder(memory: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """The name is the folder's; ends of a text that only generation_config.json names are written too."""
    folder = tmp_path / "My-Model"
    zoo.save(zoo.load(memory({**CONFIG, "eos_token_id": 0}, arrays))[0], folder, config={**CONFIG, "eos_token_id": 0})
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    zoo.convert(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.name"].contents() == "My-Model"
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")] == [0, 3]
    zoo.convert(tmp_path / "model.gguf", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    snapshot = tmp_path / "models--org--Their-Model" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    assert zoo.open_source(snapshot).name == "Their-Model"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("count", "loads"), [(0, True), (1, True), (2, False)])
def test_merged_files(
    count: int, loads: bool, make: Any, llama: dict[str, Any], weights: dict[str, np.ndarray]
) -> None:
    """llama-gguf-split writes split.count = 0 when it merges."""
    path = make({**llama, "split.count": count}, weights)
    if loads:
        assert GgufFile(path).tensors
    else:
        with pytest.raises(ValueError, match="one of 2 parts of a model"):
            GgufFile(path)

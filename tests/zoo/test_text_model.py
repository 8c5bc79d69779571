"""What a checkpoint says about its tokens, the ends of its texts, sampling and chats, in every format."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from chat_checkpoint import TEMPLATE, checkpoint, tokenizer_of_bytes
from flax import nnx
from flaxzoo import zoo
from flaxzoo.zoo.end_tokens import ends_among, known_end_ids
from flaxzoo.zoo.formats.text_ends import end_ids, named_special_tokens
from tokenizers import AddedToken, Tokenizer, models

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[1] / "truth"
TOKENIZER = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<turn>": 3}, unk_token="<pad>"))


def write(path: Path, fields: Any) -> None:
    path.write_text(json.dumps(fields))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TRUTH / "llama", tmp_path / "llama"))


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "ends"),
    [
        ({"bos_token_id": -1, "eos_token_id": [2, -1, 10**30]}, {}, {}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [1, 2, 3]}, {"eos_token": "<turn>"}, (2, 1, 3)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, {"eos_token": None}, (3,)),
        ({"eos_token_id": None}, {}, {"eos_token": {"content": "</s>"}}, (2,)),
        ({"eos_token_id": None}, {"eos_token_id": "2"}, {"eos_token": "<none>"}, ()),
        ({"eos_token_id": True}, {"eos_token_id": 2.0}, {"eos_token": 2}, ()),
    ],
)
def test_ends_of_a_folder(config, generation, tokenizer, ends, llama):
    fields = json.loads((llama / "config.json").read_text())
    write(llama / "config.json", fields | config)
    write(llama / "generation_config.json", generation)
    write(llama / "tokenizer_config.json", tokenizer)
    assert end_ids(zoo.open_source(llama), TOKENIZER) == ends


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a", "a"),
        ([{"name": "tools", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        ([{"name": ["default"], "template": "a"}, "default"], None),
        ([{"name": "default", "template": 5}], None),
        (5, None),
    ],
)
def test_templates_and_named_tokens(template, expected, llama):
    fields = json.loads((llama / "config.json").read_text())
    write(llama / "config.json", fields | {"bos_token_id": -1, "eos_token_id": [2, -1]})
    write(llama / "tokenizer_config.json", {"chat_template": template, "pad_token": "<pad>"})
    write(llama / "special_tokens_map.json", {"unk_token": {"content": "<pad>"}})
    source: Any = zoo.open_source(llama)
    assert source.chat_template == expected
    assert named_special_tokens(source, TOKENIZER) == {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<pad>"}


def test_ends_that_are_known_by_their_text():
    tokenizer = tokenizer_of_bytes("<|im_end|>", "<|endoftext|>")
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=False)])
    assert known_end_ids(tokenizer) == (258, 257)  # what ends a text comes before what ends a turn
    assert ends_among({"<|end|>": 1, "<|return|>": 2}) == (2, 1)
    assert ends_among({"<|end|>": 1, "<|return|>": 2, "<|call|>": 3}) == (2, 3)  # as llama.cpp has it for gpt-oss


def test_every_format_ends_alike(tmp_path):
    """Folder, GGUF file and what they convert to; the ends that only one file names come along."""
    tokenizer = tokenizer_of_bytes("<s>", "<|im_end|>", "<|endoftext|>", "<stop>", "<halt>")
    source = checkpoint(tmp_path / "source", tokenizer, eos_token_id=258)
    write(source / "generation_config.json", {"eos_token_id": [260], "temperature": 0.5, "top_k": 7})
    write(source / "tokenizer_config.json", {"eos_token": "<halt>", "bos_token": "<s>"})
    zoo.convert(source, tmp_path / "a.gguf")
    zoo.convert(tmp_path / "a.gguf", tmp_path / "again")
    zoo.convert(tmp_path / "again", tmp_path / "b.gguf")
    zoo.convert(source, tmp_path / "copy")
    opened: dict[str, Any] = {
        name: zoo.open(tmp_path / name) for name in ("source", "a.gguf", "again", "b.gguf", "copy")
    }
    assert opened["source"].end_ids == opened["copy"].end_ids == (258, 260, 261)
    # Besides, a GGUF file ends at every control token that is known by its text.
    for name in ("a.gguf", "again", "b.gguf"):
        assert set(opened[name].end_ids) == {258, 259, 260, 261}, name
        assert opened[name].template.special_tokens["eos_token"] == "<|im_end|>"
    fields = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert set(fields["eos_token_id"]) == {258, 259, 260, 261}  # where transformers reads them
    assert opened["source"].sampling == opened["copy"].sampling == zoo.Sampling(temperature=0.5, top_k=7)


def test_a_text_model_writes_with_its_own_settings(tmp_path):
    source = checkpoint(tmp_path / "source", tokenizer_of_bytes("<s>", "<|im_end|>"))
    write(source / "generation_config.json", {"do_sample": False})
    text = zoo.open(source, dtype="bfloat16").optimize_for_decoding()
    assert (text.stop, text.sampling, text.dtype) == (("<|im_end|>",), zoo.GREEDY, "bfloat16")
    options: Any = {"sampling": zoo.GREEDY, "stop": text.end_ids, "dtype": "bfloat16", "max_tokens": 8}
    expected = zoo.generate(text.model, text.tokenizer, ["hello"], **options)
    assert text.generate(["hello"], max_tokens=8) == expected
    assert [one.text for one in text.complete(["hello"], max_tokens=8, seed=3)] == expected
    assert ["".join(text.stream("hello", max_tokens=8))] == expected
    assert text.generate(["hello"], max_tokens=4, sampling=zoo.Sampling(temperature=9.0)) != expected
    assert "".join(text.chat().say("hello", max_tokens=4)) == "".join(text.chat().say("hello", max_tokens=4))
    shown = text.with_template("{{ bos_token }}|{{ eos_token }}").template
    assert shown is not None
    assert shown.render([{"role": "user", "content": ""}]) == "|<|im_end|>"


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": True}, "top_p must be a number"),
        ({"top_k": -1}, "top_k must be at least 0"),
    ],
)
def test_sampling_settings_that_mean_nothing(generation, message, tmp_path):
    source = checkpoint(tmp_path / "source", tokenizer_of_bytes("<s>", "<|im_end|>"))
    write(source / "generation_config.json", generation)
    with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
        zoo.open(source)


def test_what_is_not_opened(tmp_path):
    source = checkpoint(tmp_path / "source", tokenizer_of_bytes("<s>", "<|im_end|>"))
    with pytest.raises(ValueError, match="unknown dtype 'float33'; did you mean"):
        zoo.open(source, dtype="float33")
    with pytest.raises(ValueError, match="source is not a run; leave it out"):
        zoo.open(source, step=3)
    (source / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        zoo.open(source)


def test_64_bits_are_refused_wherever_a_model_is_made_or_called(tmp_path):
    tokenizer = tokenizer_of_bytes("<s>", "<|im_end|>")
    source = checkpoint(tmp_path / "source", tokenizer)
    zoo.convert(source, tmp_path / "model.gguf")
    model = zoo.load(source)[0]
    tokens = jnp.zeros((1, 4), jnp.int32)
    calls = {
        "load": lambda: zoo.load(source),
        "load a GGUF file": lambda: zoo.load(tmp_path / "model.gguf"),
        "open": lambda: zoo.open(source),
        "build": lambda: model.spec.build(rngs=nnx.Rngs(0)),
        "call": lambda: model(tokens),
        "generate": lambda: zoo.generate(model, tokenizer, ["a"], max_tokens=2),
        "stream": lambda: list(zoo.stream(model, tokenizer, "a", max_tokens=2)),
        "chat": lambda: list(zoo.Conversation(model, tokenizer, zoo.ChatTemplate(TEMPLATE), stop=[258]).say("a")),
        "score": lambda: zoo.Scorer(model).text(tokenizer, ["a"], start=257),
        "optimize": lambda: zoo.optimize_for_decoding(model, jnp.float32),
    }
    for call in calls.values():
        with jax.enable_x64(True), pytest.raises(ValueError, match="unset JAX_ENABLE_X64"):
            call()

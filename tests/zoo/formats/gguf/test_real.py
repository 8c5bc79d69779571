"""Pretrained models from GGUF files, end to end, beside transformers in float32 (tests/truth/README.md).

`make test-real` fetches the files; FLAXZOO_REAL names a folder that has them.
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo import zoo
from flaxzoo.zoo.formats.gguf import GgufFile, save_gguf
from flaxzoo.zoo.formats.gguf.tokenizer import read_tokenizer
from flaxzoo.zoo.formats.gguf.tokenizer_out import write_tokenizer

Q8_0 = gguf.GGMLQuantizationType.Q8_0
pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[4]
TRUTH = ROOT / "tests/truth/gguf"
FILES = {
    "smollm2-135m-instruct-q4_1": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma-3-270m-q4_k_m": "gemma-3-270m-q4_k_m.gguf",
}


def path_of(model: str) -> Path:
    path = Path(os.environ.get("FLAXZOO_REAL", ROOT / ".real")) / FILES[model]
    assert path.exists(), f"{path} is missing: run `make test-real`, or set FLAXZOO_REAL"
    return path


@pytest.fixture(scope="module", params=FILES)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def opened(model: str) -> GgufFile:
    return GgufFile(path_of(model))


@functools.cache
def loaded(model: str) -> tuple[Any, Any]:
    return zoo.load(path_of(model))


def truth(model: str, name: str) -> Any:
    return json.loads((TRUTH / model / name).read_text())


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x)).hexdigest()[:32]


def test_config(model: str) -> None:
    wanted, found = truth(model, "config.json"), opened(model).config
    assert {name: found.get(name) for name in wanted} == wanted


def test_stored_tensors(model: str) -> None:
    file, wanted = opened(model), truth(model, "stored.json")
    assert file.header.tensors.keys() == wanted.keys()
    for name, (format, raw, dequantized) in wanted.items():
        tensor = file.header.tensors[name]
        data = np.memmap(file.path, np.uint8, "r", tensor.offset, (tensor.size,))
        assert (tensor.format.name, digest(data), digest(file.stored.read(name))) == (format, raw, dequantized), name


def test_tensors(model: str) -> None:
    file, wanted = opened(model), truth(model, "tensors.json")
    assert file.tensors.keys() == wanted.keys()
    for name, (shape, dequantized) in wanted.items():
        assert list(file.tensors[name].shape) == shape
        assert digest(file.read(name)) == dequantized, name


def test_tokenizer(model: str) -> None:
    tokenizer, rows = opened(model).tokenizer(), truth(model, "texts.json")
    assert tokenizer is not None
    assert len(rows) == 100
    for row in rows:
        assert tokenizer.encode(row["text"]).ids == row["ids"]
        plain = tokenizer.encode(row["text"], add_special_tokens=False).ids
        assert tokenizer.decode(plain, skip_special_tokens=False) == row["text"]


def test_logits(model: str) -> None:
    """Logits, the loss of every token and the perplexity, and greedy text. All texts are padded to one length."""
    (decoder, _), arrays = loaded(model), np.load(TRUTH / model / "truth.npz")
    stops = np.atleast_1d(opened(model).config["eos_token_id"])
    forward = jax.jit(lambda decoder, tokens: decoder(tokens)[0][0])
    texts = sorted({name.partition("/")[0] for name in arrays})
    longest = max(len(arrays[f"{text}/input_ids"]) + len(arrays[f"{text}/greedy_ids"]) for text in texts)
    for text in texts:
        one = {name.partition("/")[2]: arrays[name] for name in arrays if name.startswith(f"{text}/")}
        ids, greedy = one["input_ids"], one["greedy_ids"]
        length = len(ids) + len(greedy)
        tokens = np.zeros((1, longest), np.int32)
        tokens[0, :length] = [*ids, *greedy]
        logits = np.asarray(forward(decoder, jnp.asarray(tokens)))[:length]
        top = np.take_along_axis(logits[one["positions"]], one["top20_ids"], axis=1)
        np.testing.assert_allclose(top, one["top20_logits"], atol=2e-4, rtol=0)
        nll = np.asarray(jax.nn.logsumexp(logits[: len(ids) - 1], axis=-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(nll, one["nll"], atol=2e-4, rtol=0)
        np.testing.assert_allclose(np.exp(nll.mean()), np.exp(one["nll"].mean()), rtol=2e-5)
        logits = np.array(logits)
        logits[:, stops] = -np.inf  # the reference was not let stop
        sure = one["greedy_margin"] > 1e-2
        np.testing.assert_array_equal(logits[len(ids) - 1 : -1].argmax(-1)[sure], greedy[sure])


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
def test_round_trip(quantization: str, tmp_path: Path) -> None:
    """Written, read and written again: all that changes is that matrices are rounded, once."""
    file = opened("smollm2-135m-instruct-q4_1")
    save_gguf(file, tmp_path / "model.gguf", quantization)
    again = GgufFile(tmp_path / "model.gguf")
    for key in ("tokens", "token_type", "merges", "pre"):
        mine, theirs = (one.header.metadata[f"tokenizer.ggml.{key}"] for one in (again, file))
        np.testing.assert_array_equal(mine, theirs)
    assert again.chat_template == file.chat_template
    assert {**again.config, "torch_dtype": None} == {**file.config, "torch_dtype": None}
    for name, info in file.tensors.items():
        x, y = file.read(name), again.read(name)
        if quantization == "F16" and len(info.shape) > 1:
            np.testing.assert_array_equal(y, x.astype(np.float16))
        elif len(info.shape) > 1:
            np.testing.assert_array_equal(y, gguf.dequantize(gguf.quantize(x, Q8_0), Q8_0))
        else:
            np.testing.assert_array_equal(y, x)
    tokenizer = again.tokenizer()
    assert tokenizer is not None
    for row in truth("smollm2-135m-instruct-q4_1", "texts.json"):
        assert tokenizer.encode(row["text"]).ids == row["ids"]
    save_gguf(again, tmp_path / "again.gguf", quantization)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_tokenizer_round_trip() -> None:
    """Gemma's tokenizer, whose merges are scores, is written and read again."""
    file = opened("gemma-3-270m-q4_k_m")
    tokenizer = file.tokenizer()
    assert tokenizer is not None
    ids = {f"tokenizer.ggml.{name}_token_id": file.config[f"{name}_token_id"] for name in ("bos", "eos")}
    again = read_tokenizer(write_tokenizer(tokenizer, file.config["vocab_size"], file.config) | ids)
    assert again is not None
    for row in truth("gemma-3-270m-q4_k_m", "texts.json"):
        assert again.encode(row["text"]).ids == row["ids"]

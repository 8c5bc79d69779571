"""Small GGUF files by the `gguf` package's writer, and sources of weights in memory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from flaxzoo.zoo.formats.source import TensorInfo
from tokenizers import Tokenizer

Make = Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], Path]


class Memory:
    """A source of weights that is in memory."""

    def __init__(self, config: dict[str, Any], arrays: Mapping[str, np.ndarray], tokenizer: Tokenizer | None = None):
        self.config, self.arrays, self._tokenizer = config, arrays, tokenizer
        self.tensors = {name: TensorInfo(x.shape, x.dtype) for name, x in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer


@pytest.fixture
def memory() -> type[Memory]:
    """The class of sources in memory."""
    return Memory


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":
            add.get(type(value), writer.add_array)(key, value)
    for name, x in tensors.items():
        name, _, format = name.partition("@")
        writer.add_tensor(name, x, raw_dtype=gguf.GGMLQuantizationType[format] if format else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a GGUF file: metadata with "general.architecture" among them, and tensors as F32, F16 or raw blocks.

    A tensor's name may end in "@" and the name of a format: its array holds the bytes then.
    """
    return lambda metadata, tensors: write(tmp_path / "model.gguf", metadata, tensors)


LLAMA = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "b", "ab", "Ġ"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
}
SHAPES = {
    "token_embd.weight": (5, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32),
    "blk.0.ffn_down.weight": (32, 64),
}


@pytest.fixture
def llama() -> dict[str, Any]:
    """The metadata of a Llama of one layer."""
    return dict(LLAMA)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """Its tensors."""
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid file."""
    tensors = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    return write(tmp_path_factory.mktemp("gguf") / "valid.gguf", LLAMA, tensors)

"""The Python of docs/generation.md runs as it stands, with a small model in place of the one it names."""

import re
from pathlib import Path

import jax
import pytest
from flax import nnx
from flaxzoo import zoo
from flaxzoo.configs.models import small
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

pytestmark = pytest.mark.usefixtures("quick_compiler")
PAGE = Path(__file__).parents[3] / "docs" / "generation.md"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}assistant: "
)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    spec = small(vocab=tokenizer.get_vocab_size(), dim=32, layers=2, heads=4, kv_heads=2, hidden=32, tied=True)
    name = re.findall(r'"(\S+\.gguf)"', blocks[0])[0]
    zoo.save(spec.build(rngs=nnx.Rngs(0)), tmp_path / "tiny", tokenizer=tokenizer)
    (tmp_path / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "tiny" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block.replace(name, "tiny"), PAGE.name, "exec"), names)
    assert "bits_per_byte" in capsys.readouterr().out
    assert len(names["chat"].messages) == 4
    assert names["chat"].reused > 20
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(names["text"].model))

"""What a checkpoint says of its tokens and of chats, however odd."""

import json
import shutil
from pathlib import Path

import pytest
from flaxzoo import zoo
from flaxzoo.train.commands.writer import _described
from tokenizers import Tokenizer, models

TRUTH = Path(__file__).parents[2] / "truth"
TOKENIZER = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("a", "a"),
        ([{"name": "tools", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        ([{"name": ["default"], "template": "a"}, "default"], None),
        ([{"name": "default", "template": 5}], None),
        (5, None),
    ],
)
def test_ids_and_templates(template, wanted, tmp_path):
    folder = Path(shutil.copytree(TRUTH / "llama", tmp_path / "llama"))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"bos_token_id": -1, "eos_token_id": [2, -1, 10**30]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "pad_token": "<pad>"}))
    tokens, found = _described(zoo.open_source(folder), TOKENIZER)
    assert found == wanted
    assert tokens == {"pad_token": "<pad>", "eos_token": "</s>", "stop": ["</s>"]}

"""Pretrained models write and score text as transformers does (`make test-real`).

What is expected is in tests/truth/gguf/*/text.json, which tests/truth/make_real.py made with transformers alone, from
the same files: greedy text in float32, cut before the first token that rounding might change, and the likelihood of
text in the windows that `Scorer` cuts.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo import zoo
from flaxzoo.train.commands.evaluate import prefix_of
from flaxzoo.zoo import GREEDY, Conversation, Scorer, Speculation, TextModel, complete, optimize_for_decoding

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("FLAXZOO_REAL", ROOT / ".real"))
CHATS, BASE = "smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m"
FILES = {CHATS: "SmolLM2-135M-Instruct.Q4_1.gguf", BASE: "gemma-3-270m-q4_k_m.gguf"}


@pytest.fixture(scope="module")
def writers() -> dict[str, TextModel]:
    return {name: zoo.open(FOLDER / file, dtype="float32") for name, file in FILES.items()}


def truth(name: str) -> Any:
    return json.loads((ROOT / "tests/truth/gguf" / name / "text.json").read_text())


@pytest.mark.parametrize("guess", [0, 3])
def test_conversation(guess: int, writers: dict[str, TextModel]) -> None:
    """As `zoo chat` has it; and with guesses, by the model with its layers in one scan."""
    writer, before = writers[CHATS], 0
    assert writer.stop == ("<|im_end|>", "<|endoftext|>")
    assert writer.template is not None
    options: dict[str, Any] = {"speculation": Speculation(tokens=guess) if guess else None, "sampling": GREEDY}
    model = writer.model if guess else optimize_for_decoding(writer.model, writer.dtype)
    talk = Conversation(model, writer.tokenizer, writer.template, stop=writer.stop, **options)
    for turn in truth(CHATS)["talk"]:
        prompt = writer.template.render([*talk.messages, {"role": "user", "content": turn["question"]}])
        assert writer.tokenizer.encode(prompt, add_special_tokens=False).ids == turn["ids"]
        assert turn["ended"]
        assert "".join(talk.say(turn["question"], max_tokens=48)) == turn["text"]
        assert talk.reused >= before  # the turns before are in the cache
        before = len(turn["ids"])


def test_int8_cache(writers: dict[str, TextModel]) -> None:
    """Answers stay where the margins are wide."""
    writer, turn = writers[CHATS], truth(CHATS)["talk"][1]
    assert turn["margin"] > 2
    options: dict[str, Any] = {"max_tokens": 48, "sampling": GREEDY, "stop": writer.stop, "cache_dtype": jnp.int8}
    (found,) = complete(writer.model, writer.tokenizer, [turn["ids"]], **options)
    assert (found.ids, found.text) == (turn["new_ids"], turn["text"])


@pytest.mark.parametrize("name", FILES)
def test_greedy_text(name: str, writers: dict[str, TextModel]) -> None:
    """Of prompts in one batch."""
    writer, rows = writers[name], truth(name)["prompts"]
    length = max(len(row["new_ids"]) for row in rows)
    found = complete(
        writer.model,
        writer.tokenizer,
        [row["prompt"] for row in rows],
        max_tokens=length,
        sampling=GREEDY,
        stop=writer.stop,
    )
    for row, one in zip(rows, found, strict=True):
        assert writer.tokenizer.encode(row["prompt"]).ids == row["ids"]
        assert one.ids[: len(row["new_ids"])] == row["new_ids"]
        assert one.text.startswith(row["text"])
        if row["ended"]:
            assert one.stopped
            assert one.text == row["text"]


@pytest.mark.parametrize("name", FILES)
def test_scores(name: str, writers: dict[str, TextModel]) -> None:
    writer, wanted = writers[name], truth(name)
    scorer = Scorer(writer.model, length=wanted["window"])
    for one in wanted["scores"].values():
        assert [prefix_of(writer), *writer.tokenizer.encode(one["text"], add_special_tokens=False).ids] == one["ids"]
        found = scorer.text(writer.tokenizer, [one["text"]], start=prefix_of(writer))
        count = len(one["ids"]) - 1
        assert found.tokens == count
        np.testing.assert_allclose(found.perplexity, math.exp(one["nll"] / count), rtol=5e-5)
        np.testing.assert_allclose(found.bits_per_byte, one["nll"] / math.log(2) / len(one["text"]), rtol=5e-5)

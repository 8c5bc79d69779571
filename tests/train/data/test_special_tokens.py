"""Training, held-out scores, evaluation and generation read the same text as the same tokens."""

from pathlib import Path

import numpy as np
import pytest
from flaxzoo.configs.run import Data
from flaxzoo.train import data as text
from flaxzoo.train.data.tokens import stream
from flaxzoo.zoo.evaluation import score
from flaxzoo.zoo.evaluation.score import Scorer
from flaxzoo.zoo.generation import generate

TEXT = "one<|endoftext|>two <|endoftext|>\n"


def load(tmp_path: Path, special_tokens: bool, *documents: str) -> text.Batches:
    for number, document in enumerate(documents):
        (tmp_path / f"{number}.txt").write_text(document)
    data = Data(source=(str(tmp_path / "*.txt"),), heldout=0.0, special_tokens=special_tokens)
    return text.load(data, vocab=300, length=16, batch=2, seed=0)


@pytest.mark.parametrize("special_tokens", [False, True])
def test_the_same_ids_everywhere(tmp_path: Path, special_tokens: bool, monkeypatch: pytest.MonkeyPatch):
    batches = load(tmp_path, special_tokens, TEXT)
    tokenizer, end = batches.tokenizer, batches.separator
    trained = np.asarray(batches.stores[0].tokens).tolist()
    assert trained.count(end) == (4 if special_tokens else 2)
    heldout = np.concatenate(list(stream([TEXT], tokenizer, special_tokens=special_tokens))).tolist()
    assert heldout == trained
    assert generate._ids(tokenizer, TEXT, special_tokens) == trained[1:-1]
    scored: list[int] = []

    def windows(ids: list[int], **_: object):
        scored.extend(ids)
        yield from ()

    monkeypatch.setattr(score, "split_into_windows", windows)
    monkeypatch.setattr(Scorer, "likelihoods", lambda *_: [])
    scorer = Scorer.__new__(Scorer)
    scorer.length, scorer.batch = 64, 1
    scorer.text(tokenizer, [TEXT], start=end, special_tokens=special_tokens)
    assert scored == trained[1:-1]
    assert f"special tokens in the text are {'tokens' if special_tokens else 'plain text'}" in batches.describe()


def test_ends_that_the_text_holds_are_not_doubled(tmp_path: Path):
    batches = load(tmp_path, True, "<|endoftext|>one<|endoftext|>", "two<|endoftext|>", "three")
    tokens = np.asarray(batches.stores[0].tokens)
    assert batches.tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == (
        "<|endoftext|>one<|endoftext|>two<|endoftext|>three<|endoftext|>"
    )


def test_the_separator_is_not_in_the_text_that_a_vocabulary_is_trained_on(tmp_path: Path):
    plain = load(tmp_path, False, *["ab<|endoftext|>" * 50])
    special = load(tmp_path, True)
    assert any("endo" in token for token in plain.tokenizer.get_vocab() if token != "<|endoftext|>")
    assert not any("endo" in token for token in special.tokenizer.get_vocab() if token != "<|endoftext|>")

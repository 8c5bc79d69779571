import itertools
import random
from pathlib import Path

import pytest
from flaxzoo.train.data import tokenizer as tokenizer_module
from flaxzoo.train.data.sources import Source, open_source
from flaxzoo.train.data.tokenizer import (
    END_OF_TEXT,
    cuttable,
    ids,
    load_tokenizer,
    pieces,
    separator,
    tokenizer_digest,
    trained_tokenizer,
)
from flaxzoo.zoo.text_encoding import encode
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

anything = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def source(cache: Path) -> Source:
    """A play."""
    (cache / "play.txt").write_text(next(open_source("shakespeare", "text", cache).documents()), newline="\n")
    return open_source(str(cache / "play.txt"), "text", cache)


@pytest.fixture(scope="module")
def bpe(source: Source, cache: Path) -> Tokenizer:
    return trained_tokenizer([source], [1.0], vocab=512, heldout=0.05, cache=cache)


@given(st.one_of(anything, st.just(f"a{END_OF_TEXT}b {END_OF_TEXT}")))
def test_any_text_survives_and_never_gives_the_separator(bpe: Tokenizer, text: str):
    encoded = encode(bpe, text)
    assert separator(bpe) == 0
    assert 0 not in encoded
    assert bpe.decode(encoded, skip_special_tokens=False) == text


def test_trained_to_size_the_same_each_time(bpe: Tokenizer, source: Source, tmp_path: Path):
    again = trained_tokenizer([source], [1.0], vocab=512, heldout=0.05, cache=tmp_path)
    assert ids(bpe) == 512
    assert tokenizer_digest(again) == tokenizer_digest(bpe)


def test_of_much_text_an_even_part_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i:08d}"}}\n' for i in range(2000)))
    source = open_source(str(tmp_path / "a.jsonl"), "text", tmp_path)
    monkeypatch.setattr(tokenizer_module, "TRAINING_BYTES", source.size // 5)
    seen = [int(text) for text in tokenizer_module._sampled(source, 0.5, 0.5)]
    assert len(seen) == pytest.approx(100, abs=10)
    assert max(b - a for a, b in itertools.pairwise([0, *seen, 2000])) < 60


def test_little_text_gives_a_small_vocabulary(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abc abc\n")
    source = open_source(str(tmp_path / "a.txt"), "text", tmp_path)
    assert ids(trained_tokenizer([source], [1.0], vocab=5000, heldout=0, cache=tmp_path)) < 265
    with pytest.raises(ValueError, match="at least 257 .* got 256"):
        trained_tokenizer([source], [1.0], vocab=256, heldout=0, cache=tmp_path)


@pytest.mark.parametrize(
    "unit", ["word ", "a line\n", "x", "\n\n  two\r\n", "日本語", "e\u0301 \x1c\x85\u3000a\n\u2003b "]
)
def test_pieces_encode_as_the_whole(bpe: Tokenizer, unit: str):
    text = unit * (300_000 // len(unit))
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert len(parts) >= 3
    assert max(map(len, parts)) <= 2**17
    assert cuttable(bpe)
    if unit not in ("x", "日本語"):  # where there is nowhere to cut between words
        assert [index for part in parts for index in bpe.encode(part).ids] == bpe.encode(text).ids


def foreign(path: Path, names: list[str]) -> Path:
    vocabulary = {token: index for index, token in enumerate(["<unk>", "▁", "a", "b", "<", "/", "s", ">", *names])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore
    tokenizer.add_tokens(names)
    if names:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single=f"{names[0]} $A", special_tokens=[(names[0], vocabulary[names[0]])]
        )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path))
    return path


def test_a_foreign_tokenizer_adds_cuts_and_pads_nothing(tmp_path: Path):
    tokenizer = load_tokenizer(foreign(tmp_path / "tokenizer.json", ["<bos>", "</s>"]))
    assert separator(tokenizer) == 9
    assert encode(tokenizer, "aaab</s>") == [1, 2, 2, 2, 3, 4, 5, 6, 7]
    assert not cuttable(tokenizer)  # each text gets a space in front


def test_a_tokenizer_that_is_none(tmp_path: Path):
    with pytest.raises(ValueError, match="must have one of the tokens .*<|endoftext|>.* add_special_tokens"):
        load_tokenizer(foreign(tmp_path / "tokenizer.json", []))
    with pytest.raises(ValueError, match="cannot read the tokenizer .*gone.json"):
        load_tokenizer(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*must be a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")


@pytest.mark.parametrize("letters", ["ACGT", "日本語中文字漢"])
def test_text_without_breaks_trains_about_as_fast_as_words(tmp_path: Path, letters: str):
    """The work of a BPE trainer grows with the length of its longest words, so these are bounded."""
    text = "".join(random.Random(0).choices(letters, k=60_000))
    (tmp_path / "a.txt").write_text(f"short words\n{text}\n", encoding="utf-8")
    source = open_source(str(tmp_path / "a.txt"), "text", tmp_path)
    (piece,) = tokenizer_module._sampled(source, 1.0, 0.0)
    parts = list(tokenizer_module._without_long_runs(piece))
    assert "".join(parts) == piece
    assert max(len(word) for part in parts for word in part.split()) == 64
    calls: list[tuple[int, int | None]] = []
    options = {"vocab": 300, "heldout": 0.0, "cache": tmp_path, "progress": lambda *call: calls.append(call)}
    trained = trained_tokenizer([source], [1.0], **options)
    assert ids(trained) == 300
    assert calls[-1] == (source.size, source.size)
    assert len(encode(trained, text)) < 0.7 * len(text.encode())

"""Whether text that spells a special token becomes that token: one rule, whatever the tokenizer."""

import re
from pathlib import Path
from typing import Any

import pytest
from flaxzoo.zoo.text_encoding import encode, encode_batch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

PACKAGE = Path(__file__).parents[2]


def bpe() -> Tokenizer:
    return Tokenizer(models.BPE({letter: index for index, letter in enumerate("abc<s/>")}, []))


def bpe_with_common_end() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.add_tokens(["</s>"])
    return tokenizer


def unigram() -> Tokenizer:
    words: Any = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in "abc<s/>")]
    return Tokenizer(models.Unigram(words, 0))


def words() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *"abc<s/>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return tokenizer


def with_ends(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<s>"] + ["</s>"] * (tokenizer.token_to_id("</s>") is None))
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])  # pyright: ignore
    return tokenizer


@pytest.mark.parametrize("kind", [bpe, bpe_with_common_end, unigram, words])
def test_special_tokens_in_text_are_plain_text_unless_chosen(kind: Any):
    tokenizer = with_ends(kind())
    begin, end = map(tokenizer.token_to_id, ("<s>", "</s>"))
    for text in ("</s>", "<s> </s> a", "a </s>", "<s>"):
        plain = encode(tokenizer, text)
        assert not {begin, end} & set(plain)
        assert encode_batch(tokenizer, ["a", text]) == [encode(tokenizer, "a"), plain]
        assert encode(tokenizer, text, add_special_tokens=True) == [begin, *plain]
    if kind is not words:
        assert tokenizer.decode(encode(tokenizer, "a</s>"), skip_special_tokens=False).replace(" ", "") == "a</s>"
    a = tokenizer.token_to_id("a")
    assert encode(tokenizer, "a</s>" if kind is not words else "a </s>", special_tokens=True) == [a, end]
    assert encode(tokenizer, "<s>", special_tokens=True, add_special_tokens=True) == [begin]
    assert encode(tokenizer, "a", special_tokens=True, add_special_tokens=True) == [begin, a]


@pytest.mark.parametrize("state", [False, True])
def test_the_state_of_the_tokenizer_neither_matters_nor_changes(state: bool):
    tokenizer = with_ends(bpe())
    tokenizer.encode_special_tokens = state
    assert len(encode(tokenizer, "</s>")) == 4
    assert len(encode(tokenizer, "</s>", special_tokens=True)) == 1
    assert tokenizer.encode_special_tokens is state


def test_nothing_else_in_the_package_encodes_text():
    """Only here may the tokenizer be called; the ids of the empty text, which spells nothing, may be asked for."""
    direct = re.compile(r"tokenizer\.encode(_batch\w*)?\((?!\"\"\))")
    files = [path for room in ("layers", "zoo", "configs", "train") for path in (PACKAGE / room).rglob("*.py")]
    assert len(files) > 100
    found = [str(path) for path in files if direct.search(path.read_text(encoding="utf-8"))]
    assert found == [str(PACKAGE / "zoo" / "text_encoding.py")]

"""Tokenizers from metadata, and back."""

from collections.abc import Iterable
from typing import Any

import pytest
from flaxzoo.zoo.formats.gguf.tokenizer import read_tokenizer
from flaxzoo.zoo.formats.gguf.tokenizer_out import write_tokenizer
from flaxzoo.zoo.formats.gguf.words import WORDS
from flaxzoo.zoo.formats.sentencepiece import merges_of
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "The cats' tails weren't 12345 inches; they'll GROW. naïve café 你好世界 Ελληνικά \u0065\u0301",
    "def f(x):\n    return x ** 2\r\n\r\n\t# done!  ",
    "I'M sure You'Re fine: camelCase HTTPServer 3.14159 — “quoted” ▁under 🤖🤖 ",
    "  leading, trailing   ",
    "",
]
CONFIG = {"bos_token_id": 0, "eos_token_id": 1}


def byte_level(words: Any) -> Tokenizer:
    """A byte-level BPE of few words."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=words.whole))
    tokenizer.normalizer, tokenizer.pre_tokenizer = words.normalizer(), words.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_tokens([AddedToken("  ", normalized=False)])
    return tokenizer


def sentencepiece(prefix: bool) -> Tokenizer:
    """A BPE as it comes from SentencePiece."""
    pieces = [
        "<s>",
        "</s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdeé",
        "▁a",
        "bc",
        "bcd",
        "▁abc",
    ]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("b", "c"), ("bc", "d"), ("▁a", "bc")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace  # pyright: ignore
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer


def again(tokenizer: Tokenizer, rows: int, config: dict[str, Any], **changes: Any) -> Tokenizer:
    metadata = write_tokenizer(tokenizer, rows, config)
    ids = {f"tokenizer.ggml.{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos")}
    found = read_tokenizer({**metadata, **ids, **changes})
    assert found is not None
    return found


def ids(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


@pytest.mark.parametrize("name", WORDS)
def test_byte_level(name: str) -> None:
    tokenizer = byte_level(WORDS[name])
    rows = tokenizer.get_vocab_size()
    metadata = write_tokenizer(tokenizer, rows + 3, CONFIG)
    assert WORDS[metadata["tokenizer.ggml.pre"]] is WORDS[name]
    assert metadata["tokenizer.ggml.tokens"][rows:] == [f"[PAD{index}]" for index in range(rows, rows + 3)]
    texts = [*TEXT, "<s>a</s> b", "a  b"]
    found = again(tokenizer, rows, CONFIG)
    assert ids(found, texts) == ids(tokenizer, texts)
    for text in TEXT:
        decoded = found.decode(found.encode(text).ids, skip_special_tokens=False)
        assert decoded == (text if not WORDS[name].nfc else normalizers.NFC().normalize_str(text))
    assert found.get_added_tokens_decoder()[0].special
    assert not found.get_added_tokens_decoder()[rows - 1].special


def test_words() -> None:
    """The splits tell the named ways apart as their models do."""
    split = {name: words.pre_tokenizer().pre_tokenize_str("don't 12345 HTTPServer") for name, words in WORDS.items()}
    parts = {name: [part for part, _ in pieces] for name, pieces in split.items()}
    assert parts["gpt-2"] == ["don", "'t", "Ġ12345", "ĠHTTPServer"]
    assert parts["smollm"] == ["don", "'t", "Ġ", "1", "2", "3", "4", "5", "ĠHTTPServer"]
    assert parts["llama-bpe"] == ["don", "'t", "Ġ", "123", "45", "ĠHTTPServer"]
    assert parts["qwen2"] == ["don", "'t", "Ġ", "1", "2", "3", "4", "5", "ĠHTTPServer"]
    assert parts["gpt-4o"] == ["don't", "Ġ", "123", "45", "ĠHTTPServer"]
    assert parts["tekken"] == ["don", "'t", "Ġ", "1", "2", "3", "4", "5", "ĠHTTPServer"]
    assert parts["deepseek-v3"] == ["don", "'t", "Ġ", "123", "45", "ĠHTTPServer"]


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece(prefix: bool) -> None:
    tokenizer = sentencepiece(prefix)
    found = again(tokenizer, tokenizer.get_vocab_size(), CONFIG)
    texts = ["abcd abc", " a  bc", "é ß 你", "<s>a</s>abc", ""]
    assert ids(found, texts) == ids(tokenizer, texts)
    assert found.decode(found.encode("abcd a ß").ids) == "abcd a ß"
    first = found.encode("abc").tokens[0]
    assert first == ("▁abc" if prefix else "a")


def test_spaces_of_own_tokens() -> None:
    """Tokens that are looked for in the text beforehand are stored with plain spaces, as Gemma's are."""
    tokenizer = sentencepiece(False)
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    metadata = write_tokenizer(tokenizer, tokenizer.get_vocab_size(), CONFIG)
    assert metadata["tokenizer.ggml.tokens"][-1] == "  "
    found = read_tokenizer(metadata)
    assert found is not None
    assert found.encode("a  a").tokens == ["a", "  ", "a"]


def test_merges_of_scores() -> None:
    tokens, types = ["a", "b", "ab", "ba", "aba", "<x>"], [1, 1, 1, 1, 1, 3]
    merges = merges_of(tokens, [0.0, 0.0, -2.0, -1.0, -3.0, 0.0], types)
    assert merges == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]
    with pytest.raises(ValueError, match="at most 1024 characters, got one of 1000000"):  # 10^12 characters of parts
        merges_of(["a", "a" * 10**6], [0.0, 0.0], [1, 1])


def test_begin_and_end() -> None:
    tokenizer = byte_level(WORDS["llama-bpe"])
    rows = tokenizer.get_vocab_size()
    plain, metadata = tokenizer.encode("cats").ids, write_tokenizer(tokenizer, rows, CONFIG)
    metadata |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    for begin, end in ((True, False), (False, True), (True, True)):
        asked = metadata | {"tokenizer.ggml.add_bos_token": begin, "tokenizer.ggml.add_eos_token": end}
        found = read_tokenizer(asked)
        assert found is not None
        assert found.encode("cats").ids == [0] * begin + plain + [1] * end
        assert found.encode("cats", "cats").ids == ([0] * begin + plain + [1] * end) * 2
        assert found.encode("cats", add_special_tokens=False).ids == plain
        said = write_tokenizer(found, rows, CONFIG)
        assert (said["tokenizer.ggml.add_bos_token"], said["tokenizer.ggml.add_eos_token"]) == (begin, end)
    for name in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"):
        del metadata[name]
    found = read_tokenizer(metadata)
    assert found is not None
    assert found.encode("cats").ids == [0, *plain]  # as Llama 3 does where nothing is said


def test_none() -> None:
    assert read_tokenizer({}) is None
    assert read_tokenizer({"tokenizer.ggml.model": "none"}) is None


GPT2 = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
}
SPM = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a"], "tokenizer.ggml.scores": [0.0, 0.0]}
WRONG = {
    "kind": ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported; supported are gpt2 and llama"),
    "pre": ({**GPT2, "tokenizer.ggml.pre": "default"}, "pre = 'default' is not supported; known are dbrx"),
    "no pre": ({k: v for k, v in GPT2.items() if "pre" not in k}, "pre = None is not supported"),
    "twice": ({**GPT2, "tokenizer.ggml.tokens": ["<s>", "a", "a", "ab"]}, "must differ"),
    "empty": ({**GPT2, "tokenizer.ggml.tokens": ["<s>", "", "b", "ab"]}, "none be empty"),
    "types": ({**GPT2, "tokenizer.ggml.token_type": [1]}, "one element for each of 4 tokens, got 1"),
    "tokens": ({**GPT2, "tokenizer.ggml.tokens": 5}, "must be an array of str, got 5"),
    "merges": ({**GPT2, "tokenizer.ggml.merges": ["a c"]}, "'a c', whose parts or whole are no tokens"),
    "one part": ({**GPT2, "tokenizer.ggml.merges": ["ab"]}, "'ab', whose parts or whole are no tokens"),
    "begin": ({**GPT2, "tokenizer.ggml.add_bos_token": True}, "bos_token_id must be one of 4 tokens, got None"),
    "begin far": ({**GPT2, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 9}, "got 9"),
    "scores": ({k: v for k, v in SPM.items() if "scores" not in k}, "needs tokenizer.ggml.scores"),
    "unknown": ({**SPM, "tokenizer.ggml.unknown_token_id": 7}, "unknown_token_id must be one of 2 tokens, got 7"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_metadata(name: str) -> None:
    metadata, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        read_tokenizer(metadata)


def test_what_gguf_cannot_hold() -> None:
    tokenizer = byte_level(WORDS["gpt-2"])
    rows = tokenizer.get_vocab_size()
    with pytest.raises(ValueError, match=f"below the 9 rows of the embedding, got {rows - 1}"):
        write_tokenizer(tokenizer, 9, CONFIG)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")  # pyright: ignore
    with pytest.raises(ValueError, match="splits words in a way that has no name in GGUF"):
        write_tokenizer(tokenizer, rows, CONFIG)
    with pytest.raises(ValueError, match="type BPE, got WordLevel"):
        write_tokenizer(Tokenizer(models.WordLevel({"a": 0}, "a")), 9, CONFIG)
    tokenizer = sentencepiece(False)
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore
    with pytest.raises(ValueError, match="GGUF can replace spaces by ▁"):
        write_tokenizer(tokenizer, tokenizer.get_vocab_size(), CONFIG)
    found = again(byte_level(WORDS["llama-bpe"]), rows, CONFIG, **{"tokenizer.ggml.add_bos_token": True})
    with pytest.raises(ValueError, match=r"bos_token_id=7 before a text and eos_token_id=1 after it, .* adds \[0\]"):
        write_tokenizer(found, rows, {"bos_token_id": 7, "eos_token_id": [1, 2]})


def test_normalized_tokens() -> None:
    """Tokens that the normalizer changes match other text in GGUF; those that it leaves alone do not."""
    for tokenizer, token, refused in (
        (sentencepiece(True), AddedToken("<x>", normalized=True, special=True), True),
        (sentencepiece(False), AddedToken("<x y>", normalized=True), True),
        (sentencepiece(False), AddedToken("<x>", normalized=True, special=True), False),
        (byte_level(WORDS["qwen2"]), AddedToken("<e\u0301>", normalized=True, special=True), True),
        (byte_level(WORDS["gpt-2"]), AddedToken("<e\u0301 >", normalized=True, special=True), False),
    ):
        tokenizer.add_tokens([token])
        rows = tokenizer.get_vocab_size()
        if refused:
            with pytest.raises(ValueError, match="no key for normalized=true of tokens, .* '<"):
                write_tokenizer(tokenizer, rows, CONFIG)
        else:
            texts = [f"a{token.content}b", f" {token.content} "]
            assert ids(again(tokenizer, rows, CONFIG), texts) == ids(tokenizer, texts)


def test_order_of_merges() -> None:
    vocab = {piece: index for index, piece in enumerate(["<unk>", *"abc", "ab", "bc", "abc"])}
    merges = [("a", "bc"), ("b", "c"), ("ab", "c"), ("a", "b")]  # those of one token are apart
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="one score for each token, and these have another order"):
        write_tokenizer(tokenizer, 7, CONFIG)


def test_spaces_after_special_tokens() -> None:
    """No key says that they are removed; llama.cpp goes by the name of the model, and so do reading and writing."""
    tokenizer = sentencepiece(True)
    tokenizer.add_special_tokens([AddedToken("<|user|>", normalized=False, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False, rstrip=True)])
    rows = tokenizer.get_vocab_size()
    with pytest.raises(ValueError, match="no key for rstrip of tokens, .* '</s>', '<.user.>' .* name 'mine'"):
        write_tokenizer(tokenizer, rows, CONFIG, "mine")
    metadata = write_tokenizer(tokenizer, rows, CONFIG, "Phi-3-mini")
    texts = ["<|user|>  abc", "<s>  abc</s>  abc"]
    for name, same in (("Phi-3-mini", True), ("mine", False)):
        again = read_tokenizer({**metadata, "general.name": name})
        assert again is not None
        assert (ids(again, texts) == ids(tokenizer, texts)) == same
    with pytest.raises(ValueError, match="no key for rstrip"):
        write_tokenizer(sentencepiece(True), rows - 1, CONFIG, "phi3")
    for flags in ({"lstrip": True}, {"single_word": True}):
        other = sentencepiece(True)
        other.add_special_tokens([AddedToken("<x>", normalized=False, **flags)])
        with pytest.raises(ValueError, match=f"no key for {next(iter(flags))} of tokens"):
            write_tokenizer(other, rows, CONFIG, "mine")

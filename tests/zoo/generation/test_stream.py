"""Text in pieces: characters of several bytes, and stop strings that straddle tokens."""

from typing import Any

import pytest
from flaxzoo.zoo.generation.stream import BYTES, INVALID, REPLACEMENT, TextStream, split_stop
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel

TEXT = "Grüße, 世界! 👩‍👩‍👧‍👦 naïve café — done\n"


def made():
    """A byte-level tokenizer: one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


TOKENIZER = made()
END: Any = TOKENIZER.token_to_id("<|end|>")


def pieces(text, sizes, stop=(), ends=()):
    stream, ids = TextStream(TOKENIZER, stop, ends), TOKENIZER.encode(text).ids
    found = []
    while ids:
        size = sizes[len(found) % len(sizes)]
        found.append(stream.push(ids[:size]))
        ids = ids[size:]
    return stream, [*found, stream.finish()]


def test_whole_characters_as_soon_as_they_are_there():
    _, found = pieces(TEXT, [1])
    assert [piece for piece in found if piece] == list(TEXT)
    assert found[2:4] == ["", "ü"]


@given(
    st.text(max_size=40), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.text("ab ü", min_size=1, max_size=4)
)
def test_pieces_add_up_to_the_text_before_the_stop_string(text, sizes, stop):
    stream, found = pieces(text, sizes, (stop,))
    assert "".join(found) == stream.text == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_of_several_stop_strings_the_first_to_stand_there_counts(text, stop):
    _, found = pieces(text, [1], stop)
    places = [text.index(string) for string in stop if string in text]
    # Token by token, the string that is complete first ends the text: one that starts earlier may be longer.
    ends = min((text.index(string) + len(string) for string in stop if string in text), default=None)
    seen = text if ends is None else text[:ends]
    wanted = min((seen.index(string) for string in stop if string in seen), default=len(text))
    assert "".join(found) == text[:wanted]
    assert (wanted < len(text)) <= bool(places)


def test_no_start_of_a_stop_string_is_ever_given_out():
    _, found = pieces("a###b##\n###", [1], ("###\n",))
    assert found == ["a", "", "", "", "###b", "", "", "##\n", "", "", "", "", "###"][: len(found) - 1] + ["###"]
    _, found = pieces("a###\nb", [1], ("###\n",))
    assert found == ["a"] + [""] * 6


def test_a_token_ends_the_text_and_is_not_in_it():
    stream = TextStream(TOKENIZER, (), (END,))
    ids = TOKENIZER.encode("ab").ids
    assert stream.push([*ids, END, *ids]) == "ab"
    assert (stream.stopped, stream.ids) == (True, [*ids, END])
    assert stream.push(ids) == stream.finish() == ""


def tokens_of(data):
    alphabet = {byte: char for char, byte in BYTES.items()}
    return [TOKENIZER.token_to_id(alphabet[byte]) for byte in data]


def fallback_tokenizer():
    """SentencePiece's kind: a token for each byte, and a few words."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257, REPLACEMENT: 258}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="b"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def in_pieces(tokenizer, ids, sizes, **options):
    stream, ids, pieces = TextStream(tokenizer, **options), list(ids), []
    while ids:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[:size]))
        ids = ids[size:]
    return "".join([*pieces, stream.finish()])


# Incomplete characters, bytes that no character has, and replacement characters that were written.
DATA = st.lists(
    st.sampled_from([b"\xc3", b"\xa9", b"\xff", b"\xf0\x9f", b"a", "\ufffd".encode(), "é".encode()]), max_size=8
)


@given(DATA, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_bytes_that_are_not_text(data, sizes):
    """Within a text they are U+FFFD; at its end they are left out; a U+FFFD that was written stays."""
    data = b"".join(data)
    marked = data.decode(errors="flaxzoo.invalid")
    expected = marked.rstrip(INVALID).replace(INVALID, REPLACEMENT)
    assert in_pieces(TOKENIZER, tokens_of(data), sizes) == expected
    assert in_pieces(fallback_tokenizer(), data, sizes) == expected
    assert data.decode(errors="replace").startswith(expected)


@pytest.mark.parametrize(
    ("data", "text"), [(b"caf\xc3", "caf"), (b"ok \xef\xbf\xbd", "ok \ufffd"), (b"\xf0\x9f\x98", ""), (b"a\xff", "a")]
)
def test_the_end_of_a_text_is_a_whole_character(data, text):
    """At max_tokens, at an end token, at a stop string, and with a prompt before it."""
    ids = tokens_of(data)
    assert in_pieces(TOKENIZER, ids, [1]) == in_pieces(TOKENIZER, ids, [9]) == text
    assert in_pieces(TOKENIZER, [*ids, END, *ids], [1], ends=(END,)) == text
    assert in_pieces(TOKENIZER, [*ids, *tokens_of(b"###")], [2], stop=("###",)) == text
    assert in_pieces(TOKENIZER, ids, [2], before=tokens_of("a \ufffd".encode())) == text
    assert in_pieces(TOKENIZER, ids, [2], before=tokens_of(b"a \xf0\x9f")) == text


def test_stop_strings_match_text_and_special_tokens_match_ids():
    assert split_stop(TOKENIZER, ("é", "a", "<|end|>", 5, END)) == (("é", "a"), (END, 5))
    byte = TOKENIZER.token_to_id("é")  # the byte 0xE9 in a byte-level alphabet
    assert byte is not None
    strings, ends = split_stop(TOKENIZER, ("é",))
    assert in_pieces(TOKENIZER, [byte, *TOKENIZER.encode("aé").ids], [1], stop=strings, ends=ends) == REPLACEMENT + "a"
    strings, ends = split_stop(TOKENIZER, ("<|end|>",))
    spelled = [token for char in "<|end|>b" for token in TOKENIZER.encode(char).ids]
    assert in_pieces(TOKENIZER, [*spelled, END, *spelled], [3], stop=strings, ends=ends) == "<|end|>b"


def test_a_space_between_prompt_and_continuation_stays():
    """A decoder of SentencePiece's kind drops the space that a text begins with."""
    words = Tokenizer(WordLevel({"▁The": 0, "▁cat": 1, "▁sat": 2, "s": 3}, unk_token="s"))
    words.decoder = decoders.Metaspace()
    assert words.decode([1, 2]) == "cat sat"
    for before, wanted in (([0], " cats"), ([], "cats"), ([0] * 20, " cats")):
        stream = TextStream(words, before=before)
        assert stream.push([1]) + stream.push([3]) + stream.finish() == wanted


def test_a_character_that_the_prompt_leaves_unfinished():
    first, second = TOKENIZER.encode("é").ids
    stream = TextStream(TOKENIZER, before=[first])
    assert stream.push([second]) == "é"

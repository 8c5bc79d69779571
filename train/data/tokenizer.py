"""Tokenizers: a byte-level BPE trained on the text and cached, or a tokenizer.json."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ...zoo.end_tokens import END_OF_TEXT, SEPARATORS, separator_id
from ...zoo.formats.tokenizer_file import read_tokenizer_file
from ...zoo.text_encoding import added_ids, encode
from .cache import DamagedEntryError, digest, filled
from .sources import Source
from .split import place, split

TRAINING_BYTES = 256 * 2**20
"""Largest amount of text that a BPE is trained on, in bytes: a sample spread evenly over the text."""

_PIECE = 2**16  # characters
_LONG_RUN = re.compile(r"\S{64}(?=\S)")
"""Text without a space, which a BPE is trained on in pieces: the time grows with the square of a piece's length."""
_BREAKS = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


def load_tokenizer(file: str | Path) -> Tokenizer:
    """A tokenizer.json, set to add nothing and cut nothing.

    Raises:
        ValueError: there is no such file, it is not a tokenizer, or it has no token to separate documents with.
    """
    tokenizer = read_tokenizer_file(file)
    names = [str(tokenizer.id_to_token(index)) for index in sorted({*ends(tokenizer)})]
    tokenizer.add_special_tokens(names)  # where they were common tokens, which text can spell
    return tokenizer


def separator(tokenizer: Tokenizer) -> int:
    """The id of the token between documents. Raises ValueError where the tokenizer has none of SEPARATORS."""
    if (index := separator_id(tokenizer)) is not None:
        return index
    raise ValueError(
        f"a tokenizer must have one of the tokens {', '.join(SEPARATORS)} to separate documents with, and this one has "
        f"none; add {END_OF_TEXT} to it: tokenizer.add_special_tokens([{END_OF_TEXT!r}])"
    )


class Ends(NamedTuple):
    """The ids before and after a document, which are the same unless the tokenizer has a BOS token."""

    begin: int
    end: int


def ends(tokenizer: Tokenizer) -> Ends:
    """The token that the tokenizer adds before a text, by default the separator, and the separator after it.

    Raises as `separator`.
    """
    end = separator(tokenizer)
    return Ends(next(iter(added_ids(tokenizer)), end), end)


def ids(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs for this tokenizer: its highest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A digest of the tokenizer."""
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=10).hexdigest()


def trained_tokenizer(
    sources: Sequence[Source],
    shares: Sequence[float],
    *,
    vocab: int,
    heldout: float,
    cache: Path,
    special_tokens: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Tokenizer:
    """A byte-level BPE trained on the training text, cached.

    It encodes any text without loss. On little text it has fewer tokens than asked for.

    Args:
        sources: the text.
        shares: how much of each source is looked at, where there is more than `TRAINING_BYTES` in all; sums to 1.
        vocab: its size, the separator and the 256 bytes included.
        heldout: the fraction held out, which is not looked at.
        cache: the cache folder.
        special_tokens: text that spells the separator is the separator, and not looked at.
        progress: called with the bytes read so far and about how many will be read.

    Raises:
        ValueError: the vocabulary is too small for bytes.
        CacheError: the cache cannot be written.
    """
    if vocab < 257:
        raise ValueError(
            f"a byte-level vocabulary must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab}; "
            "set --model.vocab 257 or more"
        )

    def fill(aside: Path) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        texts = (piece for pair in zip(sources, shares, strict=True) for piece in _sampled(*pair, heldout))
        texts = _with_progress(texts, min(TRAINING_BYTES, sum(source.size for source in sources)), progress)
        if special_tokens:
            texts = (part for text in texts for part in text.split(END_OF_TEXT))
        tokenizer.train_from_iterator((part for text in texts for part in _without_long_runs(text)), trainer)
        aside.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    key = digest(
        3, [source.fingerprint for source in sources], list(shares), vocab, heldout, TRAINING_BYTES, special_tokens
    )
    entry = filled(cache / "tokenizers" / f"{key}.json", fill)
    try:
        return load_tokenizer(entry)
    except ValueError as error:
        raise DamagedEntryError(entry, error) from error


def _sampled(source: Source, share: float, heldout: float) -> Iterator[str]:
    kept = min(1.0, TRAINING_BYTES * share / max(1, source.size)) * 2**64
    parts = (piece for part in split(source, heldout) if part.text and not part.held for piece in pieces(part.text))
    return (piece for index, piece in enumerate(parts) if place(index) < kept)


def _without_long_runs(text: str) -> Iterator[str]:
    """A text in pieces, none of which has more than 64 characters without a space."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _with_progress(
    texts: Iterable[str], total: int, progress: Callable[[int, int | None], None] | None
) -> Iterator[str]:
    done = 0
    for text in texts:
        yield text
        done += len(text.encode())
        if progress:
            progress(done, max(done, total))


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of 64 to 128 thousand characters, cut where a byte-level BPE breaks words anyway."""
    start = 0
    while len(text) - start > 2 * _PIECE:
        low, high = start + _PIECE, start + 2 * _PIECE
        found = (pattern.search(text, low, high) for pattern in _BREAKS)
        end = next((match.end() for match in found if match), high)
        yield text[start:end]
        start = end
    yield text[start:]


def cuttable(tokenizer: Tokenizer) -> bool:
    """Whether a text's pieces encode to what the whole encodes to (not so where each text gets a space in front)."""
    for left, right in (("some words,\n", "more words"), ("some words.\n", "9 lines"), ("some", " words\n")):
        parts = [encode(tokenizer, text) for text in (left, right, left + right)]
        if parts[0] + parts[1] != parts[2]:
            return False
    return True

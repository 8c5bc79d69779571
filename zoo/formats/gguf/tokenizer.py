"""Tokenizers from the metadata of GGUF files."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models

from ..sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces, add_special_tokens, bpe_tokenizer
from ..tokenizer_file import put_around
from .words import WORDS, Words


def read_tokenizer(metadata: Mapping[str, object]) -> Tokenizer | None:
    """The tokenizer that metadata describe: a byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

    `encode` adds the tokens of beginning and end that the metadata ask for, and reads text that spells a special token
    as that token, unless told otherwise.

    Raises:
        ValueError: the kind of tokenizer or its way to split words is not supported, or the metadata contradict
            themselves.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"the tokenizer {kind!r:.100} is not supported; supported are gpt2 and llama (SentencePiece)")
    tokens = _array(metadata, "tokens", str)
    types = _array(metadata, "token_type", int, len(tokens)) or [NORMAL] * len(tokens)
    if len(set(tokens)) != len(tokens) or "" in tokens:
        raise ValueError("the tokens of a tokenizer must differ, and none be empty")
    try:
        if kind == "gpt2":
            tokenizer, words = _byte_level(metadata, tokens)
            begins = words.begin
        else:
            tokenizer, begins = _sentencepiece(metadata, tokens, types), True
        special = [token for token, type in zip(tokens, types, strict=True) if type in (UNKNOWN, CONTROL, USER_DEFINED)]
        add_special_tokens(tokenizer, tokens, types, strips_spaces_after(metadata.get("general.name"), special))
        _add_ends(tokenizer, metadata, tokens, begins)
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"the tokenizer of the metadata is damaged: {error}") from error
    return tokenizer


def strips_spaces_after(name: object, special: Collection[str]) -> set[str]:
    """The special tokens after which llama.cpp removes spaces, which no key says: it goes by the name of the model."""
    if not isinstance(name, str) or not any(part in name.lower() for part in ("phi-3", "phi3")):
        return set()
    return set(special) - {"<unk>", "<s>", "<|endoftext|>"}


def _array(metadata: Mapping[str, object], name: str, kind: type, count: int | None = None) -> list[Any]:
    """A list of the metadata, empty where it is not there and need not be."""
    values = metadata.get(f"tokenizer.ggml.{name}", [] if count is not None else None)
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"tokenizer.ggml.{name} must be an array of {kind.__name__}, got {values!r:.100}")
    if count is not None and len(values) not in (0, count):
        raise ValueError(f"tokenizer.ggml.{name} must have one element for each of {count} tokens, got {len(values)}")
    return values


def _byte_level(metadata: Mapping[str, object], tokens: list[str]) -> tuple[Tokenizer, Words]:
    name = metadata.get("tokenizer.ggml.pre")
    if (words := WORDS.get(str(name))) is None:
        raise ValueError(f"tokenizer.ggml.pre = {name!r:.100} is not supported; known are {', '.join(sorted(WORDS))}")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for merge in _array(metadata, "merges", str):
        # A space within a token is written otherwise, so the first one after the first character separates.
        left, _, right = merge[1:].partition(" ")
        merges.append((merge[:1] + left, right))
        if not all(part in vocab for part in (*merges[-1], "".join(merges[-1]))):
            raise ValueError(f"tokenizer.ggml.merges has {merge!r}, whose parts or whole are no tokens")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=words.whole))
    tokenizer.normalizer = words.normalizer()
    tokenizer.pre_tokenizer = words.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer, words


def _sentencepiece(metadata: Mapping[str, object], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _array(metadata, "scores", float, len(tokens))
    if not scores:
        raise ValueError("a SentencePiece tokenizer needs tokenizer.ggml.scores")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise ValueError(f"tokenizer.ggml.unknown_token_id must be one of {len(tokens)} tokens, got {unknown!r}")
    space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return bpe_tokenizer(Pieces(tokens, scores, types, unknown, space_prefix))


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, object], tokens: list[str], begins: bool) -> None:
    ends: dict[str, list[str]] = {}
    for name, default in (("bos", begins), ("eos", False)):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if not metadata.get(f"tokenizer.ggml.add_{name}_token", default and index is not None):
            ends[name] = []
        elif isinstance(index, int) and 0 <= index < len(tokens):
            ends[name] = [tokens[index]]
        else:
            raise ValueError(f"tokenizer.ggml.{name}_token_id must be one of {len(tokens)} tokens, got {index!r}")
    if ends["bos"] or ends["eos"]:
        put_around(tokenizer, ends["bos"], ends["eos"])

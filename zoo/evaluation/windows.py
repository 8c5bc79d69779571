"""Windows of a text: what a model reads at once where the text is longer than that."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from ..text_encoding import added_ids


@dataclass(frozen=True)
class Window:
    """Token ids, of which the last `scored` are scored, each given all ids before it in the window."""

    ids: tuple[int, ...]
    scored: int


def split_into_windows(
    ids: Sequence[int], *, prefix: int, length: int, stride: int, prefix_everywhere: bool = False
) -> Iterator[Window]:
    """The windows of a document, which together score each of its tokens once.

    The first window is `prefix` and the first `length` tokens, all of them scored. Each later one ends `stride` tokens
    after the window before it and scores those. It is as long as the first, so a scored token has at least
    `length - stride` tokens of the document before it in its window, or with `stride = length` at least the one that
    `prefix` or the window before it ended with.

    Args:
        ids: tokens of the document, without `prefix`.
        prefix: token on which the first token of the document is conditioned, not scored itself.
        length: tokens that the model reads, at most; a window has one more, which is predicted alone.
        stride: tokens by which windows move, from 1 to `length`.
        prefix_everywhere: whether later windows start with `prefix` too.
    """
    scored = 0
    while scored < len(ids):
        end = min(len(ids), scored + (stride if scored else length))
        start = end - length if prefix_everywhere else end - length - 1
        before = (prefix,) if prefix_everywhere or start < 0 else ()
        yield Window((*before, *ids[max(0, start) : end]), end - scored)
        scored = end


def adds_prefix(tokenizer: Tokenizer, prefix: int) -> bool:
    """Whether the tokenizer puts this token before every text by itself, as it does with BOS."""
    return added_ids(tokenizer)[:1] == [prefix]


def prefix_token(tokenizer: Tokenizer, bos: str | None, end_tokens: Sequence[str]) -> int | None:
    """Token on which the first token of a text is conditioned: BOS, or the first end token where there is no BOS.

    This is `prefix_token_id` of lm-evaluation-harness's Hugging Face backend. A tokenizer that names no BOS but puts a
    token before each text has that one. None where there is none of these.
    """
    candidates = [tokenizer.token_to_id(bos)] if bos is not None else added_ids(tokenizer)[:1]
    ids = [*candidates, *map(tokenizer.token_to_id, end_tokens)]
    return next((number for number in ids if number is not None), None)

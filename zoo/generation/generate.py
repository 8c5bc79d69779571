"""Text from a model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from jaxtyping import Array, Key
from tokenizers import Tokenizer

from ...layers.random import random_key
from ...layers.spec import unknown
from ..decoder import DecoderModel
from ..text_encoding import encode
from .sampling import Sampling
from .session import NewTokens, Session, Speed
from .speculative import Speculation
from .state import STRIDE
from .stream import TextStream

STOP = ("<|endoftext|>",)
Prompt = str | Sequence[int]
"""A text, or its tokens."""


@dataclass(frozen=True)
class Completion:
    """What a model made of one prompt."""

    text: str
    """Up to, and without, what stopped it."""
    ids: list[int]
    """All tokens that were drawn, with the one that stopped it."""
    log_probs: list[float]
    """The logarithm of the probability of each, by the model before any filter; empty where not asked for."""
    stopped: bool
    """Whether a stop string or token came; or it was cut at `max_tokens`."""
    speed: Speed
    """Of all prompts together."""


class Options(TypedDict, total=False):
    """What `generate`, `complete` and `stream` take by name, beside `max_tokens`."""

    sampling: Sampling
    """Temperature, filters and repetition penalty."""
    stop: Sequence[str]
    """Strings that end a text, wherever they stand; one that is a token of the tokenizer also ends it as such. By
    default STOP."""
    seed: int
    """Of the random draws, by default 0."""
    key: Key[Array, ""] | None
    """In place of `seed`."""
    log_probs: bool
    """Return the log-probability of each token, too."""
    dtype: Any
    """What the model computes in, by default float32."""
    cache_dtype: Any
    """Of keys and values; int8 stores them quantized. By default, `dtype`."""
    speculation: Speculation | None
    """Guess tokens ahead by looking up what followed the latest ones in the text (zoo/generation/speculative.py)."""
    special_tokens: bool
    """Read text of a prompt that spells a special token as that token. By default it is plain text."""
    draft: DecoderModel | None
    """A smaller model of the same vocabulary that guesses tokens ahead, as many as `speculation` says."""


def generate(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 200,
    **options: Unpack[Options],
) -> list[str]:
    """Continues each prompt, and returns the continuations without their prompts.

    The options are those of `complete`: sampling, stop, seed, key, log_probs, dtype, cache_dtype, speculation, draft.
    """
    return [found.text for found in complete(model, tokenizer, prompts, max_tokens=max_tokens, **options)]


def complete(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 200,
    **options: Unpack[Options],
) -> list[Completion]:
    """Continues each prompt.

    Prompts may differ in length; each result is what the prompt alone would have given, and each row draws from its own
    random stream, which depends on the seed and the row.

    Args:
        model: the decoder.
        tokenizer: turns prompts into the ids the model was trained on, with the special tokens it adds by itself.
        prompts: texts, or their tokens; an empty one starts with the first token that `stop` names.
        max_tokens: how many tokens are generated at most.
        **options: `Options`: sampling, stop, seed or key, log_probs, dtype, cache_dtype, speculation, draft.

    Raises:
        ValueError: on no prompts, max_tokens below 1, an empty stop string, an empty prompt with no token to start
            from, more tokens than the model has learned positions for,
            or a draft model of another vocabulary.
        TypeError: on an option that there is not.
    """
    writing, rows = _begin(model, tokenizer, prompts, max_tokens, options)
    for _ in writing.pieces(rows, max_tokens, lambda: STRIDE):
        pass
    return writing.completions()


class stream:
    """Continues one prompt, and gives the text in pieces, each about as soon as it is there.

    `for piece in zoo.stream(model, tokenizer, prompt): print(piece, end="", flush=True)`. The options are those of
    `complete`. A piece never ends within a character, nor has it the start of a stop string. After the last one,
    `completion` has it all, with the speed.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        prompt: Prompt,
        *,
        max_tokens: int = 200,
        **options: Unpack[Options],
    ):
        self._writing, self._rows = _begin(model, tokenizer, [prompt], max_tokens, options)
        self._max_tokens = max_tokens

    def __iter__(self) -> Iterator[str]:
        pace = StreamInterval(self._writing.session)
        for (piece,) in self._writing.pieces(self._rows, self._max_tokens, pace):
            if piece:
                yield piece

    @property
    def completion(self) -> Completion:
        """What has come so far."""
        return self._writing.completions()[0]


class StreamInterval:
    """How many tokens to draw before the next piece: what a tenth of a second is enough for."""

    def __init__(self, session: Session):
        self.session = session

    def __call__(self) -> int:
        """A number from 1 to STRIDE."""
        return max(1, min(STRIDE, int(self.session.speed.tokens_per_second / 10)))


def _begin(
    model: DecoderModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_tokens: int, options: Options
) -> tuple["Generation", list[list[int]]]:
    """A session for prompts, and their tokens."""
    _check_names(options)
    rest: dict[str, Any] = {"sampling": Sampling(), **options}
    stop, seed, key = rest.pop("stop", STOP), rest.pop("seed", 0), rest.pop("key", None)
    special_tokens = rest.pop("special_tokens", False)
    _check(model, prompts, max_tokens, stop)
    ends = [found for found in map(tokenizer.token_to_id, stop) if found is not None]
    rows = [_ids(tokenizer, prompt, special_tokens) or ends[:1] for prompt in prompts]
    if not all(rows):
        raise ValueError(f"an empty prompt needs a token to start from, and none of stop={tuple(stop)} is one")
    length = max(map(len, rows)) + max_tokens
    check_length(model, length)
    key = random_key(seed) if key is None else key
    session = Session(model, batch=len(rows), length=length, key=key, ends=ends, **rest)
    # What follows an empty prompt is the beginning of a text.
    before = [row if prompt else [] for row, prompt in zip(rows, prompts, strict=True)]
    return Generation(session, [TextStream(tokenizer, stop, ends, row) for row in before]), rows


class Generation:
    """Rows of a session on their way to texts."""

    def __init__(self, session: Session, streams: Sequence[TextStream]):
        self.session, self.streams = session, streams
        self.log_probs: list[list[float]] = [[] for _ in streams]

    def pieces(self, rows: Sequence[Sequence[int]], max_tokens: int, limit: Callable[[], int]) -> Iterator[list[str]]:
        """Reads the rows, and gives the new text of each, time and again until all are done.

        `limit` says how many tokens are drawn before the next piece.
        """
        drawn = self.session.read(rows, max_tokens)
        while True:
            yield [self._push(row, new) for row, new in enumerate(drawn)]
            if not any(self.session.active):
                break
            drawn = self.session.advance(limit())
        rest = [stream.finish() for stream in self.streams]
        if any(rest):
            yield rest

    def _push(self, row: int, new: NewTokens) -> str:
        stream, before = self.streams[row], len(self.streams[row].ids)
        piece = stream.push(new.ids)
        self.log_probs[row].extend(new.log_probs[: len(stream.ids) - before])
        if stream.stopped and self.session.active[row]:
            self.session.end(row)
        return piece

    def completions(self) -> list[Completion]:
        """What came of it all."""
        logged = self.session.log_probs
        return [
            Completion(stream.text, stream.ids, probs if logged else [], stream.stopped, self.session.speed)
            for stream, probs in zip(self.streams, self.log_probs, strict=True)
        ]


def check_length(model: DecoderModel, length: int) -> None:
    """Raises ValueError where rows of so many tokens do not fit the model."""
    limit = model.spec.max_positions
    if limit and length > limit:
        raise ValueError(f"prompt and continuation come to {length} tokens, the model has {limit} positions")


def _check_names(options: Mapping[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(Sampling)}
    for name in options.keys() - Options.__annotations__.keys():
        if name in fields:
            raise TypeError(f"{name} is a field of Sampling: pass sampling=Sampling({name}={options[name]!r})")
        raise TypeError(str(unknown("option", name, ["max_tokens", *Options.__annotations__])))


def _check(model: DecoderModel, prompts: Sequence[Prompt], max_tokens: int, stop: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError(f"prompts are a list of texts, got one text; write [{prompts[:20]!r}]")
    if not prompts or max_tokens < 1:
        raise ValueError(
            f"generation needs prompts and max_tokens >= 1, got {len(prompts)} prompts, max_tokens={max_tokens}"
        )
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop is a sequence of strings that are not empty, got {stop!r}")
    vocab = model.spec.vocab
    for prompt in prompts:
        if not isinstance(prompt, str) and not all(0 <= token < vocab for token in prompt):
            raise ValueError(f"tokens of a prompt must be at least 0 and below the vocabulary of {vocab}, got {prompt}")


def _ids(tokenizer: Tokenizer, prompt: Prompt, special_tokens: bool) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    return encode(tokenizer, prompt, special_tokens=special_tokens, add_special_tokens=True)

"""Text generation from prompts: all at once (`generate`, `complete`) or piece by piece (`stream`)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from jax.typing import DTypeLike
from jaxtyping import Array, Key
from tokenizers import Tokenizer

from ...layers.random import random_key
from ...layers.spec import unknown
from ..decoder import DecoderModel
from ..end_tokens import known_end_ids
from ..formats.tokenizer_file import prepare_tokenizer
from ..text_encoding import encode
from .sampling import Sampling
from .session import NewTokens, Session, Speed
from .speculative import Speculation
from .state import STRIDE
from .stream import TextStream, split_stop

Prompt = str | Sequence[int]
"""A text, or its token ids."""


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt."""

    text: str
    """The continuation, without the stop string or token that ended it."""
    ids: list[int]
    """All generated tokens, with the one that ended the text."""
    log_probs: list[float]
    """The log-probability of each token, by the model before any filter; empty unless requested."""
    stopped: bool
    """Whether a stop string or token ended the text; otherwise it has `max_tokens` tokens."""
    speed: Speed
    """The speed of the whole batch."""


class Options(TypedDict, total=False):
    """The keyword arguments that `generate`, `complete` and `stream` share, beside `max_tokens`."""

    sampling: Sampling
    """Temperature, filters and repetition penalty."""
    stop: Sequence[str | int]
    """What ends a text. A string ends it where the text spells it, across tokens too. An integer is a token id, and the
    text of a special token ("</s>") means that token. By default the special tokens of the tokenizer that are known to
    end texts (`known_end_ids`); `TextModel` passes those of its checkpoint."""
    seed: int
    """Random seed of sampling, by default 0."""
    key: Key[Array, ""] | None
    """Random key of sampling, in place of `seed`."""
    log_probs: bool
    """Whether to return the log-probability of each token."""
    dtype: DTypeLike
    """The dtype the model computes in, by default float32."""
    cache_dtype: DTypeLike | None
    """The dtype of the KV cache, by default `dtype`; int8 quantizes it."""
    speculation: Speculation | None
    """Speculative decoding: candidates are the tokens that followed the latest ones earlier in the text."""
    special_tokens: bool
    """Read text of a prompt that spells a special token as that token. By default it is plain text."""
    draft: DecoderModel | None
    """A smaller model with the same vocabulary that proposes the candidates of speculative decoding."""


def generate(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 200,
    **options: Unpack[Options],
) -> list[str]:
    """Continues each prompt and returns the continuations, without their prompts.

    Arguments and errors are those of `complete`.
    """
    completions = complete(model, tokenizer, prompts, max_tokens=max_tokens, **options)
    return [completion.text for completion in completions]


def complete(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 200,
    **options: Unpack[Options],
) -> list[Completion]:
    """Continues each prompt.

    Prompts may differ in length. A prompt's continuation does not depend on the other prompts of the batch. Each row
    samples from its own random stream, which depends on the seed and the row's index.

    Args:
        model: the decoder.
        tokenizer: turns prompts into ids; it adds the special tokens that it is configured to add.
        prompts: texts, or lists of token ids. An empty prompt starts with the first token that `stop` names.
        max_tokens: the most tokens that a continuation has.
        **options: `Options`: sampling, stop, seed or key, log_probs, dtype, cache_dtype, speculation, draft.

    Raises:
        ValueError: no prompts, max_tokens below 1, an empty stop string, an empty prompt with no token to start
            from, more tokens than the model has learned positions for, or a draft model with another vocabulary.
        TypeError: an unknown option.
    """
    generation, rows = _begin(model, tokenizer, prompts, max_tokens, options)
    for _ in generation.pieces(rows, max_tokens, lambda: STRIDE):
        pass
    return generation.completions()


class stream:
    """Continues one prompt and gives the text in pieces as they are generated.

    `for piece in zoo.stream(model, tokenizer, prompt): print(piece, end="", flush=True)`. Arguments are those of
    `complete`, with one prompt. A piece never ends within a character, nor with the start of a stop string. After the
    last piece, `completion` has the text, its tokens and the speed. A stream can be read once: a second iteration
    raises ValueError.
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
        self._generation, self._rows = _begin(model, tokenizer, [prompt], max_tokens, options)
        self._max_tokens, self._started = max_tokens, False

    def __iter__(self) -> Iterator[str]:
        if self._started:
            raise ValueError(
                "a stream can be read once: its text is in stream.completion.text; "
                "call zoo.stream again to generate another one"
            )
        self._started = True
        return self._pieces()

    def _pieces(self) -> Iterator[str]:
        interval = StreamInterval(self._generation.session)
        for (piece,) in self._generation.pieces(self._rows, self._max_tokens, interval):
            if piece:
                yield piece

    @property
    def completion(self) -> Completion:
        """The continuation so far."""
        return self._generation.completions()[0]


class StreamInterval:
    """How many tokens to generate between two pieces: about a tenth of a second's worth."""

    def __init__(self, session: Session):
        self.session = session

    def __call__(self) -> int:
        """A number from 1 to STRIDE."""
        return max(1, min(STRIDE, int(self.session.speed.tokens_per_second / 10)))


def _begin(
    model: DecoderModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_tokens: int, options: Options
) -> tuple["Generation", list[list[int]]]:
    """A generation that has not read its prompts yet, and their tokens."""
    _check_names(options)
    tokenizer = prepare_tokenizer(tokenizer)
    session_options: dict[str, Any] = {"sampling": Sampling(), **options}
    stop = session_options.pop("stop", None)
    stop = known_end_ids(tokenizer) if stop is None else stop
    seed, key = session_options.pop("seed", 0), session_options.pop("key", None)
    special_tokens = session_options.pop("special_tokens", False)
    _check(model, prompts, max_tokens, stop)
    strings, ends = split_stop(tokenizer, stop)
    rows = [_ids(tokenizer, prompt, special_tokens) or [*ends[:1]] for prompt in prompts]
    if not all(rows):
        raise ValueError(f"an empty prompt needs a token to start from, and stop={tuple(stop)} names no token")
    length = max(map(len, rows)) + max_tokens
    check_length(model, length)
    key = random_key(seed) if key is None else key
    session = Session(model, batch=len(rows), length=length, key=key, ends=ends, **session_options)
    # The continuation of an empty prompt is the beginning of a text.
    contexts = [row if prompt else [] for row, prompt in zip(rows, prompts, strict=True)]
    return Generation(session, [TextStream(tokenizer, strings, ends, context) for context in contexts]), rows


class Generation:
    """The rows of a session and the texts they become."""

    def __init__(self, session: Session, streams: Sequence[TextStream]):
        self.session, self.streams = session, streams
        self.log_probs: list[list[float]] = [[] for _ in streams]

    def pieces(self, rows: Sequence[Sequence[int]], max_tokens: int, limit: Callable[[], int]) -> Iterator[list[str]]:
        """Reads the rows and yields the new text of every row, until all rows are finished.

        `limit` returns how many tokens are generated before the next piece.
        """
        new_tokens = self.session.read(rows, max_tokens)
        while True:
            yield [self._push(row, new) for row, new in enumerate(new_tokens)]
            if not any(self.session.active):
                break
            new_tokens = self.session.advance(limit())
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
        """The continuations so far."""
        logged = self.session.log_probs
        return [
            Completion(stream.text, stream.ids, log_probs if logged else [], stream.stopped, self.session.speed)
            for stream, log_probs in zip(self.streams, self.log_probs, strict=True)
        ]


def check_length(model: DecoderModel, length: int) -> None:
    """Raises ValueError if a row of `length` tokens has more positions than the model learned."""
    limit = model.spec.max_positions
    if limit and length > limit:
        raise ValueError(f"prompt and continuation have {length} tokens, and the model has {limit} positions")


def _check_names(options: Mapping[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(Sampling)}
    for name in options.keys() - Options.__annotations__.keys():
        if name in fields:
            raise TypeError(f"{name} is a field of Sampling: pass sampling=Sampling({name}={options[name]!r})")
        raise TypeError(str(unknown("option", name, ["max_tokens", *Options.__annotations__])))


def _check(model: DecoderModel, prompts: Sequence[Prompt], max_tokens: int, stop: Sequence[str | int]) -> None:
    vocab = model.spec.vocab
    if isinstance(prompts, str):
        raise ValueError(f"prompts are a list of texts, got one text; write [{prompts[:20]!r}]")
    if not prompts or max_tokens < 1:
        raise ValueError(
            f"generation needs prompts and max_tokens >= 1, got {len(prompts)} prompts, max_tokens={max_tokens}"
        )
    if isinstance(stop, str) or "" in stop:
        raise ValueError(f"stop is a sequence of strings that are not empty and of token ids, got {stop!r}")
    if wrong := [item for item in stop if not isinstance(item, str) and not 0 <= item < vocab]:
        raise ValueError(f"token ids in stop must be at least 0 and below the vocabulary of {vocab}, got {wrong}")
    for prompt in prompts:
        if not isinstance(prompt, str) and not all(0 <= token < vocab for token in prompt):
            raise ValueError(f"tokens of a prompt must be at least 0 and below the vocabulary of {vocab}, got {prompt}")


def _ids(tokenizer: Tokenizer, prompt: Prompt, special_tokens: bool) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    return encode(tokenizer, prompt, special_tokens=special_tokens, add_special_tokens=True)

"""Conversations: the template a chat model was trained with, and turns that reuse the caches of those before."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from ...layers.random import random_key
from ..decoder import DecoderModel
from ..formats.tokenizer_file import prepare_tokenizer
from ..text_encoding import encode
from .generate import Generation, StreamInterval, check_length
from .sampling import Sampling
from .session import Session, Speed
from .speculative import Speculation
from .stream import TextStream, split_stop
from .template import ChatTemplate


class Conversation:
    """Messages back and forth with a model; what the caches hold of the turns before is not read again.

    Args:
        model: the decoder.
        tokenizer: of the model.
        template: makes text of messages.
        stop: strings that end an answer: the tokens that the template puts at the end of one.
        system: the first message, from "system".
        sampling: how tokens are drawn.
        seed: of the draws.
        dtype: what the model computes in.
        cache_dtype: of keys and values; int8 quantizes them.
        speculation: how tokens are guessed ahead, if at all.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        stop: Sequence[str | int],
        system: str | None = None,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        dtype: DTypeLike = jnp.float32,
        cache_dtype: DTypeLike | None = None,
        speculation: Speculation | None = None,
    ):
        self.model, self.tokenizer, self.template = model, prepare_tokenizer(tokenizer), template
        self.stop, self.ends = split_stop(self.tokenizer, stop)
        self.first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = [*self.first]
        self._options: dict[str, Any] = {
            "sampling": sampling,
            "ends": self.ends,
            "dtype": dtype,
            "cache_dtype": cache_dtype,
            "speculation": speculation,
        }
        self._key, self._session = random_key(seed), None
        self.reused = 0
        """Tokens of the latest prompt that were in the caches."""

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = [*self.first]

    @property
    def speed(self) -> Speed:
        """Of the latest answer."""
        return Speed() if self._session is None else self._session.speed

    def say(self, text: str, *, max_tokens: int = 1000) -> Iterator[str]:
        """The answer to a message, in pieces. Left before its end, the answer so far stays in the conversation.

        Raises ValueError where the template refuses the message, or the model has no room; the message is not kept.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = encode(self.tokenizer, self.template.render(messages), special_tokens=True)
        check_length(self.model, len(ids) + max_tokens)
        session = self._ready(ids, max_tokens)
        stream = TextStream(self.tokenizer, self.stop, self.ends)
        self.messages = messages
        pieces = Generation(session, [stream]).pieces([ids[self.reused :]], max_tokens, StreamInterval(session))
        try:
            for (piece,) in pieces:
                if piece:
                    yield piece
        finally:
            self.messages.append({"role": "assistant", "content": stream.text})

    def _ready(self, ids: Sequence[int], max_tokens: int) -> Session:
        """A session with room, taken back to where these tokens differ from those it has."""
        length = len(ids) + max_tokens
        if self._session is None or length > self._session.room:
            self._key, key = jax.random.split(self._key)
            # Room for more turns: in a larger session, all of them are read anew.
            self._session = Session(self.model, batch=1, length=2 * length, key=key, **self._options)
        self.reused = self._session.rewind(ids)
        return self._session

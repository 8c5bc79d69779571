"""Conversations: the template a chat model was trained with, and turns that reuse the caches of those before."""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from ...layers.random import random_key
from ...layers.spec import missing_package
from ..decoder import DecoderModel
from ..text_encoding import encode
from .generate import Generation, StreamInterval, check_length
from .sampling import Sampling
from .session import Session, Speed
from .speculative import Speculation
from .stream import TextStream, split_stop

Message = Mapping[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": text}`, and whatever else a template reads."""

MOST_TEXT = 10_000_000
"""Characters that a template may make of anything at once."""


class ChatTemplate:
    """A Jinja template that makes one text of messages, as in a Hugging Face `tokenizer_config.json`.

    It comes with the weights and is not trusted: it runs in Jinja's immutable sandbox, without files or network.

    Args:
        template: the Jinja source.
        special_tokens: their texts by the names templates use, e.g. `{"bos_token": "<s>", "eos_token": "</s>"}`.

    Raises ValueError where the template is not valid Jinja, or Jinja (the `chat` extra) is not installed.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str] | None = None):
        jinja2 = _jinja()
        self.source, self.special_tokens = template, dict(special_tokens or {})
        try:
            self._template = _sandbox().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid, in line {error.lineno}: {error.message}") from error
        except (RecursionError, SyntaxError) as error:  # of Python, which Jinja compiles to
            raise ValueError(f"the chat template is nested too deeply: {error}") from error

    def render(self, messages: Sequence[Message], *, prompt: bool = True, **variables: Any) -> str:
        """The text of messages; with `prompt`, up to where the answer begins. Variables are passed to the template.

        Raises ValueError where the template refuses the messages or goes wrong.
        """
        jinja2 = _jinja()
        if not messages:
            raise ValueError("a conversation needs at least one message, got none")
        for message in messages:
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError(f"a message has a role and content, got {message}")
        names = self.special_tokens | {"messages": list(messages), "add_generation_prompt": prompt} | variables
        try:
            return self._template.render(names)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
            MemoryError,
        ) as error:
            raise ValueError(f"the chat template can't do this: {error}") from error


def _jinja() -> Any:
    """Jinja, which only chats need."""
    try:
        import jinja2.ext  # pyright: ignore[reportMissingImports]
        import jinja2.sandbox  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise missing_package("chat templates take", "jinja2") from error
    return jinja2


def _sandbox() -> Any:
    """What templates on the hub expect of Jinja, as transformers' own, and no more."""
    jinja2 = _jinja()
    TemplateError = jinja2.TemplateError

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Products and powers, unless a short template would fill the memory with them."""
            sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
            if (operator == "**" and max(sizes) > 1000) or (operator == "*" and sizes[0] * sizes[1] > MOST_TEXT):
                raise TemplateError(f"{operator} of {sizes[0]} and {sizes[1]} is too large")
            return super().call_binop(context, operator, left, right)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks, for training, what the model says (SmolLM3)."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def fail(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = fail
    sandbox.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return sandbox


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
        dtype: Any = jnp.float32,
        cache_dtype: Any = None,
        speculation: Speculation | None = None,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.stop, self.ends = split_stop(tokenizer, stop)
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

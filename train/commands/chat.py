"""`zoo chat`: a conversation in the terminal."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ... import zoo
from ...zoo.generation.chat import Conversation
from ...zoo.text_encoding import unescaped
from ..runs.status import compiling_shown
from .flags import parse_flags
from .inference import SOURCE, ModelFlags, SamplingFlags, note

HELP = """/help shows this, /reset starts a new conversation, /exit or Ctrl-D ends the program.
Ctrl-C stops a reply or clears the line; twice in a row it ends the program.
A message that begins with "/" is sent as "//...": "//etc" sends "/etc"."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Chat with a model. Replies stream, and the KV cache is reused across turns.

    Example: `zoo chat SmolLM2-135M-Instruct.gguf --temperature 0.2`
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=SOURCE)]
    system: str = ""
    """The system message."""
    max_tokens: int = 1000
    """The largest number of tokens of a reply."""
    template: Path | None = None
    """A file with the Jinja chat template; by default the model's own."""
    speculate: int = 0
    """Speculative decoding with N tokens at a time, predicted from the text so far. Changes only the speed."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = SamplingFlags()
    weights: tyro.conf.OmitArgPrefixes[ModelFlags] = ModelFlags()


def parse(arguments: Sequence[str]) -> Chat:
    """The spec that the arguments describe."""
    return parse_flags(Chat, arguments, "zoo chat")


def run(spec: Chat) -> None:
    """Reads messages from standard input and writes replies to standard output."""
    text_model = spec.weights.open(spec.model).optimize_for_decoding()
    if spec.template is not None:
        text_model = text_model.with_template(spec.template.read_text(encoding="utf-8"))
    if text_model.template is None:
        raise ValueError(f"{spec.model} has no chat template; give one by --template FILE, or use `zoo generate`")
    conversation = Conversation(
        text_model.model,
        text_model.tokenizer,
        text_model.template,
        stop=text_model.end_ids,
        system=unescaped(spec.system) or None,
        sampling=spec.sampling.over(text_model.sampling),
        seed=spec.sampling.seed,
        dtype=text_model.dtype,
        cache_dtype=spec.weights.cache_dtype or None,
        speculation=zoo.Speculation(tokens=spec.speculate) if spec.speculate else None,
    )
    note(f"sampling: {spec.sampling.describe(text_model.sampling, text_model.recommended)}")
    converse(conversation, spec.max_tokens)


def converse(conversation: Conversation, max_tokens: int) -> None:
    """Reads messages from standard input until it ends or /exit, and writes each reply as it is generated."""
    print(HELP, file=sys.stderr)
    interrupted = False
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt) as end:
            print(file=sys.stderr)
            if interrupted or isinstance(end, EOFError):
                return
            interrupted = True
            continue
        interrupted = False
        if text == "/exit":
            return
        if text == "/help":
            print(HELP, file=sys.stderr)
        elif text == "/reset":
            conversation.reset()
            print("(new conversation)", file=sys.stderr)
        elif text.startswith("/") and not text.startswith("//"):
            print(f"error: {text.split()[0]} is not a command, and nothing was sent.\n{HELP}", file=sys.stderr)
        elif text:
            answer(conversation, text.removeprefix("/"), max_tokens)


def answer(conversation: Conversation, text: str, max_tokens: int) -> None:
    """Writes one reply. Ctrl-C stops it between two pieces."""
    try:
        with _interruptible() as interrupts, compiling_shown() as stop_showing:
            for piece in conversation.say(text, max_tokens=max_tokens):
                stop_showing()
                print(piece, end="", flush=True)
                if interrupts:
                    break
        print(" ..." if interrupts else "")
        print(f"({conversation.speed})", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that receives the signals of Ctrl-C: an exception at any point would leave caches partly written."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)

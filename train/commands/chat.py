"""`zoo chat`: a conversation in the terminal."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from ...zoo.generation.chat import Conversation

HELP = """/help shows this, /reset starts a new conversation, /exit or Ctrl-D ends the program.
Ctrl-C stops a reply or clears the line; twice in a row it ends the program.
A message that begins with "/" is sent as "//...": "//etc" sends "/etc"."""


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
        with _interruptible() as interrupts, waiting() as stop_waiting:
            for piece in conversation.say(text, max_tokens=max_tokens):
                stop_waiting()
                print(piece, end="", flush=True)
                if interrupts:
                    break
        print(" ..." if interrupts else "")
        print(f"({conversation.speed})", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)


@contextmanager
def waiting() -> Iterator[Callable[[], None]]:
    """Shows that the model compiles and reads, on standard error if that is a terminal. Yields what ends it earlier."""
    console = Console(stderr=True)
    status = console.status("compiling and reading the prompt ...")
    if console.is_terminal:
        status.start()
    try:
        yield status.stop
    finally:
        status.stop()


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that receives the signals of Ctrl-C: an exception at any point would leave caches partly written."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)

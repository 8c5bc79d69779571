"""`zoo chat`: a conversation in the terminal."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
    """Writes one answer; Ctrl-C stops it, between two pieces."""
    try:
        with _interruptible() as stopped:
            for piece in conversation.say(text, max_tokens=max_tokens):
                print(piece, end="", flush=True)
                if stopped:
                    break
        print(" ..." if stopped else "")
        print(f"({conversation.speed})", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that Ctrl-C puts something in: an exception anywhere would leave caches half written."""
    stopped: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)

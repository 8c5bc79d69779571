"""`zoo chat`: a conversation in the terminal."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ...zoo.generation.chat import Conversation

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


def converse(conversation: Conversation, max_tokens: int) -> None:
    """Reads messages from standard input until it ends or /exit, and writes the answers as they come."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            print("(forgotten)", file=sys.stderr)
        elif text.startswith("/"):
            print(f"{text.split()[0]} is no command. {HELP}", file=sys.stderr)
        elif text:
            answer(conversation, text, max_tokens)


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

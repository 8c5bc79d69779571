"""Text as it comes: tokens become pieces of text that are never taken back."""

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to that are not, or not yet, a character."""

BEFORE = 8
"""How many tokens of the text before are decoded with each piece: whole characters, whatever the bytes of a token."""


class TextStream:
    """The text of one row's tokens, piece by piece.

    A piece ends where no later token can change what is before: not within a character of several bytes, and not within
    what may become a stop string. Text ends before the first stop string, and before the first of the tokens `ends`.
    `before` are tokens of a text that this one continues: a decoder may drop a space at the beginning of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), ends: Sequence[int] = (), before: Sequence[int] = ()
    ):
        self.tokenizer, self.stop, self.ends = tokenizer, tuple(stop), frozenset(ends)
        self._before = list(before[-BEFORE:])
        self._skipped = len(tokenizer.decode(self._before, skip_special_tokens=False).rstrip(UNFINISHED))
        self.ids: list[int] = []
        """All tokens that came, with the one that ended the text."""
        self.text = ""
        """All that was given out."""
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain after more tokens, as far as it was not given out yet."""
        if self.stopped or not ids:
            return ""
        count = next((place for place, token in enumerate(ids, 1) if token in self.ends), len(ids))
        before = len(self.ids)
        self.ids.extend(ids[:count])
        text = self._decoded()
        if not any(string in text for string in self.stop):
            self.stopped = self.ids[-1] in self.ends
            return self._give(text if self.stopped else _held_back(text.rstrip(UNFINISHED), self.stop))
        # Which token completes the first stop string: it must not matter how many came at once.
        self.stopped, whole, places = True, self.ids, [0]
        for size in range(before + 1, len(whole) + 1):
            self.ids = whole[:size]
            text = self._decoded()
            places = [place for place in map(text.find, self.stop) if place >= 0]
            if places:
                break
        return self._give(text[: min(places)])

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.stopped else self._give(self._decoded())

    def _decoded(self) -> str:
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self.ends else self.ids
        return self.tokenizer.decode([*self._before, *ids], skip_special_tokens=False)[self._skipped :]

    def _give(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece


def _held_back(text: str, stop: Sequence[str]) -> str:
    """`text` without an end that is the start of a stop string."""
    longest = 0
    for string in stop:
        for size in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:size]):
                longest = size
                break
    return text[: len(text) - longest]

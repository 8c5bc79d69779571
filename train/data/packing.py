"""Packing: a stream of tokens as rows of fixed length, in which each token is an input once and a target once."""

import numpy as np

from .tokenizer import Ends

Row = dict[str, np.ndarray]
"""tokens, targets, segments, positions: int32 [T]; weights: float32 [T]. With a leading B: a batch."""


class Rows:
    """Rows of T tokens of a stream, at random access.

    Row r has the inputs `stream[rT : rT+T]` and the targets `stream[rT+1 : rT+T+1]`: over all rows every token but the
    last is an input once, and every token but the first a target once. Documents in a row differ in `segments`
    (1, 2, ... from begin to begin; 0 is padding) and `positions` (0, 1, ... from each begin and from the row's).
    `weights` are 1 where there is something to predict, and 0 on the padding of the last row.

    If documents begin with a BOS token other than the separator, each row begins with it too, because models trained
    with BOS need it: rows then move by T - 1 tokens. Two targets have weight 0 then: that of a row's first position,
    which the row before has, and that of a separator, which is always BOS.
    """

    def __init__(self, stream: np.ndarray, length: int, ends: Ends):
        """Rows of `length` tokens of a stream (integers [n])."""
        self.stream = stream
        self.length = length
        self.ends = ends
        self.led = ends.begin != ends.end
        self.step = length - self.led
        if not self.step:
            raise ValueError(f"a row needs 2 tokens where the first is the same in each, got length={length}")

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.step)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        window = np.asarray(self.stream[index * self.step : (index + 1) * self.step + 1], np.int32)
        if self.led:
            window = np.insert(window, 0, self.ends.begin)
        begins = window[:-1] == self.ends.begin
        begins[0] = True
        over = (window[:-1] == self.ends.end) & self.led
        over[0] = self.led
        time = np.arange(len(begins), dtype=np.int32)
        row = {
            "tokens": window[:-1],
            "targets": window[1:],
            "segments": np.cumsum(begins, dtype=np.int32),
            "positions": time - np.maximum.accumulate(np.where(begins, time, 0)),
            "weights": np.where(over, np.float32(0), np.float32(1)),
        }
        missing = self.length - len(begins)
        return {name: np.pad(array, (0, missing)) for name, array in row.items()} if missing else row


def empty_row(length: int) -> Row:
    """A row of padding: zeros."""
    names = ("tokens", "targets", "segments", "positions")
    return {name: np.zeros(length, np.int32) for name in names} | {"weights": np.zeros(length, np.float32)}

import numpy as np
import pytest
from flaxzoo.train.data.packing import Rows, empty_row
from flaxzoo.train.data.tokenizer import Ends
from hypothesis import given
from hypothesis import strategies as st


def slow_row(stream: list[int], length: int, ends: Ends, index: int) -> dict[str, list]:
    """The definition, token by token."""
    row: dict[str, list] = {"tokens": [], "targets": [], "segments": [], "positions": [], "weights": []}
    segment, position, led = 0, 0, ends.begin != ends.end
    step = length - led
    for place in range(index * step - led, (index + 1) * step):
        real, first = place + 1 < len(stream), place == index * step - led
        token = ends.begin if first and led else stream[place] if real else 0
        if real and (token == ends.begin or first):
            segment, position = segment + 1, 0
        row["tokens"].append(token)
        row["targets"].append(stream[place + 1] if real else 0)
        row["segments"].append(segment if real else 0)
        row["positions"].append(position if real else 0)
        over = led and (first or token == ends.end)
        row["weights"].append(float(real and not over))
        position += 1
    return row


ENDS = [Ends(0, 0), Ends(3, 3), Ends(0, 3)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(2, 20), st.sampled_from(ENDS))
def test_rows_are_as_defined_and_drop_and_double_nothing(stream: list[int], length: int, ends: Ends):
    rows = Rows(np.array(stream, np.uint16), length, ends)
    every = [rows[index] for index in range(len(rows))]
    for index, row in enumerate(every):
        for name, slow in slow_row(stream, length, ends, index).items():
            assert row[name].tolist() == slow, name
            assert row[name].dtype == (np.float32 if name == "weights" else np.int32)
    for name, expected in (("tokens", stream[:-1]), ("targets", stream[1:])):
        led = int(ends.begin != ends.end)
        assert [t for row in every for t in row[name][row["segments"] > 0].tolist()[led:]] == expected
    assert all(row["segments"].any() for row in every)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_row_of_one_token():
    assert Rows(np.arange(3, dtype=np.uint16), 1, Ends(0, 0))[1]["targets"].tolist() == [2]
    with pytest.raises(ValueError, match="a row needs 2 tokens where the first is the same in each, got length=1"):
        Rows(np.arange(3, dtype=np.uint16), 1, Ends(0, 1))


def test_an_empty_row_weighs_nothing():
    row = Rows(np.arange(9, dtype=np.uint32), 4, Ends(0, 0))[0]
    empty = empty_row(4)
    assert {name: (a.shape, a.dtype) for name, a in row.items()} == {n: (a.shape, a.dtype) for n, a in empty.items()}
    assert not any(array.any() for array in empty.values())

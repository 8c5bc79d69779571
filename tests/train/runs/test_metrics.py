"""Metrics on disk: whole lines, each step once, readable by TensorBoard."""

import struct
from pathlib import Path

import numpy as np
import pytest
from flaxzoo.train.runs import metrics, report
from flaxzoo.train.runs.metrics import Recorder
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2


def masked(data: bytes) -> int:
    checksum = crc32c(data)
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder: Path) -> list[list]:
    """The events of each file, in the format of TFRecord: length, its checksum, data, its checksum."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, place, inside = path.read_bytes(), 0, []
        while place < len(data):
            (size,) = struct.unpack("<Q", data[place : place + 8])
            assert struct.unpack("<I", data[place + 8 : place + 12])[0] == masked(data[place : place + 8])
            record = data[place + 12 : place + 12 + size]
            assert struct.unpack("<I", data[place + 12 + size : place + 16 + size])[0] == masked(record)
            inside.append(event_pb2.Event.FromString(record))  # pyright: ignore
            place += size + 16
        assert inside[0].file_version == "brain.Event:2"
        found.append(inside)
    return found


def test_tensorboard_can_read_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder.write(1, loss=2.5, nll=2.25)
    recorder.write_text(1, "Thou é")
    recorder.close()
    again = Recorder(tmp_path, 1)
    again.write(2, loss=1.5)
    again.close()
    first, second = events(tmp_path)
    scalars = [(e.step, v.tag, v.simple_value) for e in first for v in e.summary.value if not v.HasField("tensor")]
    assert scalars == [(1, "loss", 2.5), (1, "nll", 2.25)]
    (text,) = [v for e in first for v in e.summary.value if v.HasField("tensor")]
    assert text.tensor.string_val[0].decode() == "Thou é"
    # TensorBoard drops what an earlier file holds from this step on.
    assert (second[1].step, second[1].session_log.status) == (2, event_pb2.SessionLog.START)  # pyright: ignore
    assert [(e.step, v.simple_value) for e in second for v in e.summary.value] == [(2, 1.5)]


def test_what_a_killed_run_recorded_past_its_checkpoint_goes(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    for step in range(1, 6):
        recorder.write(step, loss=1 / step)
    recorder.write_text(4, "a\nb\u2028c")
    recorder.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])  # killed within a line
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]
    path.write_text(path.read_text() + "\n")
    recorder = Recorder(tmp_path, 4)
    recorder.write(5, loss=7.0)
    recorder.close()
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]
    assert metrics.read(tmp_path)[-1] == {"step": 5, "loss": 7.0}


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    for step in range(1, 4):
        recorder.write(step, loss=1.0)
        assert [record["step"] for record in metrics.read(tmp_path)] == list(range(1, step + 1))
    recorder.flush()
    assert len(events(tmp_path)[0]) == 2 + 3  # what it is, where it begins, and three steps
    recorder.close()


@pytest.mark.parametrize("count", [1, 5, 40, 100])
def test_smoothing_is_a_centred_mean(count: int) -> None:
    line = tuple(float(x) for x in range(count))
    smooth = report._smooth(line)
    half = (max(1, count // 20) | 1) // 2
    expected = [np.mean(line[max(0, i - half) : i + half + 1]) for i in range(count)]
    np.testing.assert_allclose(smooth, expected)

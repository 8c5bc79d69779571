"""Metrics of a run on disk: one JSON line a record, and the same to TensorBoard."""

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.record_writer import RecordWriter

FILE = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """All complete records of a run's folder, null as NaN.

    A line that is not a record is left out: one that a kill cut short, or one that is damaged or not UTF-8.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line.decode())
            records.append({"step": int(record["step"])} | {name: _number(value) for name, value in record.items()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return records


def _number(value: Any) -> Any:
    return math.nan if value is None else value


class Recorder:
    """Writes records `{"step": n, name: number, ...}` as they come; raises OSError where they can't be written.

    JSON has no numbers that are not finite: they become null.
    """

    def __init__(self, folder: Path, start: int):
        """Opens the metrics of a run that continues after step `start`; records of later steps are dropped."""
        kept = [record for record in read(folder) if record["step"] <= start]
        aside = folder / f"{FILE}.new"
        aside.write_text("".join(map(_line, kept)), encoding="utf-8")
        aside.replace(folder / FILE)
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        self._lines = (folder / FILE).open("ab", buffering=0)
        # Not tensorboardX.SummaryWriter: it writes from a thread, and once the disk is full it blocks forever.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{start}"
        self._board = RecordWriter(str(board / name))
        self._event(0, file_version="brain.Event:2")
        self._event(start + 1, session_log=SessionLog(status=SessionLog.START))  # later steps of a killed run go

    def write(self, step: int, **values: float) -> None:
        """Records the values of a step."""
        self._append({"step": step} | values)
        for name, value in values.items():
            self._event(step, summary=summary.scalar(name, value))

    def write_text(self, step: int, text: str) -> None:
        """Records a sample of what the model writes."""
        self._append({"step": step, "sample": text})
        self._event(step, summary=summary.text("sample", text))

    def flush(self) -> None:
        """Forces what was written to disk."""
        os.fsync(self._lines.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self._lines.close()
        self._board.close()

    def _append(self, record: dict[str, Any]) -> None:
        data = memoryview(_line(record).encode())
        while data:  # a disk that fills up writes a part, and fails at the next write
            data = data[self._lines.write(data) :]

    def _event(self, step: int, **content: Any) -> None:
        self._board.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


class NullRecorder:
    """The recorder of a process that writes no metrics."""

    def write(self, step: int, **values: float) -> None:
        """Nothing."""

    def write_text(self, step: int, text: str) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _line(record: dict[str, Any]) -> str:
    finite = {name: value if isinstance(value, str) or math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"

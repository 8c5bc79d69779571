"""Metrics of a run on disk: one JSON line a record, and the same to TensorBoard."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """All whole records of a run's folder; a line cut short by a kill is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Recorder:
    """Writes records `{"step": n, name: number, ...}` as they come."""

    def __init__(self, folder: Path, start: int):
        """Opens the metrics of a run that goes on after step `start`; what a killed run recorded past it is dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read(folder) if record["step"] <= start]
        aside = folder / f"{FILE}.new"
        aside.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        aside.replace(folder / FILE)
        self._lines = (folder / FILE).open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, **values: float) -> None:
        """Records the values of a step."""
        self._lines.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def write_text(self, step: int, text: str) -> None:
        """Records a sample of what the model writes."""
        self._lines.write(json.dumps({"step": step, "sample": text}) + "\n")
        self._board.add_text("sample", text, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._lines.close()
        self._board.close()

"""Signals that end a run between two steps."""

import signal
import threading
from pathlib import Path
from typing import Any

from ..checkpoints.step_folders import command


class Interrupted(Exception):
    """A signal ended the run, after its state was saved."""

    def __init__(self, signal_name: str, step: int, folder: Path):
        self.signal_name = signal_name
        self.exit_code = 128 + signal.Signals[signal_name]
        super().__init__(f"{signal_name}: stopped and saved at step {step}; {command(folder)} goes on from there")


class Signals:
    """Catches SIGTERM and SIGINT, to be asked for between steps; a second Ctrl-C interrupts at once.

    `caught` is the number of the signal, or 0.

    Outside the main thread, where Python can catch none, it catches none.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        catchable = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT) if catchable else ():
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number

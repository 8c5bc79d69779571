"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

import io
import time

from rich.console import Console
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0
"""Seconds between plain lines."""


def replace_unencodable(stream: object) -> None:
    """Makes a text stream write characters outside its encoding as escapes, so that showing text never ends a run."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")


def duration(seconds: float) -> str:
    """`75` as '1:15', an hour and more as '1:01:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(number: float, unit: str = "") -> str:
    """A number in three digits with its prefix: 12.3k, 4.56M, 7.89G."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or prefix == "T":
            digits = f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"
            return f"{digits}{' ' if unit else ''}{prefix}{unit}"
        number /= 1000
    raise AssertionError


def memory_size(size: float) -> str:
    """Bytes in memory in three digits, in units of 1024: 12.3 KiB, 4.56 MiB, 7.89 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if abs(size) < 999.5 else f"{size:.0f} TiB"


def print_whole(console: Console, rows: Table) -> None:
    """Prints all of a table, also where it is wider than the console says it is."""
    wide = Measurement.get(console, console.options.update(max_width=1000), rows).maximum
    Console(file=console.file, width=max(console.width, wide)).print(rows)


class ProgressDisplay:
    """Shows the progress of a run; a context manager."""

    def __init__(self, steps: int, start: int, console: Console | None = None):
        self.console = console or Console()
        self._steps = steps
        self._bar = Progress(
            BarColumn(bar_width=None), TextColumn("{task.description}"), console=self.console, expand=True
        )
        self._task: TaskID = self._bar.add_task("compiling ...", total=steps, completed=start)
        self._live = Live(self._bar, console=self.console, refresh_per_second=4, transient=True)
        self._printed = 0.0

    def __enter__(self) -> "ProgressDisplay":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def update(self, step: int, facts: dict[str, str]) -> None:
        """Shows where the run is: `facts` by name, in order."""
        text = f"step {step}/{self._steps}  " + "  ".join(f"{name} {value}" for name, value in facts.items())
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, description=text)
        elif step == self._steps or time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text), soft_wrap=True)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A sample of what the model writes."""
        shown = Text(prompt.lstrip("\n"), style="bold") + Text(text, style="not bold")
        if self.console.is_terminal:
            self.console.print(Panel(shown, title=f"sample at step {step}", title_align="left"))
        else:
            self.say(f"--- sample at step {step}\n{shown.plain}\n---")

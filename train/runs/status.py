"""What a command shows in a terminal while it waits: bytes read, compilation."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..distributed import processes


@contextlib.contextmanager
def bytes_shown(what: str = "") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal. Yields a function of the bytes read and the total."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True, quiet=processes.quiet())
    disable = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def compiling_shown() -> Iterator[Callable[[], None]]:
    """Shows that the model compiles and reads, on standard error if that is a terminal. Yields what ends it earlier."""
    console = Console(stderr=True)
    status = console.status("compiling and reading the prompt ...")
    if console.is_terminal:
        status.start()
    try:
        yield status.stop
    finally:
        status.stop()

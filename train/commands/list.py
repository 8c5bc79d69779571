"""`zoo list`: the named models and runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ...configs import catalog
from ..runs.progress import amount
from .flags import parse_flags


@dataclass(frozen=True, kw_only=True)
class List:
    """The named models and runs, with their sizes."""


def parse(arguments: Sequence[str]) -> List:
    """The spec that the arguments describe."""
    return parse_flags(List, arguments, "zoo list")


def run(spec: List) -> None:
    """Prints the table."""
    console, names = Console(), catalog.read()
    table = Table("name", "parameters", "what it is", box=None, header_style="bold", pad_edge=False)
    for title, entries in (("models", names.models), ("runs", names.runs)):
        table.add_row(f"[bold]{title}[/bold]")
        for entry in entries:
            table.add_row(f"  {entry.name}", amount(entry.parameters), entry.summary)
    console.print(table)
    console.print("\n`zoo show NAME` describes a model, `zoo train NAME` trains it.", highlight=False)

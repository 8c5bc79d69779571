"""`zoo diff`: the settings in which two models or runs differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from ...configs.run import Run
from .flags import parse_flags
from .source import HELP, SourceFlags


@dataclass(frozen=True, kw_only=True)
class Diff:
    """The settings in which two models or runs differ. A model is compared with the model of a run."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=HELP)]
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Another one.")]
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = SourceFlags()


def parse(arguments: Sequence[str]) -> Diff:
    """The spec that the arguments describe."""
    return parse_flags(Diff, arguments, "zoo diff")


def run(spec: Diff) -> None:
    """Prints the settings that differ."""
    first, second = spec.source.read(spec.a, spec.b)
    if isinstance(first, Run) != isinstance(second, Run):
        first, second = (x.model if isinstance(x, Run) else x for x in (first, second))
    left, right = first.flat(), second.flat()
    rows = Table("setting", spec.a, spec.b, box=None, header_style="bold", pad_edge=False)
    for name in dict.fromkeys((*left, *right)):
        if left.get(name, "-") != right.get(name, "-"):
            rows.add_row(name, str(left.get(name, "-")), str(right.get(name, "-")))
    Console().print(rows if rows.row_count else f"{spec.a} and {spec.b} are the same", highlight=False)

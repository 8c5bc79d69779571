"""`zoo convert`: a checkpoint in another format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ... import zoo
from ..runs.status import bytes_shown
from .flags import parse_flags
from .source import SourceFlags, located


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint as a Hugging Face folder, which transformers loads, or as a .gguf file.

    Example: `zoo convert runs/shakespeare exported --dtype bfloat16`
    """

    model: tyro.conf.Positional[str]
    """A Hugging Face folder, a .gguf file, the folder of a run, a name on the hub (org/name), or a named model."""
    destination: tyro.conf.Positional[Path]
    """A folder that does not exist yet, or a name that ends in .gguf."""
    dtype: Annotated[str, tyro.conf.arg(metavar="DTYPE")] = ""
    """float32, bfloat16 or float16 for a folder; F16 or Q8_0 for a .gguf file. Default: as stored, and F16."""
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = SourceFlags()


def parse(arguments: Sequence[str]) -> Convert:
    """The spec that the arguments describe."""
    return parse_flags(Convert, arguments, "zoo convert")


def run(spec: Convert) -> None:
    """Writes the checkpoint."""
    reading = {"ignore": spec.source.ignore, "text_only": spec.source.text_only}
    with bytes_shown() as progress:
        zoo.convert(located(spec.model), spec.destination, dtype=spec.dtype, progress=progress, **reading)
    print(f"wrote {spec.destination}")

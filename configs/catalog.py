"""Names, sizes and descriptions of the named models and runs, as `zoo list` prints them.

Building 60 models to count their parameters takes seconds, so the counts are stored in catalog.json, which a test
compares with the models. `make catalog` writes it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = Path(__file__).with_name("catalog.json")


@dataclass(frozen=True)
class Entry:
    """A named model or run."""

    name: str
    parameters: int
    summary: str
    """The first line of its docstring."""


@dataclass(frozen=True)
class Catalog:
    """The named models and runs, in alphabetical order."""

    models: list[Entry]
    runs: list[Entry]


def read() -> Catalog:
    """The stored catalog."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    return Catalog(*([Entry(**entry) for entry in data[kind]] for kind in ("models", "runs")))


def compute() -> Catalog:
    """The catalog of the models and runs as they are now."""
    from ..zoo.decoder import Decoder
    from ..zoo.parameters import describe
    from .named import MODELS, RUNS

    def entry(name: str, model: Decoder, doc: str | None) -> Entry:
        size = sum(parameter.size for parameter in describe(model.abstract()).values())
        return Entry(name, size, (doc or "").splitlines()[0])

    models = [entry(name, function(), function.__doc__) for name, function in MODELS.items()]
    return Catalog(models, [entry(name, function().model, function.__doc__) for name, function in RUNS.items()])


if __name__ == "__main__":
    FILE.write_text(json.dumps(asdict(compute()), indent=1) + "\n", encoding="utf-8")

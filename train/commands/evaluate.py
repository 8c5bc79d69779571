"""`zoo eval`: perplexity and bits per byte of text, and tasks of lm-evaluation-harness."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ...zoo.evaluation.harness import HarnessBackend, harness_lm
from ...zoo.evaluation.score import Score, Scorer
from ...zoo.text_model import TextModel
from ..data.cache import cache_folder
from ..data.sources import open_source


def prefix_of(writer: TextModel) -> int:
    """Token on which the first token of a text is conditioned. Raises ValueError if the tokenizer has none."""
    if writer.prefix is None:
        raise ValueError(
            "scoring needs a token before the text: the tokenizer has neither BOS nor EOS (tokenizer_config.json)"
        )
    return writer.prefix


def score_files(
    writer: TextModel, names: Sequence[str], *, length: int, stride: int, batch: int, field: str, console: Console
) -> dict[str, Score]:
    """The score of each source of text, by name.

    Raises ValueError if a source does not exist or its text cannot be read.
    """
    sources = [open_source(name, field, cache_folder(None)) for name in names]
    limit = writer.model.spec.max_positions
    scorer = Scorer(writer.model, length=min(length, limit or length), batch=batch, dtype=writer.dtype)
    found: dict[str, Score] = {}
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        for source in sources:
            task = bar.add_task(Path(source.name).name, total=max(1, source.size))
            split = "validation" if source.has_validation else "train"
            found[source.name] = scorer.text(
                writer.tokenizer,
                source.documents(split),
                start=prefix_of(writer),
                stride=stride or None,
                special_tokens=writer.special_tokens,
                progress=lambda size, task=task: bar.advance(task, size),
            )
    return found


def show(found: dict[str, Score], console: Console) -> None:
    """Prints a table."""
    table = Table("text", "documents", "bytes", "tokens", "perplexity", "bits per byte", box=None, pad_edge=False)
    rows = [*found.items()]
    if len(rows) > 1:
        rows.append(("all", sum(found.values(), Score())))
    for name, score in rows:
        numbers = f"{score.documents:,}", f"{score.bytes:,}", f"{score.tokens:,}"
        table.add_row(name, *numbers, f"{score.perplexity:.4f}", f"{score.bits_per_byte:.4f}")
    console.print(table)
    for name, score in rows:
        if score.changed:
            console.print(
                f"{name}: encoding and decoding changes {score.changed} of {score.documents} documents. Bits per "
            )
            console.print(
                "byte do not include what the tokenizer drops, so do not compare them with another tokenizer's."
            )


def as_json(found: dict[str, Score]) -> str:
    """All scores as JSON."""
    return json.dumps(
        {"texts": {name: score.to_dict() for name, score in found.items()}}
        | {"all": sum(found.values(), Score()).to_dict()},
        indent=2,
    )


def run_tasks(
    writer: TextModel, tasks: Sequence[str], folder: Path | None, *, length: int, batch: int, limit: int
) -> Any:
    """Results of lm-evaluation-harness, by task. `folder` holds YAML files of additional tasks."""
    limit_of_model = writer.model.spec.max_positions
    backend = HarnessBackend(
        writer.model,
        writer.tokenizer,
        stop=writer.stop,
        prefix=prefix_of(writer),
        template=writer.template,
        length=min(length, limit_of_model or length),
        batch=batch,
        dtype=writer.dtype,
    )
    model = harness_lm(backend)
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=None if folder is None else str(folder))
    found = lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, limit=limit or None)
    return found["results"]

"""`zoo eval`: perplexity and bits per byte of text, and tasks of lm-evaluation-harness."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ...zoo.evaluation.harness import HarnessBackend, harness_lm
from ...zoo.evaluation.score import Score, Scorer
from ...zoo.text_model import TextModel
from ..data.cache import cache_folder
from ..data.sources import open_source
from ..distributed import processes
from .flags import parse_flags
from .inference import SOURCE, ModelFlags


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Perplexity and bits per byte of text, and tasks of lm-evaluation-harness.

    Example: `zoo eval runs/shakespeare --text my_book.txt 'notes/*.jsonl'`
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=SOURCE)]
    text: tuple[str, ...] = ()
    """Files, folders or globs of .txt, .jsonl or .parquet, or a dataset as in training."""
    tasks: tuple[str, ...] = ()
    """Names of lm-evaluation-harness tasks (needs the `eval` extra)."""
    task_folder: Path | None = None
    """A folder with YAML files of further tasks."""
    length: int = 1024
    """The largest number of tokens that the model reads at once."""
    stride: int = 0
    """Tokens between the starts of windows, at most the length. 0: half of the length."""
    batch: int = 4
    """Number of windows in a batch."""
    text_field: str = "text"
    """The field of a record that holds the text."""
    limit: int = 0
    """The largest number of examples of a task. 0: all."""
    json: bool = False
    """Print JSON."""
    special_tokens: bool | None = None
    """Read text that spells a special token as that token; by default as the run was trained (data.special_tokens),
    and as plain text for other models."""
    weights: tyro.conf.OmitArgPrefixes[ModelFlags] = ModelFlags()


def parse(arguments: Sequence[str]) -> Evaluate:
    """The spec that the arguments describe."""
    return parse_flags(Evaluate, arguments, "zoo eval")


def run(spec: Evaluate) -> None:
    """Prints the scores."""
    if not spec.text and not spec.tasks:
        raise ValueError("there is nothing to evaluate: give --text FILES or --tasks NAMES")
    text_model = spec.weights.open(spec.model)
    if spec.special_tokens is not None:
        text_model = dataclasses.replace(text_model, special_tokens=spec.special_tokens)
    console = Console(soft_wrap=True, highlight=False)
    if spec.text:
        shown = Console(stderr=True, quiet=processes.quiet())
        sizes = {"length": spec.length, "stride": spec.stride, "batch": spec.batch}
        scores = score_files(text_model, spec.text, **sizes, field=spec.text_field, console=shown)
        print(as_json(scores)) if spec.json else show(scores, console)
    if spec.tasks:
        sizes = {"length": spec.length, "batch": spec.batch, "limit": spec.limit}
        console.print_json(data=run_tasks(text_model, spec.tasks, spec.task_folder, **sizes), default=str)


def prefix_of(text_model: TextModel) -> int:
    """Token on which the first token of a text is conditioned. Raises ValueError if the tokenizer has none."""
    if text_model.prefix is None:
        raise ValueError(
            "scoring needs a token before the text: the tokenizer has neither BOS nor EOS (tokenizer_config.json)"
        )
    return text_model.prefix


def score_files(
    text_model: TextModel, names: Sequence[str], *, length: int, stride: int, batch: int, field: str, console: Console
) -> dict[str, Score]:
    """The score of each source of text, by name.

    Raises ValueError if a source does not exist or its text cannot be read.
    """
    sources = [open_source(name, field, cache_folder(None)) for name in names]
    positions = text_model.model.spec.max_positions
    scorer = Scorer(text_model.model, length=min(length, positions or length), batch=batch, dtype=text_model.dtype)
    scores: dict[str, Score] = {}
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        for source in sources:
            task = bar.add_task(Path(source.name).name, total=max(1, source.size))
            split = "validation" if source.has_validation else "train"
            scores[source.name] = scorer.text(
                text_model.tokenizer,
                source.documents(split),
                start=prefix_of(text_model),
                stride=stride or None,
                special_tokens=text_model.special_tokens,
                progress=lambda size, task=task: bar.advance(task, size),
            )
    return scores


def show(scores: dict[str, Score], console: Console) -> None:
    """Prints a table."""
    table = Table("text", "documents", "bytes", "tokens", "perplexity", "bits per byte", box=None, pad_edge=False)
    rows = [*scores.items()]
    if len(rows) > 1:
        rows.append(("all", sum(scores.values(), Score())))
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


def as_json(scores: dict[str, Score]) -> str:
    """All scores as JSON."""
    return json.dumps(
        {"texts": {name: score.to_dict() for name, score in scores.items()}}
        | {"all": sum(scores.values(), Score()).to_dict()},
        indent=2,
    )


def run_tasks(
    text_model: TextModel, tasks: Sequence[str], folder: Path | None, *, length: int, batch: int, limit: int
) -> Mapping[str, object]:
    """Results of lm-evaluation-harness, by task. `folder` holds YAML files of additional tasks."""
    positions = text_model.model.spec.max_positions
    backend = HarnessBackend(
        text_model.model,
        text_model.tokenizer,
        stop=text_model.stop,
        prefix=prefix_of(text_model),
        template=text_model.template,
        length=min(length, positions or length),
        batch=batch,
        dtype=text_model.dtype,
    )
    model = harness_lm(backend)
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=None if folder is None else str(folder))
    results = lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, limit=limit or None)
    return results["results"]

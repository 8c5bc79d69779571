"""The commands that run a model: `zoo generate`, `zoo chat` and `zoo eval`."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from ... import zoo
from ...configs import RUNS
from ...configs.models.hub import REPOSITORIES
from ...layers.spec import unknown
from ...zoo.decoder import Decoder
from ...zoo.generation.chat import Conversation
from ...zoo.text_encoding import unescaped
from ...zoo.text_model import DTYPES, TextModel
from ..distributed import mesh as meshes
from ..distributed import processes
from ..runs import loop
from ..runs.folder import Folder, is_named
from . import evaluate
from .chat import converse, waiting


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How tokens are sampled. A flag that is left out takes its value from generation_config.json, if it is there."""

    temperature: float | None = None
    """0 selects the most likely token each time; higher values vary more. Default: 0.8."""
    top_k: int | None = None
    """Sample from the N most likely tokens; 0: from all. Default: 0."""
    top_p: float | None = None
    """Sample from the most likely tokens that together have this probability. Default: 1."""
    min_p: float | None = None
    """Sample from tokens at least this fraction as likely as the most likely one. Default: 0."""
    repetition_penalty: float | None = None
    """Makes tokens that have occurred less likely; 1: off. Default: 1."""
    seed: int = 0
    """Random seed of sampling."""

    def over(self, defaults: zoo.Sampling) -> zoo.Sampling:
        """The sampling settings: the flags that were given, and for the others the defaults."""
        flags = dataclasses.asdict(self)
        return defaults.replace(**{name: x for name, x in flags.items() if name != "seed" and x is not None})

    def describe(self, defaults: zoo.Sampling, recommended: Collection[str]) -> str:
        """The settings in a line; `recommended` are the fields of `defaults` that generation_config.json sets."""
        sampling, plain = self.over(defaults), zoo.Sampling()
        shown = [f"temperature {sampling.temperature:g}"] if sampling.temperature else ["greedy"]
        for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            if (value := getattr(sampling, name)) != getattr(plain, name):
                shown.append(f"{name} {value:g}")
        used = any(getattr(self, name) is None for name in recommended)
        return ", ".join(shown) + (" (from generation_config.json)" if used else "")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which weights are loaded, on which devices, and in which dtype."""

    step: int | None = None
    """The checkpoint of a run; the latest by default."""
    mesh: str = ""
    """Mesh axes and sizes to shard the model over, e.g. 'tensor=4'."""
    dtype: str = ""
    """float32, bfloat16 or float16; by default float32 for a run, for others the dtype they are stored in."""
    cache_dtype: str = ""
    """The dtype of the KV cache; int8 stores it quantized."""
    ignore: tuple[str, ...] = ()
    """Fields of the checkpoint's config (keys, for a .gguf file) that are unknown here and that change nothing."""
    text_only: bool = False
    """Load the text model of a multimodal checkpoint."""

    def open(self, source: str) -> TextModel:
        """The text model of a source."""
        if self.cache_dtype and self.cache_dtype not in ("int8", *DTYPES):
            raise unknown("cache_dtype", self.cache_dtype, ("int8", *DTYPES))
        loop.use_compilation_cache()
        source = _located(source)
        with bytes_shown("loading ") as progress:
            return zoo.open(
                source,
                step=self.step,
                mesh=self._mesh_of if self.mesh or jax.process_count() > 1 else None,
                dtype=self.dtype or None,
                progress=progress,
                ignore=self.ignore,
                text_only=self.text_only,
            )

    def _mesh_of(self, model: Decoder) -> Mesh:
        return meshes.for_parameters(model, self.mesh)


def _located(source: str) -> str:
    """The source, or the hub repository of a named model.

    Raises ValueError if neither a file, a run nor a model has this name, with what is close to it.
    """
    path = Path(source)
    if not path.exists() and source in REPOSITORIES:
        if not processes.quiet():
            print(f"{source} is {REPOSITORIES[source]} on the Hugging Face hub", file=sys.stderr)
        return REPOSITORIES[source]
    if not path.exists() and source in RUNS:
        raise ValueError(f"{source} is a run to train: `zoo train {source}` first, then use runs/{source}")
    if not path.exists() and path.name == source and path.suffix != ".gguf":
        raise unknown("model (no file or folder has this name, either)", source, [*REPOSITORIES, *_runs()])
    if is_named(path):
        Folder(path).run()  # the error for a mistyped run lists the runs beside it
    return source


def _runs() -> list[str]:
    """The runs of the folder in which `zoo train` creates them."""
    return [f"runs/{path.parent.name}" for path in Path("runs").glob("*/config.json")]


@contextlib.contextmanager
def bytes_shown(what: str = "") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal. Yields a function of the bytes done and the total."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True, quiet=processes.quiet())
    disable = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def generate(
    source: Annotated[str, tyro.conf.Positional],
    prompt: str = "\n",
    max_tokens: int = 300,
    samples: int = 1,
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = SamplingFlags(),
    model: tyro.conf.OmitArgPrefixes[ModelFlags] = ModelFlags(),
    speculate: int = 0,
    special_tokens: bool | None = None,
) -> None:
    """Continue a prompt.

    Example: `zoo generate runs/shakespeare --prompt "JULIET." --temperature 0.7`

    Args:
        source: the folder of a run, a Hugging Face folder, a .gguf file, a hub name, or a named model.
        prompt: the text to continue.
        max_tokens: the largest number of tokens to generate.
        samples: number of texts; a single one is streamed.
        sampling: how tokens are sampled.
        model: which weights are loaded, and where.
        speculate: speculative decoding with N tokens at a time, predicted from the text so far. Changes only the speed.
        special_tokens: read text of the prompt that spells a special token as that token; by default as the run was
            trained (data.special_tokens), and as plain text for other models.
    """
    prompt = unescaped(prompt)
    text_model = model.open(source).optimize_for_decoding()
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sampling": sampling.over(text_model.sampling),
        "stop": text_model.end_ids,
        "seed": sampling.seed,
        "dtype": text_model.dtype,
        "cache_dtype": model.cache_dtype or None,
        "speculation": zoo.Speculation(tokens=speculate) if speculate else None,
        "special_tokens": text_model.special_tokens if special_tokens is None else special_tokens,
    }
    _note(f"sampling: {sampling.describe(text_model.sampling, text_model.recommended)}")
    bold = Console(soft_wrap=True, highlight=False, markup=False)
    shown = prompt.lstrip("\n")
    if samples == 1:
        stream = zoo.stream(text_model.model, text_model.tokenizer, prompt, **options)
        with waiting() as stop_waiting:
            for index, piece in enumerate(itertools.chain(stream, [""])):
                if not index:
                    stop_waiting()
                    bold.print(shown, style="bold", end="")
                print(piece, end="", flush=True)
        print("\n")
        speed = stream.completion.speed
    else:
        with waiting():
            completions = zoo.complete(text_model.model, text_model.tokenizer, [prompt] * samples, **options)
        for completion in completions:
            bold.print(Text(shown, style="bold") + Text(f"{completion.text}\n", style="not bold"))
        speed = completions[0].speed
    _note(f"({speed})")


def _note(text: str) -> None:
    """Writes a line to standard error, if that is a terminal."""
    if sys.stderr.isatty() and not processes.quiet():
        print(text, file=sys.stderr)


def chat(
    source: Annotated[str, tyro.conf.Positional],
    system: str = "",
    max_tokens: int = 1000,
    template: Path | None = None,
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = SamplingFlags(),
    model: tyro.conf.OmitArgPrefixes[ModelFlags] = ModelFlags(),
    speculate: int = 0,
) -> None:
    """Chat with a model. Replies stream, and the KV cache is reused across turns.

    Example: `zoo chat SmolLM2-135M-Instruct.gguf --temperature 0.2`

    Args:
        source: a Hugging Face folder, a .gguf file, a hub name, or the folder of a run.
        system: the system message.
        max_tokens: the largest number of tokens of a reply.
        template: a file with the Jinja chat template; by default the model's own.
        sampling: how tokens are sampled.
        model: which weights are loaded, and where.
        speculate: speculative decoding with N tokens at a time, predicted from the text so far. Changes only the speed.
    """
    text_model = model.open(source).optimize_for_decoding()
    if template is not None:
        text_model = text_model.with_template(template.read_text(encoding="utf-8"))
    if text_model.template is None:
        raise ValueError(f"{source} has no chat template; give one by --template FILE, or use `zoo generate`")
    conversation = Conversation(
        text_model.model,
        text_model.tokenizer,
        text_model.template,
        stop=text_model.end_ids,
        system=unescaped(system) or None,
        sampling=sampling.over(text_model.sampling),
        seed=sampling.seed,
        dtype=text_model.dtype,
        cache_dtype=model.cache_dtype or None,
        speculation=zoo.Speculation(tokens=speculate) if speculate else None,
    )
    _note(f"sampling: {sampling.describe(text_model.sampling, text_model.recommended)}")
    converse(conversation, max_tokens)


def eval_(
    source: Annotated[str, tyro.conf.Positional],
    text: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    task_folder: Path | None = None,
    length: int = 1024,
    stride: int = 0,
    batch: int = 4,
    text_field: str = "text",
    limit: int = 0,
    json: bool = False,
    special_tokens: bool | None = None,
    model: tyro.conf.OmitArgPrefixes[ModelFlags] = ModelFlags(),
) -> None:
    """Perplexity and bits per byte of text, and tasks of lm-evaluation-harness.

    Example: `zoo eval runs/shakespeare --text my_book.txt 'notes/*.jsonl'`

    Args:
        source: the folder of a run, a Hugging Face folder, a .gguf file, a hub name, or a named model.
        text: files, folders or globs of .txt, .jsonl or .parquet, or a dataset as in training.
        tasks: names of lm-evaluation-harness tasks (needs the `eval` extra).
        task_folder: a folder with YAML files of further tasks.
        length: the largest number of tokens that the model reads at once.
        stride: tokens between the starts of windows, at most the length. 0: half of the length.
        batch: number of windows in a batch.
        text_field: the field of a record that holds the text.
        limit: the largest number of examples of a task.
        json: print JSON.
        special_tokens: read text that spells a special token as that token; by default as the run was trained
            (data.special_tokens), and as plain text for other models.
        model: which weights are loaded, and where.
    """
    if not text and not tasks:
        raise ValueError("there is nothing to evaluate: give --text FILES or --tasks NAMES")
    text_model = model.open(source)
    if special_tokens is not None:
        text_model = dataclasses.replace(text_model, special_tokens=special_tokens)
    console = Console(soft_wrap=True, highlight=False)
    if text:
        shown = Console(stderr=True, quiet=processes.quiet())
        sizes = {"length": length, "stride": stride, "batch": batch}
        scores = evaluate.score_files(text_model, text, **sizes, field=text_field, console=shown)
        print(evaluate.as_json(scores)) if json else evaluate.show(scores, console)
    if tasks:
        results = evaluate.run_tasks(text_model, tasks, task_folder, length=length, batch=batch, limit=limit)
        console.print_json(data=results, default=str)

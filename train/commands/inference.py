"""The commands of `zoo` that a model answers: generate, chat, eval."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
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
from .chat import converse


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How tokens are drawn."""

    temperature: float = 0.8
    """0 takes the most likely token each time; higher is more varied."""
    top_k: int = 0
    """Draw from so many of the most likely tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Draw from tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Makes tokens that were there already less likely."""
    seed: int = 0
    """Of the random draws."""

    @property
    def sampling(self) -> zoo.Sampling:
        """The same without the seed."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "seed"}
        return zoo.Sampling(**values)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and in what the model computes."""

    step: int | None = None
    """Of a run: the checkpoint to use; the latest one if not given."""
    mesh: str = ""
    """Axes and sizes to place the model on, e.g. 'tensor=4'."""
    dtype: str = ""
    """float32, bfloat16 or float16; by default float32 for a run, for others what they are stored in."""
    cache_dtype: str = ""
    """Of keys and values; int8 stores them quantized."""
    ignore: tuple[str, ...] = ()
    """Fields of the checkpoint's config (keys, for a .gguf file) that are unknown here and that change nothing."""
    text_only: bool = False
    """Load the text model of a multimodal checkpoint."""

    def open(self, source: str) -> TextModel:
        """The model of a source."""
        if self.cache_dtype and self.cache_dtype not in ("int8", *DTYPES):
            raise unknown("cache_dtype", self.cache_dtype, ("int8", *DTYPES))
        loop.use_compilation_cache()
        if is_named(path := Path(source)):
            Folder(path).run()  # the error for a mistyped run lists the runs beside it
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


@contextlib.contextmanager
def bytes_shown(what: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal; gives what to tell bytes done and bytes in all."""
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
    draw: tyro.conf.OmitArgPrefixes[Draw] = Draw(),
    place: tyro.conf.OmitArgPrefixes[Place] = Place(),
    guess: int = 0,
    special_tokens: bool | None = None,
) -> None:
    """Continue a prompt.

    Example: `zoo generate runs/shakespeare --prompt "JULIET." --temperature 0.7`

    Args:
        source: the folder of a run, a Hugging Face folder, a .gguf file, or a name on the hub.
        prompt: the text to continue.
        max_tokens: how many tokens to write at most.
        samples: how many texts to write; a single one is written as it comes.
        draw: how tokens are drawn.
        place: where and in what the model computes.
        guess: so many tokens are guessed at a time from the text so far, which changes nothing but the speed.
        special_tokens: read text of the prompt that spells a special token as that token; by default as the run was
            trained (data.special_tokens), and as plain text for other models.
    """
    prompt = unescaped(prompt)
    writer = place.open(source).optimize_for_decoding()
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sampling": draw.sampling,
        "stop": writer.end_ids,
        "seed": draw.seed,
        "dtype": writer.dtype,
        "cache_dtype": place.cache_dtype or None,
        "speculation": zoo.Speculation(tokens=guess) if guess else None,
        "special_tokens": writer.special_tokens if special_tokens is None else special_tokens,
    }
    bold = Console(soft_wrap=True, highlight=False, markup=False)
    shown = prompt.lstrip("\n")
    if samples == 1:
        streamed = zoo.stream(writer.model, writer.tokenizer, prompt, **options)
        bold.print(shown, style="bold", end="")
        for piece in streamed:
            print(piece, end="", flush=True)
        print("\n")
        speed = streamed.completion.speed
    else:
        found = zoo.complete(writer.model, writer.tokenizer, [prompt] * samples, **options)
        for one in found:
            bold.print(Text(shown, style="bold") + Text(f"{one.text}\n", style="not bold"))
        speed = found[0].speed
    if sys.stderr.isatty() and not processes.quiet():
        print(f"({speed})", file=sys.stderr)


def chat(
    source: Annotated[str, tyro.conf.Positional],
    system: str = "",
    max_tokens: int = 1000,
    template: Path | None = None,
    draw: tyro.conf.OmitArgPrefixes[Draw] = Draw(),
    place: tyro.conf.OmitArgPrefixes[Place] = Place(),
    guess: int = 0,
) -> None:
    """Talk with a model: messages from standard input, answers as they come.

    Example: `zoo chat SmolLM2-135M-Instruct.gguf --temperature 0.2`

    Args:
        source: a Hugging Face folder, a .gguf file, a name on the hub, or the folder of a run.
        system: the first message, from "system".
        max_tokens: how many tokens an answer has at most.
        template: a file with the Jinja chat template; by default the model's own.
        draw: how tokens are drawn.
        place: where and in what the model computes.
        guess: so many tokens are guessed at a time from the text so far, which changes nothing but the speed.
    """
    writer = place.open(source).optimize_for_decoding()
    if template is not None:
        writer = writer.with_template(template.read_text(encoding="utf-8"))
    if writer.template is None:
        raise ValueError(f"{source} has no chat template; give one by --template FILE, or use `zoo generate`")
    conversation = Conversation(
        writer.model,
        writer.tokenizer,
        writer.template,
        stop=writer.end_ids,
        system=unescaped(system) or None,
        sampling=draw.sampling,
        seed=draw.seed,
        dtype=writer.dtype,
        cache_dtype=place.cache_dtype or None,
        speculation=zoo.Speculation(tokens=guess) if guess else None,
    )
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
    place: tyro.conf.OmitArgPrefixes[Place] = Place(),
) -> None:
    """Perplexity and bits per byte of text, and tasks of lm-evaluation-harness.

    Example: `zoo eval runs/shakespeare --text my_book.txt 'notes/*.jsonl'`

    Args:
        source: the folder of a run, a Hugging Face folder, a .gguf file, or a name on the hub.
        text: files, folders or globs of .txt, .jsonl or .parquet, or a dataset as in training.
        tasks: names of tasks (with the `eval` extra).
        task_folder: a folder of YAML files of more tasks.
        length: tokens that the model reads at once, at most.
        stride: tokens that windows move by, at most the length. 0: half of the length.
        batch: windows at a time.
        text_field: the field of a record that holds the text.
        limit: only so many examples of a task.
        json: print JSON.
        special_tokens: read text that spells a special token as that token; by default as the run was trained
            (data.special_tokens), and as plain text for other models.
        place: where and in what the model computes.
    """
    if not text and not tasks:
        raise ValueError("there is nothing to evaluate: give --text FILES or --tasks NAMES")
    writer = place.open(source)
    if special_tokens is not None:
        writer = dataclasses.replace(writer, special_tokens=special_tokens)
    console = Console(soft_wrap=True, highlight=False)
    if text:
        shown = Console(stderr=True, quiet=processes.quiet())
        sizes = {"length": length, "stride": stride, "batch": batch}
        scores = evaluate.score_files(writer, text, **sizes, field=text_field, console=shown)
        print(evaluate.as_json(scores)) if json else evaluate.show(scores, console)
    if tasks:
        found = evaluate.run_tasks(writer, tasks, task_folder, length=length, batch=batch, limit=limit)
        console.print_json(data=found, default=str)

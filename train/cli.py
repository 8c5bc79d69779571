"""The `zoo` command."""

import dataclasses
import inspect
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from .. import configs, zoo
from ..configs.run import Run
from ..layers.spec import unknown
from ..zoo import family
from ..zoo.chat import ChatTemplate, Conversation
from ..zoo.load import is_run
from . import evaluate, hardware, loop, show
from .chat import converse
from .folder import Folder
from .writer import DTYPES, Writer, open_writer

RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model, and go on where an interrupted run of the same folder stopped.

    Example: `zoo train shakespeare --data.source my_book.txt --steps 1000 --name my_book`
    """

    run: Annotated[Run, tyro.conf.arg(name="")]
    name: str
    """The run's folder is RUNS/NAME."""
    runs: Path = RUNS
    fresh: bool = False
    """Delete what the folder holds of an earlier run, and start anew."""
    step: int | None = None
    """Go on from the checkpoint of this step instead of the latest one."""


def list_() -> None:
    """The named models and runs, with their sizes."""
    show.listing(Console())


def show_(name: Annotated[str, tyro.conf.Positional], mesh: str = "", length: int = 0) -> None:
    """Every parameter of a model with shape, dtype, sharding and bytes; totals, FLOPs and KV-cache bytes per token.

    Args:
        name: a model or run by name (see `zoo list`), the folder of a run, or a checkpoint as `zoo convert` takes it.
        mesh: axes and sizes to split parameters over, e.g. 'fsdp=4,tensor=2' (no devices needed).
        length: tokens of context the FLOPs are counted for; that of the run, or 2048 or what fits, if not given.
    """
    show.table(name, _find(name), mesh, length, Console())


def diff(a: Annotated[str, tyro.conf.Positional], b: Annotated[str, tyro.conf.Positional]) -> None:
    """The settings in which two models or runs differ.

    Args:
        a: a model or run by name, the folder of a run, or a checkpoint as `zoo convert` takes it.
        b: another one.
    """
    show.difference(a, _find(a), b, _find(b), Console())


def convert(
    source: Annotated[str, tyro.conf.Positional],
    destination: Annotated[Path, tyro.conf.Positional],
    dtype: str = "",
) -> None:
    """Write a checkpoint as a Hugging Face folder, which transformers loads, or as a .gguf file.

    Example: `zoo convert runs/shakespeare exported --dtype bfloat16`

    Args:
        source: a Hugging Face folder, a .gguf file, the folder of a run, or a name on the Hugging Face hub (org/name).
        destination: a folder that does not exist yet, or a name that ends in .gguf.
        dtype: float32, bfloat16 or float16; F16 or Q8_0 for a .gguf file; as stored, and F16, if not given.
    """
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        zoo.convert(
            source, destination, dtype=dtype, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    print(f"wrote {destination}")


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

    def open(self, source: str) -> Writer:
        """The model of a source."""
        if self.cache_dtype and self.cache_dtype not in ("int8", *DTYPES):
            raise unknown("cache_dtype", self.cache_dtype, ("int8", *DTYPES))
        loop.use_compilation_cache()
        return open_writer(source, step=self.step, mesh=self.mesh, dtype=self.dtype)


def generate(
    source: Annotated[str, tyro.conf.Positional],
    prompt: str = "\n",
    max_tokens: int = 300,
    samples: int = 1,
    draw: tyro.conf.OmitArgPrefixes[Draw] = Draw(),
    place: tyro.conf.OmitArgPrefixes[Place] = Place(),
    guess: int = 0,
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
    """
    writer = place.open(source).for_decoding()
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sampling": draw.sampling,
        "stop": writer.stop,
        "seed": draw.seed,
        "dtype": writer.dtype,
        "cache_dtype": place.cache_dtype or None,
        "speculation": zoo.Speculation(tokens=guess) if guess else None,
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
    if sys.stderr.isatty():
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
    writer = place.open(source).for_decoding()
    made = writer.template if template is None else ChatTemplate(template.read_text(encoding="utf-8"))
    if made is None:
        raise ValueError(f"{source} has no chat template; give one by --template FILE, or use `zoo generate`")
    conversation = Conversation(
        writer.model,
        writer.tokenizer,
        made,
        stop=writer.stop,
        system=system or None,
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
    place: tyro.conf.OmitArgPrefixes[Place] = Place(),
) -> None:
    """Perplexity and bits per byte of text, and tasks of lm-evaluation-harness.

    Example: `zoo eval runs/shakespeare --text my_book.txt 'notes/*.jsonl'`

    Args:
        source: the folder of a run, a Hugging Face folder, a .gguf file, or a name on the hub.
        text: files, folders or globs of .txt, .jsonl or .parquet, or a dataset as in training.
        tasks: names of tasks (with the `eval` extra).
        task_folder: a folder of YAML files of more tasks.
        length: tokens of a window, at most.
        stride: tokens that a window moves on by; half of the length if not given.
        batch: windows at a time.
        text_field: the field of a record that holds the text.
        limit: only so many examples of a task.
        json: print JSON.
        place: where and in what the model computes.
    """
    if not text and not tasks:
        raise ValueError("there is nothing to evaluate: give --text FILES or --tasks NAMES")
    writer = place.open(source)
    console = Console(soft_wrap=True, highlight=False)
    if text:
        shown = Console(stderr=True)
        sizes = {"length": length, "stride": stride, "batch": batch}
        scores = evaluate.score_files(writer, text, **sizes, field=text_field, console=shown)
        print(evaluate.as_json(scores)) if json else evaluate.show(scores, console)
    if tasks:
        found = evaluate.run_tasks(writer, tasks, task_folder, length=length, batch=batch, limit=limit)
        console.print_json(data=found, default=str)


def train(arguments: list[str]) -> None:
    """Train a run by name, or go on with the one in a folder as it is: `zoo train runs/shakespeare`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: zoo train NAME_OR_FOLDER [--name FOLDER] [--fresh] [--step N] [--SETTING VALUE ...]")
        print(f"\n{inspect.getdoc(Train)}\n\nruns:")
        for name, made in configs.RUNS.items():
            print(f"  {name:16} {(made.__doc__ or '').splitlines()[0]}")
        print("\n`zoo train NAME --help` shows every setting of a run and its value.")
        return
    source, *rest = arguments
    saved = Folder(Path(source))
    if saved.config.is_file():
        default = Train(run=saved.run(), name=saved.path.name, runs=saved.path.parent)
    else:
        default = Train(run=configs.get_run(source), name=source)
    wanted = tyro.cli(
        Train, default=default, args=rest, prog=f"zoo train {source}", config=(tyro.conf.AvoidSubcommands,)
    )
    folder = wanted.runs / wanted.name
    prompt = wanted.run.prompt.strip() or "The "
    loop.train(wanted.run, folder, fresh=wanted.fresh, step=wanted.step)
    zoo_ = "zoo" if shutil.which("zoo") else os.path.relpath(sys.argv[0])
    print(f"\nTry next:\n  {shlex.join([zoo_, 'generate', str(folder)])} --prompt {shlex.quote(prompt)}")
    if wanted.run.data.source == ("shakespeare",):
        print(f"  {zoo_} train shakespeare --data.source my_text.txt --prompt 'Once' --name my_text")


COMMANDS: dict[str, Callable[..., Any]] = {
    "list": list_,
    "show": show_,
    "diff": diff,
    "convert": convert,
    "generate": generate,
    "chat": chat,
    "eval": eval_,
}


def main() -> None:
    """Runs the command line; errors are one line on standard error, with a traceback only where `--traceback` asks."""
    hardware.without_tpu()
    arguments = [a for a in sys.argv[1:] if a != "--traceback"]
    try:
        dispatch(arguments)
    except loop.Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(143 if stop.signal_name == "SIGTERM" else 130)
    except KeyboardInterrupt:
        print("interrupted; what was saved stays", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        if "--traceback" in sys.argv or os.environ.get("ZOO_TRACEBACK"):
            raise
        expected = isinstance(error, ValueError | OSError | NotImplementedError)
        name = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected else "\n(--traceback shows where)"
        print(f"error: {name}{error}{hint}", file=sys.stderr)
        sys.exit(1)


def dispatch(arguments: list[str]) -> None:
    """Carries out one command line."""
    command = arguments[0] if arguments else "--help"
    if command == "train":
        train(arguments[1:])
    elif command in ("-h", "--help"):
        print(USAGE)
    elif command in COMMANDS:
        tyro.cli(COMMANDS[command], args=arguments[1:], prog=f"zoo {command}")
    else:
        raise unknown("command", command, [*COMMANDS, "train"])


USAGE = """usage: zoo COMMAND ...

Language models for JAX: look at them, train them, write with them.

  zoo list                      the named models and runs
  zoo show gpt2                 parameters, shapes, bytes, FLOPs and cache of a model
  zoo diff gpt2 llama3_8b       the settings in which two models or runs differ
  zoo convert SOURCE NEW        a checkpoint as a Hugging Face folder or a .gguf file
  zoo train shakespeare         train a run; every setting is a flag (zoo train shakespeare --help)
  zoo generate runs/shakespeare --prompt "JULIET."
                                continue a prompt with what was trained, or a Hugging Face folder or .gguf file
  zoo chat SmolLM2-135M-Instruct.gguf
                                talk with a model that has a chat template
  zoo eval runs/shakespeare --text my_book.txt
                                perplexity and bits per byte of text; tasks of lm-evaluation-harness

`zoo COMMAND --help` says more of each. `--traceback` shows where an error came from."""


def _find(name: str) -> Any:
    folder = Folder(Path(name))
    if is_run(name):
        return folder.run()
    if name in configs.MODELS | configs.RUNS or not (Path(name).exists() or "/" in name):
        return configs.get(name)
    return family.read(zoo.open_source(name).config)


if __name__ == "__main__":
    main()

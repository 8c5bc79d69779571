"""The `zoo` command."""

import argparse
import contextlib
import importlib.metadata
import inspect
import io
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console

from ... import configs, zoo
from ...configs.run import Run
from ...layers.linear.matmul import Kind
from ...layers.spec import unknown
from ...layers.stack import Remat
from ...zoo.decoder import refuse_64_bits
from ...zoo.families import registry
from ...zoo.formats.load import is_run
from ..checkpoints import step_folders
from ..distributed import cluster, hardware, processes, signals
from ..plan import decode as plan_decode
from ..plan import report as plan_report
from ..plan.chips import chip_of
from ..runs import loop
from ..runs.folder import Folder, is_named
from ..runs.progress import replace_unencodable
from . import inference as commands
from . import shard, show

RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model, or resume a run: an interrupted one as it is, a finished one with more --steps.

    Example: `zoo train shakespeare --data.source my_book.txt --steps 1000 --name my_book`
    """

    run: Annotated[Run, tyro.conf.arg(name="")]
    name: str
    """The run's folder is RUNS/NAME."""
    runs: Path = RUNS
    fresh: bool = False
    """Start from the beginning, and delete what the folder holds of an earlier run."""
    yes: bool = False
    """Confirm that --fresh or --step deletes checkpoints."""
    allow_changes: bool = False
    """Resume with other settings, e.g. another learning rate, batch or text; the changes are printed and recorded."""
    step: int | None = None
    """Resume from the checkpoint of this step instead of the latest one, and delete later ones."""


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


def shard_(
    name: Annotated[str, tyro.conf.Positional], mesh: str = "", json: bool = False, plot: Path | None = None
) -> None:
    """Every tensor's shards and bytes per device on a mesh, with a drawing of who holds what; no devices needed.

    Example: `zoo shard llama3_70b --mesh fsdp=64,tensor=4 --plot shards.png`

    Args:
        name: a model or run by name (see `zoo list`), the folder of a run, or a checkpoint as `zoo convert` takes it.
        mesh: axes and sizes, e.g. 'fsdp=8,tensor=4' (docs/sharding.md); that of the run if not given.
        json: print JSON instead.
        plot: draw a picture into this file (.png, .svg, .pdf) instead of in letters.
    """
    found = shard.layout(name, _find(name), mesh)
    if plot is not None:
        shard.plot(found, plot)
    if json:
        print(shard.as_json(found))
    else:
        shard.show(found, Console(), drawn=plot is None)


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
    ignore: tuple[str, ...] = (),
    text_only: bool = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, which transformers loads, or as a .gguf file.

    Example: `zoo convert runs/shakespeare exported --dtype bfloat16`

    Args:
        source: a Hugging Face folder, a .gguf file, the folder of a run, or a name on the Hugging Face hub (org/name).
        destination: a folder that does not exist yet, or a name that ends in .gguf.
        ignore: fields of the config (keys, for a .gguf file) that are unknown here and that change nothing.
        text_only: take the text model of a multimodal checkpoint.
        dtype: float32, bfloat16 or float16; F16 or Q8_0 for a .gguf file; as stored, and F16, if not given.
    """
    with commands.bytes_shown() as progress:
        zoo.convert(source, destination, dtype=dtype, ignore=ignore, text_only=text_only, progress=progress)
    print(f"wrote {destination}")


def plan_(
    name: Annotated[str, tyro.conf.Positional],
    topology: str,
    length: int = 0,
    batch: int = 0,
    mesh: str = "",
    remat: Remat | Literal[""] = "",
    accumulate: int = 0,
    optimizer: Literal["", "adamw", "lion", "muon", "adafactor", "sgd"] = "",
    momentum_dtype: Literal["", "float32", "bfloat16"] = "",
    dtype: Literal["", "float32", "bfloat16"] = "",
    quantize: Kind | Literal[""] = "",
    search: bool = False,
    any_momentum: bool = False,
    plot: Path | None = None,
    decode: bool = False,
    cache_dtype: Literal["", "float32", "bfloat16", "int8"] = "",
    json: bool = False,
    usd_hour: float | None = None,
    watts: float | None = None,
) -> None:
    """Whether a training job fits a TPU slice or GPUs, how long a step takes and what it costs; neither is needed.

    Their real compiler compiles the real step, in a minute or so. With `--decode` it is the program that generates.

    Example: `zoo plan qwen2_5_0_5b --topology colab-v5e --batch 4`

    Args:
        name: a model or run by name (see `zoo list`), the folder of a run, or weights as `zoo train` takes them.
        topology: chip and sides of the slice, e.g. 'v6e:2x4'; or 'h100:8'; or colab-v5e, colab-v6e, kaggle.
        length: tokens in a sequence; that of the run, or 2048 or what the model has positions for, if not given.
        batch: sequences in a step; that of the run, or one for each chip, if not given.
        mesh: axes and sizes, e.g. 'fsdp=4,tensor=2'; fsdp over all chips if not given.
        remat: what the backward pass computes anew; that of the run if not given.
        accumulate: parts that a step is cut into; that of the run if not given.
        optimizer: by name; that of the run, or adamw, if not given.
        momentum_dtype: what the optimizer keeps its moving average of gradients in; that of the run if not given.
        dtype: what layers compute in; that of the run, or bfloat16, if not given.
        quantize: 8 bits for products with weights; that of the run if not given.
        search: look for the fastest mesh, remat and accumulate: rank all by arithmetic, and compile the best ones.
        any_momentum: search also with momentum in bfloat16, where memory is short; such a run learns something else.
        plot: a file that the picture of a search goes to, e.g. plan.png.
        decode: generation instead of training: `batch` rows that grow to `length` tokens, 1 and 2048 if not given.
        cache_dtype: with decode, of keys and values; bfloat16 if not given, int8 stores them quantized.
        json: print JSON.
        usd_hour: the price of a JAX device and hour; without it no price is told.
        watts: the power of a chip; without it no energy is told.
    """
    found = _find(name)
    chips = chip_of(topology)[1]
    costs = {"usd_hour": usd_hour, "watts": watts}
    if decode:
        others = {"remat": remat, "accumulate": accumulate, "optimizer": optimizer, "momentum-dtype": momentum_dtype}
        others |= {"quantize": quantize, "search": search, "any-momentum": any_momentum, "plot": plot}
        if unused := [f"--{key}" for key, value in others.items() if value]:
            raise ValueError(f"--decode plans generation, which has no use for {', '.join(unused)}; leave it out")
        model = found.model if isinstance(found, Run) else found
        given = {"batch": batch, "length": length, "mesh": mesh, "dtype": dtype, "cache_dtype": cache_dtype}
        wanted = plan_decode.Decoding(model=model, **{key: value for key, value in given.items() if value})
        plan_decode.command(wanted, topology, as_json=json, **costs)
        return
    if (any_momentum or plot) and not search:
        raise ValueError("--any-momentum and --plot are of a search; add --search or leave them out")
    if cache_dtype:
        raise ValueError(f"training has no cache, got --cache-dtype {cache_dtype}; add --decode or leave it out")
    if isinstance(found, Run):
        run = found
    elif name in configs.MODELS:
        run = Run(model=found, batch=chips, length=min(2048, found.max_positions or 2048), dtype="bfloat16")
    else:
        run = configs.get_run(name)
    given = {"length": length, "batch": batch, "mesh": mesh, "remat": remat, "accumulate": accumulate, "dtype": dtype}
    given |= {"quantize": quantize, "optimizer.name": optimizer, "optimizer.momentum_dtype": momentum_dtype}
    wanted = run.replace(**{key: value for key, value in given.items() if value})
    if search:
        plan_report.search_command(name, wanted, topology, momentum=any_momentum, plot=plot, as_json=json, **costs)
    else:
        plan_report.command(wanted, topology, as_json=json, **costs)


def train(arguments: list[str]) -> None:
    """Train a run by name, go on with the one in a folder as it is, or start from the weights of a checkpoint."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(TRAIN_USAGE + "\n\nruns:")
        for name, made in configs.RUNS.items():
            print(f"  {name:16} {(made.__doc__ or '').splitlines()[0]}")
        print("\n`zoo train NAME --help` shows every setting of a run and its value.")
        return
    source, *rest = arguments
    default = _default(source, rest)
    wanted = tyro.cli(
        Train, default=default, args=rest, prog=f"zoo train {source}", config=(tyro.conf.AvoidSubcommands,)
    )
    folder = wanted.runs / wanted.name
    prompt = wanted.run.prompt.strip() or "The "
    options = {"fresh": wanted.fresh, "allow_changes": wanted.allow_changes, "step": wanted.step}
    loop.train(wanted.run, folder, yes=wanted.yes or _confirmed(wanted, folder), **options)
    zoo_ = "zoo" if shutil.which("zoo") else os.path.relpath(sys.argv[0])
    print(f"\nTry next:\n  {shlex.join([zoo_, 'generate', str(folder)])} --prompt {shlex.quote(prompt)}")
    if wanted.run.data.source == ("shakespeare",):
        print(f"  {zoo_} train shakespeare --data.source my_text.txt --prompt 'Once' --name my_text")


def _confirmed(wanted: Train, folder: Path) -> bool:
    """Asks in a terminal whether checkpoints may be deleted; elsewhere --yes is required."""
    saved = step_folders.steps(Folder(folder).checkpoints)
    deleted = [step for step in saved if wanted.fresh or (wanted.step is not None and step > wanted.step)]
    if not deleted or not sys.stdin.isatty() or jax.distributed.is_initialized():
        return False
    steps = ", ".join(map(str, deleted))
    return input(f"This deletes the checkpoints of {folder} (step {steps}). Continue? [y/N] ").lower() in ("y", "yes")


def _default(source: str, flags: Sequence[str] = ()) -> Train:
    """What `zoo train SOURCE` does without flags but for those that say how SOURCE is read."""
    reading = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reading.add_argument("--ignore", nargs="+", default=())
    reading.add_argument("--text-only", "--text_only", action="store_true")
    known, _ = reading.parse_known_args(flags)
    path = Path(source)
    if is_run(path) or ("/" in source and is_named(path)):
        return Train(run=Folder(path).run(), name=path.name, runs=path.parent)
    if configs.files.is_run_file(source):
        return Train(run=configs.get_run(source), name=configs.files.run_name(source))
    run = configs.get_run(source, ignore=tuple(known.ignore), text_only=known.text_only)
    return Train(run=run, name=path.name.removesuffix(".gguf"))


COMMANDS: dict[str, Callable[..., Any]] = {
    "list": list_,
    "show": show_,
    "shard": shard_,
    "diff": diff,
    "convert": convert,
    "plan": plan_,
    "generate": commands.generate,
    "chat": commands.chat,
    "eval": commands.eval_,
}


MANY = ("train", "generate", "eval")
"""The commands that several processes may carry out together."""


def main() -> None:
    """Runs the command line; errors are one line on standard error, with a traceback only where `--traceback` asks."""
    hardware.without_tpu()
    for stream in (sys.stdout, sys.stderr):
        replace_unencodable(stream)
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.encoding.lower() in (
        "ascii",
        "us-ascii",
        "ansi_x3.4-1968",
    ):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    arguments = [a for a in sys.argv[1:] if a != "--traceback"]
    try:
        with _joined(arguments):
            dispatch(arguments)
    except (Exception, KeyboardInterrupt) as error:
        text, code = told(error)
        if text and (not isinstance(error, signals.Interrupted) or processes.writes()):
            print(text, file=sys.stderr)
        sys.exit(code)


@contextlib.contextmanager
def _joined(arguments: list[str]) -> Iterator[None]:
    """One process of several where the command is for many; what it prints is printed by the first one."""
    if not arguments or arguments[0] not in MANY or {"-h", "--help"} & {*arguments}:
        yield
        return
    with cluster.joined(told), contextlib.ExitStack() as quiet:
        if processes.quiet():
            quiet.enter_context(
                contextlib.redirect_stdout(quiet.enter_context(Path(os.devnull).open("w", encoding="utf-8")))
            )
        yield


def told(error: BaseException) -> tuple[str, int]:
    """What a user reads of an error, if there is anybody who reads, and the exit code."""
    if isinstance(error, BrokenPipeError):
        return "", 141
    if isinstance(error, signals.Interrupted):
        return f"{error}", 143 if error.signal_name == "SIGTERM" else 130
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was saved stays", 130
    if "--traceback" in sys.argv or os.environ.get("ZOO_TRACEBACK"):
        return "".join(traceback.format_exception(error)), 1
    expected = isinstance(error, ValueError | OSError | NotImplementedError)
    name = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else "\n(--traceback shows where)"
    return f"error: {name}{error}{hint}", 1


def dispatch(arguments: list[str]) -> None:
    """Carries out one command line."""
    command = arguments[0] if arguments else "--help"
    if command == "train":
        train(arguments[1:])
    elif command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"flaxzoo {importlib.metadata.version('flaxzoo')}")
    elif command in COMMANDS:
        refuse_64_bits()
        tyro.cli(COMMANDS[command], args=arguments[1:], prog=f"zoo {command}")
    else:
        raise unknown("command", command, [*COMMANDS, "train"])


TRAIN_USAGE = f"""usage: zoo train NAME [--name FOLDER] [--fresh] [--step N] [--SETTING VALUE ...]

{inspect.getdoc(Train)}

NAME is one of
  a run or model by name (`zoo list`); a model starts from random weights
  the folder of a run, which is resumed, or extended by --steps (`zoo train runs/my_book --steps 2000`)
  a file of your own that defines a Run: my_run.py, my_run.py:NAME, or my_run.json (docs/training.md)
  pretrained weights: a Hugging Face folder, a .gguf file, or a name on the hub
    (`zoo train HuggingFaceTB/SmolLM2-135M --data.source my_book.txt --name my_book`)"""

USAGE = """usage: zoo COMMAND ...

Language models for JAX: look at them, train them, write with them.

  zoo list                      the named models and runs
  zoo show gpt2                 parameters, shapes, bytes, FLOPs and cache of a model
  zoo shard llama3_8b --mesh fsdp=8,tensor=4
                                who holds what on a mesh, and bytes per device
  zoo diff gpt2 llama3_8b       the settings in which two models or runs differ
  zoo convert SOURCE NEW        a checkpoint as a Hugging Face folder or a .gguf file
  zoo plan qwen2_5_0_5b --topology colab-v5e --batch 4
                                whether a job fits TPUs or GPUs, its speed and its price, by their compiler
  zoo train shakespeare         train a run; every setting is a flag (zoo train shakespeare --help)
  zoo train SmolLM2-135M.gguf --data.source my_book.txt
                                train on from pretrained weights: a Hugging Face folder or name, or a .gguf file
  zoo generate runs/shakespeare --prompt "JULIET."
                                continue a prompt with what was trained, or a Hugging Face folder or .gguf file
  zoo chat SmolLM2-135M-Instruct.gguf
                                talk with a model that has a chat template
  zoo eval runs/shakespeare --text my_book.txt
                                perplexity and bits per byte of text; tasks of lm-evaluation-harness

`zoo COMMAND --help` lists the options of a command. `zoo --version` prints the version.
`--traceback` shows where an error came from."""


def _find(name: str) -> Any:
    folder = Folder(Path(name))
    if is_run(name):
        return folder.run()
    if configs.files.is_run_file(name):
        return configs.get_run(name)
    if name in configs.MODELS | configs.RUNS or not (Path(name).exists() or "/" in name):
        return configs.get(name)
    return registry.read(zoo.open_source(name).config)


if __name__ == "__main__":
    main()

"""The `zoo` command: selects the module of a command, parses its spec, runs it, and prints errors as one message.

Nothing heavy is imported here: each command imports what it needs, so that help and short commands start fast.
"""

import contextlib
import importlib
import importlib.metadata
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..distributed.libtpu import skip_search


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: a module of this package with `parse(arguments)`, which returns a spec, and `run(spec)`."""

    module: str
    usage: tuple[tuple[str, str], ...]
    """Examples and what they do, for `zoo --help`."""
    parallel: bool = False
    """Several processes may run it together."""
    computes: bool = True
    """It may import JAX."""


COMMANDS = {
    "list": Command(module="list", usage=(("zoo list", "the named models and runs"),), computes=False),
    "show": Command(
        module="show",
        usage=(("zoo show gpt2", "parameters, shapes, bytes, FLOPs and cache of a model"),),
    ),
    "shard": Command(
        module="shard",
        usage=(
            ("zoo shard llama3_8b --mesh fsdp=8,tensor=4", "the shards of each device on a mesh, and bytes per device"),
        ),
    ),
    "diff": Command(
        module="diff",
        usage=(("zoo diff gpt2 llama3_8b", "the settings in which two models or runs differ"),),
    ),
    "convert": Command(
        module="convert",
        usage=(("zoo convert MODEL PATH", "a checkpoint as a Hugging Face folder or a .gguf file"),),
    ),
    "plan": Command(
        module="plan",
        usage=(
            (
                "zoo plan qwen2_5_0_5b --topology colab-v5e --batch 4",
                "whether a job fits TPUs or GPUs, its speed and its cost, from their compiler",
            ),
        ),
    ),
    "train": Command(
        module="train",
        usage=(
            ("zoo train shakespeare", "train a run; every setting is a flag (zoo train shakespeare --help)"),
            (
                "zoo train SmolLM2-135M.gguf --data.source my_book.txt",
                "train pretrained weights: a Hugging Face folder or name, or a .gguf file",
            ),
        ),
        parallel=True,
    ),
    "generate": Command(
        module="generate",
        usage=(
            (
                'zoo generate runs/shakespeare --prompt "JULIET."',
                "continue a prompt with a trained run, a Hugging Face folder or a .gguf file",
            ),
        ),
        parallel=True,
    ),
    "chat": Command(
        module="chat",
        usage=(("zoo chat SmolLM2-135M-Instruct.gguf", "chat with a model that has a chat template"),),
    ),
    "eval": Command(
        module="evaluate",
        usage=(
            (
                "zoo eval runs/shakespeare --text my_book.txt",
                "perplexity and bits per byte of text; tasks of lm-evaluation-harness",
            ),
        ),
        parallel=True,
    ),
}

COLUMN = 32
"""Width of the examples in the usage."""


def usage() -> str:
    """The text of `zoo --help`."""
    lines = ["usage: zoo COMMAND ...", "", "Language models for JAX: inspect, train, generate and evaluate.", ""]
    for example, summary in (pair for command in COMMANDS.values() for pair in command.usage):
        short = f"  {example:{COLUMN - 2}}"
        lines += [short + summary] if len(short) == COLUMN else [short, " " * COLUMN + summary]
    lines += ["", "`zoo COMMAND --help` lists the options of a command. `zoo --version` prints the version."]
    return "\n".join([*lines, "`--traceback` prints where an error came from."])


def main() -> None:
    """Runs the command line. Errors are one message on standard error, with a traceback only if `--traceback` asks."""
    skip_search()
    _prepare_consoles()
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    try:
        with _joined(arguments):
            dispatch(arguments)
    except (Exception, KeyboardInterrupt) as error:
        text, code = describe_error(error)
        if text and not _printed_by_another_process(error):
            print(text, file=sys.stderr)
        sys.exit(code)


def dispatch(arguments: Sequence[str]) -> None:
    """Runs one command line."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"flaxzoo {importlib.metadata.version('flaxzoo')}")
    else:
        module = load(name)
        module.run(module.parse(arguments[1:]))


def load(name: str) -> ModuleType:
    """The module of a command. Raises ValueError, with similar names, if there is none."""
    if name not in COMMANDS:
        from ...layers.spec import unknown

        raise unknown("command", name, COMMANDS)
    if COMMANDS[name].computes:
        from ...zoo.decoder import refuse_64_bits

        refuse_64_bits()
    return importlib.import_module(f".{COMMANDS[name].module}", __package__)


def describe_error(error: BaseException) -> tuple[str, int]:
    """The message of an error, empty if nobody reads it, and the exit code."""
    if isinstance(error, BrokenPipeError):
        return "", 141
    if (code := getattr(error, "exit_code", None)) is not None:
        return f"{error}", code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; checkpoints that were saved remain", 130
    if "--traceback" in sys.argv or os.environ.get("ZOO_TRACEBACK"):
        return "".join(traceback.format_exception(error)), 1
    expected = isinstance(error, ValueError | OSError | NotImplementedError)
    name = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else "\n(--traceback prints where)"
    return f"error: {name}{error}{hint}", 1


def _printed_by_another_process(error: BaseException) -> bool:
    """Whether all processes of a job end with this error, so that the first one prints it for all."""
    if not hasattr(error, "exit_code"):
        return False
    from ..distributed import processes

    return not processes.writes()


@contextlib.contextmanager
def _joined(arguments: Sequence[str]) -> Iterator[None]:
    """Joins the processes of a job, if the command is parallel; the first one prints for all."""
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None or not command.parallel or {"-h", "--help"} & {*arguments}:
        yield
        return
    from ..distributed import cluster, processes

    with cluster.joined(describe_error), contextlib.ExitStack() as quiet:
        if processes.quiet():
            nowhere = quiet.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def _prepare_consoles() -> None:
    """Lets any text be printed and read, whatever the locale."""
    from ..runs.progress import replace_unencodable

    for stream in (sys.stdout, sys.stderr):
        replace_unencodable(stream)
    ascii_names = ("ascii", "us-ascii", "ansi_x3.4-1968")
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.encoding.lower() in ascii_names:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()

"""`zoo train`: starts, resumes or extends a run."""

import inspect
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from ... import configs
from ...configs import catalog
from ...configs.models.hub import REPOSITORIES
from ...configs.run import Run
from ...zoo.formats.load import is_run
from ..checkpoints import step_folders
from ..distributed import processes
from ..runs import loop
from ..runs.folder import Folder, is_named
from .flags import parse_flags, parse_some
from .source import SourceFlags

RUNS = Path("runs")

HELP = ("-h", "--help")

GROUPS = {
    "weights": ("weights", "ignore", "text_only"),
    "size": ("steps", "batch", "length", "accumulate"),
    "devices": ("mesh", "context", "dtype", "quantize", "remat"),
    "learning": ("seed", "z_loss", "ema", "max_bad_steps"),
    "evaluation": ("eval_every", "sample_every", "prompt", "save_every", "keep_last", "profile"),
}
"""The settings of a run in the help. Nested settings (model, data, optimizer, balance) have groups of their own."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model, or resume a run: an interrupted one as it is, a finished one with more --steps.

    Example: `zoo train shakespeare --data.source my_book.txt --steps 1000 --name my_book`
    """

    run: Annotated[Run, tyro.conf.arg(name="")]
    source: Annotated[str, tyro.conf.Suppress] = ""
    """NAME of `zoo train NAME`."""
    name: str
    """The run's folder is RUNS/NAME."""
    runs: Path = RUNS
    """The folder of runs."""
    fresh: bool = False
    """Start from the beginning, and delete what the folder holds of an earlier run."""
    yes: bool = False
    """Confirm that --fresh or --step deletes checkpoints."""
    allow_changes: bool = False
    """Resume with other settings, e.g. another learning rate, batch or text; the changes are printed and recorded."""
    step: int | None = None
    """Resume from the checkpoint of this step instead of the latest one, and delete later ones."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.runs / self.name


def parse(arguments: Sequence[str]) -> Train:
    """The spec that the arguments describe: the run that NAME stands for, changed by the flags."""
    if not arguments or arguments[0] in HELP:
        print(usage())
        sys.exit(0)
    source, *flags = arguments
    return parse_flags(Train, flags, f"zoo train {source}", default=default(source, flags), groups={Run: GROUPS})


def usage() -> str:
    """The help of `zoo train` without a name."""
    runs = "\n".join(f"  {run.name:16} {run.summary}" for run in catalog.read().runs)
    return f"""usage: zoo train NAME [--name FOLDER] [--fresh] [--step N] [--SETTING VALUE ...]

{inspect.getdoc(Train)}

NAME is one of
  a run or model by name (`zoo list`); a model starts from random weights
  the folder of a run, which is resumed, or extended by --steps (`zoo train runs/my_book --steps 2000`)
  a file of your own that defines a Run: my_run.py, my_run.py:NAME, or my_run.json (docs/training.md)
  pretrained weights: a Hugging Face folder, a .gguf file, or a name on the hub
    (`zoo train HuggingFaceTB/SmolLM2-135M --data.source my_book.txt --name my_book`)

runs:
{runs}

`zoo train NAME --help` shows every setting of a run and its value."""


def default(source: str, flags: Sequence[str] = ()) -> Train:
    """What `zoo train SOURCE` does without flags except those that select how SOURCE is read."""
    path = Path(source)
    if is_run(path) or ("/" in source and is_named(path)):
        return Train(run=Folder(path).run(), source=source, name=path.name, runs=path.parent)
    if configs.files.is_run_file(source):
        return Train(run=configs.get_run(source), source=source, name=configs.files.run_name(source))
    reading = parse_some(SourceFlags, flags)
    if source in configs.MODELS:
        run = reading.run(source, devices=jax.device_count(), accelerator=jax.default_backend() != "cpu")
    else:
        run = reading.run(source)
    return Train(run=run, source=source, name=path.name.removesuffix(".gguf"))


def run(spec: Train) -> None:
    """Trains, and prints what to do next."""
    folder = spec.folder
    if (text := random_weights_note(spec)) and not processes.quiet():
        print(text, file=sys.stderr)
    options = {"fresh": spec.fresh, "allow_changes": spec.allow_changes, "step": spec.step}
    loop.train(spec.run, folder, yes=spec.yes or _confirmed(spec), **options)
    prompt = spec.run.prompt.strip() or "The "
    program = "zoo" if shutil.which("zoo") else os.path.relpath(sys.argv[0])
    print(f"\nTry next:\n  {shlex.join([program, 'generate', str(folder)])} --prompt {shlex.quote(prompt)}")
    if spec.run.data.source == ("shakespeare",):
        print(f"  {program} train shakespeare --data.source my_text.txt --prompt 'Once' --name my_text")


def random_weights_note(spec: Train) -> str:
    """For a named model that starts from random weights, the command that starts from pretrained ones."""
    if spec.source not in configs.MODELS or spec.run.weights or step_folders.steps(Folder(spec.folder).checkpoints):
        return ""
    text = f"note: {spec.source} starts from random weights."
    if spec.source in REPOSITORIES:
        text += f" `zoo train {REPOSITORIES[spec.source]}` starts from the pretrained ones."
    return text


def _confirmed(spec: Train) -> bool:
    """Asks in a terminal whether checkpoints may be deleted; elsewhere --yes is required."""
    saved = step_folders.steps(Folder(spec.folder).checkpoints)
    deleted = [step for step in saved if spec.fresh or (spec.step is not None and step > spec.step)]
    if not deleted or not sys.stdin.isatty() or jax.distributed.is_initialized():
        return False
    steps = ", ".join(map(str, deleted))
    answer = input(f"This deletes the checkpoints of {spec.folder} (step {steps}). Continue? [y/N] ")
    return answer.lower() in ("y", "yes")

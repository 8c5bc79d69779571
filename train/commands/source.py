"""The MODEL that a command reads: a named model or run, a run's folder, a file with a run, or a checkpoint."""

import sys
from dataclasses import dataclass
from pathlib import Path

from ... import configs, zoo
from ...configs.models.hub import REPOSITORIES
from ...configs.run import Run
from ...zoo.decoder import Decoder
from ...zoo.families import registry
from ...zoo.formats.load import is_run
from ..distributed import processes
from ..runs.folder import Folder, is_named

HELP = """A named model or run (see `zoo list`), the folder of a run, a file that defines a run, or a checkpoint: a
Hugging Face folder, a .gguf file, or a name on the Hugging Face hub (org/name)."""


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """How the config of a checkpoint is read."""

    ignore: tuple[str, ...] = ()
    """Fields of the checkpoint's config (keys, for a .gguf file) that are unknown here and that change nothing."""
    text_only: bool = False
    """Read the text model of a multimodal checkpoint."""

    def read(self, *names: str) -> list[Decoder | Run]:
        """The model or run of each name; no weights are read. Raises ValueError if a name is unknown."""
        if not any(map(is_checkpoint, names)):
            self.check_unused(names[0])
        return [self._read(name) for name in names]

    def _read(self, name: str) -> Decoder | Run:
        if is_checkpoint(name):
            return registry.read(zoo.open_source(name, ignore=self.ignore, text_only=self.text_only).config)
        if is_run(name):
            return Folder(Path(name)).run()
        return configs.get_run(name) if configs.files.is_run_file(name) else configs.get(name)

    def run(self, name: str, *, devices: int = 1, accelerator: bool = False) -> Run:
        """The run that `zoo train NAME` starts or resumes, with the defaults for these devices."""
        if not is_checkpoint(name):
            self.check_unused(name)
        if is_run(name):
            return Folder(Path(name)).run()
        reading = {"ignore": self.ignore, "text_only": self.text_only}
        return configs.get_run(name, devices=devices, accelerator=accelerator, **reading)

    def check_unused(self, name: str) -> None:
        """Raises ValueError if a flag is set, for a source that is not a checkpoint."""
        if self.ignore or self.text_only:
            raise ValueError(f"--ignore and --text-only are for checkpoints, and {name} is not one; leave them out")


def is_checkpoint(name: str) -> bool:
    """Whether a name is that of a checkpoint, or of none of the others and has the form of a path or hub name."""
    if is_run(name) or configs.files.is_run_file(name):
        return False
    return Path(name).exists() or "/" in name or name.endswith(".gguf")


def located(name: str) -> str:
    """Where the weights of a name are: the name itself, or the hub repository of a named model.

    Raises ValueError, with similar names, if neither a file, a run nor a model has this name.
    """
    path = Path(name)
    if not path.exists() and name in REPOSITORIES:
        if not processes.quiet():
            print(f"{name} is {REPOSITORIES[name]} on the Hugging Face hub", file=sys.stderr)
        return REPOSITORIES[name]
    if not path.exists() and name in configs.RUNS:
        raise ValueError(f"{name} is a run to train: `zoo train {name}` first, then use runs/{name}")
    if not path.exists() and path.name == name and path.suffix != ".gguf":
        raise configs.unknown_name(name, tuple(f"runs/{run.parent.name}" for run in Path("runs").glob("*/config.json")))
    if is_named(path):
        Folder(path).run()  # the error for a mistyped run lists the runs beside it
    return name

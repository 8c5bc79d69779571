"""The folder of a run: its config, tokenizer, metrics, checkpoints and report."""

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from ...configs.run import Run
from ...layers.spec import unknown
from ...zoo.decoder import Decoder, DecoderModel
from ...zoo.formats.hugging_face import CheckpointFolder
from ...zoo.formats.load import is_run
from ...zoo.formats.save import ModelSource, write_description
from ...zoo.formats.source import Source
from ...zoo.formats.text_ends import end_ids
from ...zoo.formats.tokenizer_file import read_tokenizer_file
from ...zoo.parameters import describe, merge, shardings
from ..checkpoints import step_folders
from ..checkpoints.checkpoints import LOCK, Checkpoints
from ..data.tokenizer import ends
from ..distributed import mesh as meshes
from ..distributed import processes
from . import changes

VISIBLE = 30.0
"""Seconds that a shared disk may take to show one machine what another one wrote."""


def _is_run(path: Path) -> bool:
    with contextlib.suppress(ValueError, OSError):
        return is_run(path)
    return False


def is_named(path: Path) -> bool:
    """Whether this is the folder of a run, or a mistyped one.

    What is not there is one where its parent is a folder, or is called what `zoo train` calls it.
    """
    if path.exists():
        return is_run(path)
    return path.suffix != ".gguf" and (path.parent.is_dir() or path.parent.name == "runs")


@dataclass(frozen=True)
class Folder:
    """Paths and contents of `runs/<name>/`."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def config(self) -> Path:
        """The run as JSON."""
        return self.path / "config.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer the run was trained with."""
        return self.path / "tokenizer.json"

    @property
    def description(self) -> Path:
        """Of a run that started from pretrained weights: their config, chat template and companions."""
        return self.path / "pretrained"

    @property
    def described(self) -> CheckpointFolder | None:
        """What is in `description`; None where the run started from random parameters."""
        return CheckpointFolder(self.description) if self.run().weights and self.description.is_dir() else None

    def run(self) -> Run:
        """The run this folder holds. Raises ValueError where it holds none, or one that this version can't read."""
        if not self.config.is_file():
            nearby = sorted(p.name for p in self.path.parent.glob("*") if _is_run(p))
            if nearby:
                raise unknown(f"run in {self.path.parent}", self.path.name, nearby)
            raise ValueError(f"{self.path} holds no run: it has no config.json; `zoo train NAME` makes one")
        try:
            return Run.from_dict(json.loads(self.config.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.config} can't be read: {error}") from error

    @contextlib.contextmanager
    def starting(self, *, fresh: bool = False, confirmed: bool = False) -> Iterator[Callable[[], None]]:
        """A start of a run in this folder; the function it yields is called when the start has succeeded.

        Until then an error restores the folder: what the start created is removed, what it replaced comes back.

        Args:
            fresh: put the earlier run aside; it is deleted when the start has succeeded.
            confirmed: checkpoints may be deleted.

        Raises:
            ValueError: `fresh` would delete checkpoints and is not confirmed.
            SaveFailed: `fresh`, and another job writes to the folder.
        """
        created = [path for path in (self.path, *self.path.parents) if not path.exists()]
        if fresh and processes.first(self.config.is_file):
            processes.first(lambda: self._check_confirmed(confirmed))
            with Checkpoints(self.checkpoints):  # raises where another job writes
                processes.first(self._set_aside)
        before = {*self.path.rglob("*")} if self.path.is_dir() else set[Path]()
        texts = {path: path.read_bytes() for path in (self.config, self.path / changes.FILE) if path.is_file()}
        succeeded = False

        def succeed() -> None:
            nonlocal succeeded
            succeeded = True
            if processes.writes():
                shutil.rmtree(self._replaced, ignore_errors=True)

        try:
            yield succeed
        except BaseException:
            if not succeeded and processes.writes():
                self._restore(created, before, texts)
            raise

    @property
    def _replaced(self) -> Path:
        return self.path / ".replaced"

    def _check_confirmed(self, confirmed: bool) -> None:
        saved = step_folders.steps(self.checkpoints)
        if saved and not confirmed:
            raise ValueError(
                f"{self.path} has checkpoints up to step {saved[-1]}, which --fresh deletes; confirm it with --fresh "
                "--yes, or choose another --name"
            )

    def _set_aside(self) -> None:
        """Moves everything into `.replaced`, inside the folder: it may be a link, or the root of a disk."""
        entries = [path for path in self.path.iterdir() if path != self._replaced]
        if self._replaced.exists() and not step_folders.steps(self.checkpoints):
            for path in entries:  # of an earlier fresh start that was killed before its first step
                _remove(path)
            return
        shutil.rmtree(self._replaced, ignore_errors=True)
        self._replaced.mkdir()
        for path in entries:
            path.rename(self._replaced / path.name)

    def _restore(self, created: list[Path], before: set[Path], texts: dict[Path, bytes]) -> None:
        with contextlib.suppress(OSError):
            new = {*self.path.rglob("*")} - before
            for path in sorted(new, key=lambda path: len(path.parts), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            for path, text in texts.items():
                path.write_bytes(text)
            if self._replaced.is_dir():
                for path in [*self._replaced.iterdir()]:
                    path.rename(self.path / path.name)
                self._replaced.rmdir()
            for path in created:
                path.rmdir()

    def open(self, run: Run, *, allow_changes: bool = False) -> Checkpoints:
        """Opens the checkpoints of the folder for `run`: no other job writes here until they are closed.

        A run that has no checkpoint yet may be replaced by another one: a mistake in the first command is corrected by
        the second.

        Raises:
            ValueError: the folder holds a run with other settings (see `changes.check`), or other files; or a process
                of this job sees another folder.
            SaveFailed: another job writes to the folder.
        """
        processes.first(self._make)
        with contextlib.ExitStack() as opened:
            checkpoints = opened.enter_context(Checkpoints(self.checkpoints, keep_last=run.keep_last))
            processes.first(lambda: self._check_changes(run, allow_changes))
            self._check_shared()
            opened.pop_all()
        return checkpoints

    def _make(self) -> None:
        if not self.config.is_file() and self.path.is_dir():
            ours = {self._replaced}
            if not step_folders.steps(self.checkpoints):
                ours |= {_aside(self.config), self.checkpoints}
            if (self.checkpoints / LOCK).is_file():  # a start that was killed
                ours |= {self.tokenizer, _aside(self.tokenizer), self.description}
            if set(self.path.iterdir()) - ours:
                raise ValueError(f"{self.path} holds other files than a run's; choose another --name")
        self.path.mkdir(parents=True, exist_ok=True)

    def _check_changes(self, run: Run, allow: bool) -> None:
        if step_folders.steps(self.checkpoints):
            changes.check(self.path, self.run(), run, allow=allow)

    def _check_shared(self) -> None:
        """Raises ValueError where a process sees another folder than the first one does: a disk of its own machine."""
        lock = self.checkpoints / LOCK

        def mark() -> str:
            lock.write_text(secrets.token_hex(8), encoding="utf-8")
            return lock.read_text(encoding="utf-8")

        if jax.process_count() == 1:
            return
        told, deadline = processes.first(mark), time.monotonic() + VISIBLE
        while not (seen := lock.is_file() and lock.read_text(encoding="utf-8") == told) and time.monotonic() < deadline:
            time.sleep(0.1)
        others = [str(index) for index, each in enumerate(processes.gather(seen)) if not each]
        if others:
            raise ValueError(
                f"all processes of a run write to one folder, but process {', '.join(others)} does not see what "
                f"process 0 wrote to {self.path.absolute()}; put --runs on a disk that all machines share"
            )

    def write(self, run: Run) -> None:
        """Writes the config, whole or not at all."""
        _write(self.config, json.dumps(run.to_dict(), indent=2) + "\n")

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Writes the tokenizer, whole or not at all."""
        _write(self.tokenizer, tokenizer.to_str(pretty=True))

    def write_pretrained(self, tokenizer: Tokenizer, source: Source | CheckpointFolder | None) -> None:
        """Writes what belongs to the weights that the run starts from, in place of what may be there."""
        self.write_tokenizer(tokenizer)
        shutil.rmtree(self.description, ignore_errors=True)
        if source is not None:
            self.description.mkdir()
            write_description(source, self.description)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _aside(path: Path) -> Path:
    return path.with_suffix(".new")


def _write(path: Path, text: str) -> None:
    _aside(path).write_text(text, encoding="utf-8")
    _aside(path).replace(path)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    mesh: str | Mesh | Callable[[Decoder], Mesh] | None = None,
    dtype: Any = None,
) -> tuple[DecoderModel, Tokenizer]:
    """The model and tokenizer of a trained run, from its latest whole checkpoint (or the one of `step`).

    Args:
        path: the run's folder, e.g. "runs/shakespeare".
        step: of the checkpoint; the latest by default.
        mesh: to place the parameters on, its axes and sizes, e.g. "fsdp=4", or a function from the model's spec to a
            mesh; one device by default.
        dtype: of the parameters; float32, as they were trained, by default.

    Raises:
        ValueError: where there is no run, or its checkpoint does not fit or is damaged.
    """
    folder = Folder(Path(path))
    run = folder.run()
    abstract = run.model.abstract()
    described = describe(abstract)
    if mesh is None or isinstance(mesh, str):
        devices = meshes.for_parameters(run.model, mesh or "")
    else:
        devices = mesh if isinstance(mesh, Mesh) else mesh(run.model)
    places = shardings(described, devices)
    target = {
        name: jax.ShapeDtypeStruct(known.shape, known.dtype, sharding=places[name]) for name, known in described.items()
    }
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        parameters = checkpoints.restore_subtree("ema" if run.ema else "params", target, step)
    if dtype is not None:
        parameters = {name: array.astype(dtype) for name, array in parameters.items()}
    return merge(abstract, parameters), read_tokenizer_file(folder.tokenizer)


@dataclass(frozen=True)
class RunText:
    """What a run's folder says about its text: the part of a `CheckpointFolder` that needs no weights."""

    config: dict[str, Any]
    companions: dict[str, Path]
    chat_template: str | None
    special_tokens: bool
    """Whether text that spells a special token was read as that token."""


def text_of_run(path: str | Path) -> RunText:
    """Special tokens, companions and chat template of a run.

    The token that training puts after each document ends a text, and so do the end tokens of the pretrained weights
    that the run started from.
    """
    folder = Folder(Path(path))
    run, described = folder.run(), folder.described
    tokenizer = read_tokenizer_file(folder.tokenizer)
    begin, end = ends(tokenizer)
    if described is None:
        # The length of a model without learned positions is the one it was trained on.
        fields = {"max_position_embeddings": run.length, "bos_token_id": begin, "eos_token_id": end}
        return RunText(fields, {}, None, run.data.special_tokens)
    ids = [*dict.fromkeys((end, *end_ids(described, tokenizer)))]
    config = described.config | {"eos_token_id": ids if len(ids) > 1 else end}
    return RunText(config, described.companions, described.chat_template, run.data.special_tokens)


def open_run(path: str | Path) -> ModelSource:
    """The checkpoint of a run as a source, with the config, companions and chat template of `text_of_run`."""
    model, tokenizer = load(path)
    return ModelSource(
        model, tokenizer=tokenizer, config=text_of_run(path).config, described=Folder(Path(path)).described
    )

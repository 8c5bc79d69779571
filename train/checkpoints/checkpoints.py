"""Checkpoints of a training job: saved in the background, whole or absent, checked before they are used.

A folder holds one sub-folder per step, `400/`: the arrays (`state/`), what is not an array (`extra.json`) and the
checksums of all files (`manifest.json`). It is written as `400.partial/` and renamed once every byte of it is on disk,
so a folder with a number for a name is whole, whenever the job was killed.
"""

import contextlib
import errno
import fcntl
import json
import logging
import math
import operator
import os
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax

from ..distributed import processes
from . import array_store, manifest, step_folders
from .array_store import required_bytes
from .step_folders import SaveFailed, check_space

__all__ = ["Checkpoints", "DamagedCheckpoint", "SaveFailed", "check_space", "required_bytes"]

LOCK = ".lock"
"""The file that the job which writes to a folder holds a lock on."""

_log = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
    """The files of a checkpoint are not those that were saved: `step`, and `previous`, the last whole step or None."""

    def __init__(self, folder: Path, step: int, damage: manifest.Damage, previous: int | None) -> None:
        way_out = (
            "no other checkpoint there is whole: start the run anew in another folder"
            if previous is None
            else f"the last whole one is step {previous}: "
            f"{step_folders.command(folder, '--step', str(previous), '--yes')} deletes later ones and continues"
        )
        super().__init__(f"the checkpoint of step {step} in {folder} is damaged: {damage}; {way_out}")
        self.step = step
        self.previous = previous


class Checkpoints:
    """The checkpoints of one run, of which `keep_last` latest and `keep_best` of the lowest loss stay.

    Saving step s makes it the latest one: checkpoints of later steps, left behind when a run was resumed from before
    them, are deleted once s is whole. Opening for writing takes a lock and clears away what a killed job left half
    done. Use it in a `with` statement, or close it: Python starts no thread once a program ends, so a save that nobody
    waited for is then lost. With several processes each one calls every method; the first one names, seals and deletes
    the folders.

    Raises SaveFailed where the folder cannot be made or written, or another job writes to it.
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_best: int = 1, read_only: bool = False) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last >= 1 and keep_best >= 0, got keep_last={keep_last}, keep_best={keep_best}")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.read_only = read_only
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._unlock: Callable[[], Any] = lambda: None
        if not read_only:
            processes.first(self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return processes.first(lambda: step_folders.steps(self.folder))

    def save(
        self, step: int, state: Any, extra: dict[str, Any], *, loss: float | None = None, wait: bool = False
    ) -> None:
        """Save `state` (a pytree of jax arrays) and `extra` (JSON data) as `step`; returns when both are copied.

        The state may be donated right after. Writing goes on in the background, unless `wait`; an earlier save that
        still runs is waited for. `loss` is that on held-out text, for keep-best. Raises SaveFailed for this save or
        the one before, ValueError for a state that is not arrays or an `extra` that is not JSON.
        """
        if self.read_only:
            raise ValueError(f"{self.folder} was opened with read_only=True: open it without to save step {step}")
        if (step := operator.index(step)) < 0:
            raise ValueError(f"a step is 0 or more, got {step}")
        try:
            text = json.dumps(extra, indent=1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`extra` must be plain JSON data (numbers, strings, lists, dicts): {error}") from error
        facts = {"step": step, "loss": None if loss is None else float(loss), "leaves": array_store.describe(state)}
        self._join()
        partial = step_folders.partial(self.folder, step)
        need = required_bytes(state)
        doing = f"save the checkpoint of step {step}"

        def begin() -> None:
            if need > step_folders.free(self.folder):
                raise SaveFailed(step_folders.report(doing, self.folder, need, "no space left on the device"))
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

        try:
            processes.first(begin)
            arrays_written = array_store.start(partial / "state", state)
        except Exception as error:  # Orbax reports a full disk as a ValueError
            raise self._failed(doing, partial, need, error) from error
        self._writer = threading.Thread(
            target=self._write, args=(step, arrays_written, text, facts, need), name=f"checkpoint {step}"
        )
        self._writer.start()
        if wait:
            self.wait()

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        self._join()

        def delete() -> None:
            for later in [s for s in step_folders.steps(self.folder) if s > step]:
                step_folders.delete(self.folder / str(later))

        processes.first(delete)

    def wait(self) -> None:
        """Return when the last save is whole, for every process; raises SaveFailed where it failed."""
        self._join()
        processes.gather(None)  # the first process gives the folder its name

    def close(self) -> None:
        """Wait for the last save and let others write to the folder; raises SaveFailed where it failed."""
        try:
            self._join()
        finally:
            self._unlock()

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """The `extra` that was saved with `step` (None: the latest). Raises as `restore` does."""
        step, facts = self._facts(step)
        self._verify(step, facts, lambda name: name == "extra.json")
        return self._extra(step)

    def restore(self, target: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The state and `extra` of `step` (None: the latest), after its checksums were verified.

        `target` is the tree of `jax.ShapeDtypeStruct`s (or arrays) to restore into; their shardings may be of any mesh,
        and a leaf without one comes back uncommitted. Raises DamagedCheckpoint, or ValueError where there is no such
        checkpoint or `target` has other paths, shapes or dtypes.
        """
        step, facts = self._facts(step)
        array_store.compare(facts["leaves"], target, f"the checkpoint of step {step} in {self.folder}")
        self._verify(step, facts, lambda name: True)
        return array_store.load(self.folder / str(step) / "state", target), self._extra(step)

    def restore_subtree(self, key: str, target: Any, step: int | None = None) -> Any:
        """One top-level entry of the state, e.g. "params"; nothing else is read from disk. Raises as `restore` does."""
        step, facts = self._facts(step)
        leaves = {name: leaf for name, leaf in facts["leaves"].items() if name.split("/")[0] == key}
        if not leaves:
            names = sorted({name.split("/")[0] for name in facts["leaves"]})
            raise ValueError(f"the checkpoint of step {step} in {self.folder} has {', '.join(names)}, but no {key!r}")
        array_store.compare(leaves, {key: target}, f"{key!r} of the checkpoint of step {step} in {self.folder}")
        self._verify(step, facts, lambda name: name.startswith(f"state/{key}/") or name.count("/") == 1)
        return array_store.load(self.folder / str(step) / "state", {key: target})[key]

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            self._unlock = weakref.finalize(self, os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                warnings.warn(f"{self.folder} has no file locks: let only one job write there", stacklevel=3)
            step_folders.clear(self.folder)
        except BlockingIOError:
            self._unlock()
            raise SaveFailed(
                f"{self.folder} is being written to by another job, or by a Checkpoints that was not closed: "
                "wait for it, choose another folder, or open this one with read_only=True"
            ) from None
        except OSError as error:
            self._unlock()
            raise SaveFailed(
                step_folders.report("write checkpoints", self.folder, None, step_folders.cause(error))
            ) from error

    def _write(
        self, step: int, arrays_written: Callable[[], None], extra: str, facts: dict[str, Any], need: int
    ) -> None:
        """In the background: once the arrays are written, complete the folder, give it its name, delete old ones."""
        partial = step_folders.partial(self.folder, step)
        doing = f"save the checkpoint of step {step}"
        try:
            arrays_written()
            if processes.writes():
                (partial / "extra.json").write_text(extra, encoding="utf-8")
                manifest.seal(partial, facts)
                step_folders.publish(self.folder, step)
                doing = f"delete old checkpoints (that of step {step} is saved)"
                self._delete_old(step)
        except Exception as error:  # whatever it is must reach the thread that trains
            self._error = self._failed(doing, partial, need, error)
            self._error.__cause__ = error
            if not threading.main_thread().is_alive():  # nobody is left to raise it to
                _log.error("%s (the program ended before the save did: use `with Checkpoints(...)`)", self._error)

    def _delete_old(self, latest: int) -> None:
        steps = [step for step in step_folders.steps(self.folder) if step <= latest]
        losses = {}
        for step in steps:
            with contextlib.suppress(manifest.Damage):
                losses[step] = manifest.read(self.folder / str(step))["loss"]
        known = [step for step in losses if losses[step] is not None and math.isfinite(losses[step])]
        best = sorted(known, key=lambda step: (losses[step], -step))[: self.keep_best]
        for step in step_folders.steps(self.folder):
            if step not in {*best, *steps[-self.keep_last :]}:
                step_folders.delete(self.folder / str(step))

    def _join(self) -> None:
        """Wait for the background save; raise what went wrong in it, once."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _failed(self, doing: str, partial: Path, need: int, error: Exception) -> SaveFailed:
        message = step_folders.report(
            doing, self.folder, need, step_folders.cause(error)
        )  # before the half-written files are gone
        if processes.writes():
            shutil.rmtree(partial, ignore_errors=True)
        return error if isinstance(error, SaveFailed) else SaveFailed(message)

    def _facts(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """A step and its manifest, as the first process sees them: another may see the folder as it was before."""
        self._join()

        def read() -> tuple[int, dict[str, Any]]:
            steps = step_folders.steps(self.folder)
            if step is None and not steps:
                raise ValueError(f"there is no whole checkpoint in {self.folder}, so there is nothing to restore")
            chosen = steps[-1] if step is None else step
            if chosen not in steps and not (self.folder / str(chosen)).exists():
                raise ValueError(f"{self.folder} has checkpoints of the steps {steps}, but none of step {chosen}")
            try:
                return chosen, manifest.read(self.folder / str(chosen))
            except manifest.Damage as damage:
                raise DamagedCheckpoint(self.folder, chosen, damage, self._whole_besides(chosen)) from damage

        chosen, facts = processes.first(read)
        return chosen, facts

    def _verify(self, step: int, facts: dict[str, Any], wanted: Callable[[str], bool]) -> None:
        """Each process reads a share of the files; what one of them finds damaged, all raise."""
        names = [name for name in facts["files"] if wanted(name)]
        share = {*names[jax.process_index() :: jax.process_count()]}
        try:
            manifest.verify(self.folder / str(step), facts["files"], share.__contains__)
            problem = None
        except manifest.Damage as damage:
            problem = damage.file, damage.problem
        found = next(filter(None, processes.gather(problem)), None)
        if found is not None:
            damage = manifest.Damage(*found)
            raise DamagedCheckpoint(self.folder, step, damage, self._whole_besides(step)) from damage

    def _extra(self, step: int) -> dict[str, Any]:
        return processes.first(lambda: json.loads((self.folder / str(step) / "extra.json").read_text(encoding="utf-8")))

    def _whole_besides(self, damaged: int) -> int | None:
        """The last step that verifies: of those before the damaged one, else of all."""
        steps = step_folders.steps(self.folder)[::-1]
        for step in [s for s in steps if s < damaged] + [s for s in steps if s > damaged]:
            folder = self.folder / str(step)
            with contextlib.suppress(manifest.Damage):
                manifest.verify(folder, manifest.read(folder)["files"])
                return step
        return None

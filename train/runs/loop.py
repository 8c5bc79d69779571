"""The training loop: from a run to a folder with a trained model."""

import contextlib
import functools
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib._jax import Device
from rich.console import Console

from ... import zoo
from ...configs.run import Run
from ...zoo.decoder import refuse_64_bits
from ...zoo.parameters import describe, merge, shardings
from ...zoo.text_encoding import encode, unescaped
from .. import data as datasets
from ..checkpoints import step_folders
from ..checkpoints.checkpoints import Checkpoints, check_space
from ..checkpoints.step_folders import cause, command, free
from ..data.cache import CacheError
from ..distributed import hardware, processes
from ..distributed import mesh as meshes
from ..distributed import watchdog as roll
from ..distributed.signals import Interrupted, Signals
from ..step import State, abstract_state, all_finite, best_parameters, initial_state, make_evaluation, make_step
from . import changes, report
from .compilation_cache import use_compilation_cache
from .folder import Folder
from .metrics import NullRecorder, Recorder
from .pretrained import Pretrained, open_pretrained
from .progress import ProgressDisplay, amount, duration, memory_size, replace_unencodable


class Diverged(ValueError):
    """Loss, gradient or parameters were not finite too many times in a row."""


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    folder: Path
    step: int
    loss: float
    heldout_bits_per_byte: float | None
    tokens_per_second: float


def train(
    run: Run,
    folder: str | Path,
    *,
    fresh: bool = False,
    yes: bool = False,
    allow_changes: bool = False,
    step: int | None = None,
    console: Console | None = None,
    devices: list[Device] | None = None,
) -> Result:
    """Trains a run in its folder, going on from the latest whole checkpoint there is.

    Where there are several processes (`cluster.joined`), each calls it alike, and the first one writes.

    Args:
        run: what to train.
        folder: where everything goes, e.g. "runs/shakespeare".
        fresh: start from the beginning, and delete what the folder holds of an earlier run once the first step is done.
        yes: checkpoints may be deleted, by `fresh` or by `step`.
        allow_changes: resume also with other settings of what is learned; the changes are printed and recorded.
        step: resume from the checkpoint of this step, and delete later ones.
        console: where progress is shown; the terminal by default.
        devices: to train on; all by default.

    Raises:
        ValueError: on settings that do not fit each other, the data or the devices; a damaged checkpoint; divergence.
        OSError: where something can't be written.
        Interrupted: after SIGTERM or Ctrl-C, when the state is saved.
    """
    refuse_64_bits()
    if fresh and step is not None:
        raise ValueError(f"fresh starts anew and step={step} goes on from a checkpoint: leave out one of them")
    options = {"fresh": fresh, "yes": yes, "allow_changes": allow_changes, "step": step}
    settings = run.flat() | {"folder": folder} | options
    processes.check_same({name: f"{value}" for name, value in settings.items()})
    place = Folder(Path(folder))
    mesh, devices_line = meshes.make(run, devices)
    with (
        with_disk_advice(place.path),
        roll.advised(lambda: step_folders.saved(place.checkpoints)),
        place.starting(fresh=fresh, confirmed=yes) as started,
        place.open(run, allow_changes=allow_changes) as checkpoints,
    ):
        _check_step(place, checkpoints.steps(), step, confirmed=yes)
        use_compilation_cache()
        console = (console or Console()) if processes.writes() else Console(quiet=True)
        replace_unencodable(console.file)
        with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
            job = Job.prepare(run, place, checkpoints, mesh, devices_line, console, step, allow_changes=allow_changes)
            with contextlib.closing(job):
                return job.go(started)


def _check_step(folder: Folder, saved: list[int], step: int | None, *, confirmed: bool) -> None:
    """Raises ValueError where there is no checkpoint to resume from, or later ones would be deleted unconfirmed."""
    if step is None:
        return
    if not saved:
        raise ValueError(f"{folder.path} has no checkpoint of step {step}, nor any other; leave out --step to start")
    later = [f"{other}" for other in saved if other > step]
    if step in saved and later and not confirmed:
        raise ValueError(
            f"--step {step} deletes the later checkpoints of {folder.path} (step {', '.join(later)}); confirm it with "
            f"--step {step} --yes"
        )


@contextlib.contextmanager
def with_disk_advice(folder: Path) -> Iterator[None]:
    """Says what to do about an error of the disk, where the error itself does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, CacheError | BrokenPipeError):
            raise
        file = f"{error.filename or folder}"
        raise OSError(
            f"cannot write {file}: {cause(error)}; {free(folder):,} bytes are free there. Free space there, make it "
            f"writable, or choose another --runs folder; what is saved stays, and {command(folder)} continues from it"
        ) from error


def _load_data(run: Run, folder: Folder, mesh: Mesh, console: Console, *, verify: bool) -> datasets.Batches:
    """The text in batches, by the tokenizer in the run's folder where it has weights or checkpoints."""
    own = run.weights or processes.first(lambda: bool(step_folders.steps(folder.checkpoints)))
    data = run.data.replace(tokenizer=str(folder.tokenizer)) if own else run.data
    with console.status("reading the data ...") as status:

        def progress(done: int, total: int | None) -> None:
            status.update(f"reading the data: {amount(done, 'B')}" + (f" of {amount(total, 'B')}" if total else ""))

        batches = datasets.load(
            data,
            vocab=run.model.vocab,
            length=run.length,
            batch=run.batch,
            seed=run.seed,
            own=meshes.rows(mesh, run.batch),
            verify=verify,
            progress=progress,
        )
    processes.check_same({"text": f"{batches.order} {batches.describe()}"})
    return batches


def _other_data(iterator: Any, saved: dict[str, Any], changed: changes.Differences, allow: bool) -> str:
    """Why the saved place in the data has no meaning now; nothing where it has, or where that is an error."""
    own = iterator.get_state()
    if all(own[name] == saved.get(name) for name in own if name != "step"):
        return ""
    if changes.reads_other_data(changed):
        return "settings of the data changed"
    return "the text is not what it was" if allow else ""


def _first_state(run: Run, mesh: Mesh, pretrained: Pretrained | None, console: Console) -> State:
    if pretrained is None:
        return initial_state(run, mesh)
    with console.status("reading the weights ...") as status:

        def progress(done: int, total: int) -> None:
            status.update(f"reading the weights: {memory_size(done)} of {memory_size(total)}")

        return initial_state(run, mesh, pretrained.parameters(mesh, progress))


@dataclass
class Job:
    """A run under way."""

    run: Run
    folder: Folder
    mesh: Mesh
    devices: str
    state: State
    batches: datasets.Batches
    iterator: Any
    checkpoints: Checkpoints
    recorder: Recorder | NullRecorder
    board: ProgressDisplay
    last: dict[str, float] = field(default_factory=dict)
    saved: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    """Seconds of the latest steps."""
    opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    started: Callable[[], None] = lambda: None
    """Called when a step is done: from then on an error keeps what the run wrote."""

    @functools.cached_property
    def evaluation(self) -> Any:
        """The jitted likelihood of a batch."""
        return make_evaluation(self.run)

    @classmethod
    def prepare(
        cls,
        run: Run,
        folder: Folder,
        checkpoints: Checkpoints,
        mesh: Mesh,
        devices: str,
        console: Console,
        step: int | None,
        *,
        allow_changes: bool = False,
    ) -> "Job":
        """Loads the data, and makes or restores the state."""

        def say(text: str) -> None:
            console.print(text, soft_wrap=True, highlight=False)

        pretrained = open_pretrained(run) if run.weights and not checkpoints.steps() else None
        if pretrained is not None:
            processes.first(lambda: folder.write_pretrained(pretrained.tokenizer, pretrained.described))
        batches = _load_data(run, folder, mesh, console, verify=bool(checkpoints.steps()))
        size, unused = sum(known.size for known in describe(run.model.abstract()).values()), run.model.unused()
        parameters = f"{amount(size)} parameters" + (f", {amount(size - unused)} active" if unused else "")
        say(f"model   {parameters}, {amount(3 * run.model.flops(run.length), 'FLOP')} a trained token")
        if run.weights:
            say(f"weights {run.weights}")
        say(f"data    {batches.describe()}")
        say(f"devices {devices}")
        with contextlib.ExitStack() as opened:
            iterator = opened.enter_context(contextlib.closing(batches.train()))
            shapes = abstract_state(run, mesh)
            start = 0
            if checkpoints.steps():
                state, extra = checkpoints.restore(shapes, step)
                start = int(state["step"])
                if start > run.steps:
                    raise ValueError(
                        f"the run is at step {start} already, got steps={run.steps}; --steps extends a run, and --step "
                        "resumes it from an earlier checkpoint"
                    )
                say(f"resumed from the checkpoint of step {start}")
                before = Run.from_dict(extra["config"])
                changed = changes.differences(before, run)
                if changed:
                    say(changes.describe(changed, before, run, start, start - int(state["skipped"])))
                if other_data := _other_data(iterator, extra["data"], changed, allow_changes):
                    say(f"the data starts at its beginning: {other_data}")
                else:
                    iterator.set_state(extra["data"])
                if step is not None:
                    checkpoints.drop_after(step)
                processes.first(lambda: changes.History(folder.path).write(start, changed))
            else:
                processes.first(lambda: check_space(folder.checkpoints, shapes, run.keep_last + 2))
                state = _first_state(run, mesh, pretrained, console)
                if pretrained is None:
                    processes.first(lambda: folder.write_tokenizer(batches.tokenizer))
            processes.first(lambda: folder.write(run))
            recorder = opened.enter_context(
                contextlib.closing(Recorder(folder.path, start) if processes.writes() else NullRecorder())
            )
            board = ProgressDisplay(run.steps, start, console)
            job = cls(run, folder, mesh, devices, state, batches, iterator, checkpoints, recorder, board)
            job.saved = start
            job.opened = opened.pop_all()
            return job

    def close(self) -> None:
        """Ends what runs in the background."""
        self.opened.close()

    def go(self, started: Callable[[], None] = lambda: None) -> Result:
        """Trains to the last step, evaluates, and writes the report; `started` is called after the first step."""
        self.started = started
        start = int(self.state["step"])
        if start == self.run.steps:
            started()
            self.board.say(f"all {start} steps are done already; --steps N extends the run")
        else:
            with self.board, Signals() as signals:
                if self.run.weights and not start:
                    self._evaluate(0)  # what training improves on
                self._loop(start, signals)
        return self._finish()

    def _loop(self, start: int, signals: Signals) -> None:
        run = self.run
        step_function = make_step(run)
        began, pending = time.perf_counter(), None
        for step, batch in self._profiled(start):
            asked = processes.largest(lambda: signals.caught, self.mesh)  # all must stop after the same step
            self.state, metrics = step_function(self.state, self._placed(batch))
            if pending:
                self._record(*pending, began)
                began = time.perf_counter()
            pending = (step, metrics)
            due = [every and step % every == 0 for every in (run.eval_every, run.sample_every, run.save_every)]
            end, caught = step == run.steps, asked()
            if any(due) or end or caught:
                self._record(*pending, began)
                pending = None
                if due[0] or end:
                    self._evaluate(step)
                if due[1] or (end and run.sample_every):
                    self._sample(step)
                if due[2] or end or caught:
                    self._save(step)
                if end or caught:
                    self.checkpoints.wait()
                if caught and not end:
                    raise Interrupted(signal.Signals(caught).name, step, self.folder.path)
                began = time.perf_counter()

    def _placed(self, batch: Any) -> dict[str, jax.Array]:
        """This process's rows of a batch as its part of the whole one, on the mesh."""
        return meshes.place(batch, self.mesh, self.batches.own, self.batches.batch)

    def _profiled(self, start: int) -> Iterator[tuple[int, Any]]:
        """Step numbers and batches, with the profiler on where the run asks for it."""
        steps = self.run.profiled
        with contextlib.ExitStack() as tracing:
            for step in range(start + 1, self.run.steps + 1):
                if step == max(start + 1, steps.start) and step in steps and processes.writes():
                    tracing.enter_context(jax.profiler.trace(str(self.folder.path / "profile")))
                yield step, next(self.iterator)
                if step + 1 == steps.stop:
                    jax.block_until_ready(self.state)
                    tracing.close()

    def _record(self, step: int, metrics: dict[str, jax.Array], began: float) -> None:
        """Waits for a step's metrics, writes and shows them."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - began
        if "seconds" in self.last:  # the first step took as long as its compilation
            self.recent.append(seconds)
        self.last = values | {"seconds": seconds}
        self.recorder.write(step, **self.last)
        self.started()
        if values["bad_steps"] >= self.run.max_bad_steps:
            raise Diverged(
                f"loss, gradient or parameters were not finite in {self.run.max_bad_steps} steps in a row, up to step "
                f"{step} (loss {values['loss']}, gradient norm {values['gradient_norm']}); none of them changed the "
                "model; " + self.divergence_advice()
            )
        pace = statistics.median(self.recent or [seconds])
        speed = self.run.batch * self.run.length / pace
        facts = {"loss": f"{values['loss']:.3f}", "tokens/s": amount(speed)}
        device = self.mesh.local_devices[0]
        peak = hardware.peak_flops(device)
        if peak:
            facts["MFU"] = f"{3 * self.run.model.flops(self.run.length) * speed / peak / self.mesh.size:.1%}"
        facts["memory"] = memory_size(hardware.memory_bytes(device))
        if self.recent:
            facts["left"] = duration((self.run.steps - step) * pace)
        if "max_violation" in values:
            facts["MaxVio"] = f"{values['max_violation']:.2f}"
        if values["skipped"]:
            facts["skipped"] = f"{values['skipped']:.0f}"
        self.board.update(step, facts)

    def divergence_advice(self) -> str:
        """What to try when training diverges."""
        rate, warmup = self.run.optimizer.learning_rate, self.run.optimizer.warmup_steps
        precise = "" if self.run.dtype == "float32" else ", or float32"
        return (
            f"try a lower learning rate than {rate}, a longer warmup than {warmup} steps{precise}, under another --name"
        )

    def _evaluate(self, step: int) -> None:
        if not self.batches.heldout_bytes:
            return
        parameters = best_parameters(self.state)
        sums = [self.evaluation(parameters, self._placed(batch)) for batch in self.batches.heldout()]
        bits = sum(float(nll) for nll in sums) / math.log(2) / self.batches.heldout_bytes
        self.last["heldout_bits_per_byte"] = bits
        self.recorder.write(step, heldout_bits_per_byte=bits)
        self.board.say(f"step {step}: held-out {bits:.4f} bits per byte")

    def _sample(self, step: int) -> None:
        run = self.run
        abstract, mesh = run.model.abstract(), meshes.without_stages(self.mesh)
        found = best_parameters(self.state), jax.random.fold_in(self.state["rng"], step)
        if mesh is not self.mesh:
            with jax.set_mesh(mesh):
                places = shardings(describe(abstract), mesh), NamedSharding(mesh, PartitionSpec())
                found = jax.device_put(found, places)
        parameters, key = found
        model = merge(abstract, parameters)
        tokenizer, special = self.batches.tokenizer, run.data.special_tokens
        prompt = unescaped(run.prompt)
        ids = encode(tokenizer, prompt, special_tokens=special, add_special_tokens=True)
        room = run.model.max_positions - len(ids) if run.model.max_positions else 120
        if room < 1:
            self.board.say(f"no sample: the prompt fills all {run.model.max_positions} positions of the model")
            return
        text = zoo.generate(
            model,
            tokenizer,
            [prompt],
            max_tokens=min(120, room),
            stop=(str(tokenizer.id_to_token(self.batches.separator)),),
            key=key,
            dtype=jnp.dtype(run.dtype),
            special_tokens=special,
        )[0]
        self.recorder.write_text(step, prompt + text)
        self.board.sample(step, prompt, text)

    def _save(self, step: int) -> None:
        if self.saved == step:
            return
        if not all_finite(self.state["params"]):
            raise Diverged(
                f"the parameters are not finite after step {step}, so they were not saved; {self.divergence_advice()}"
            )
        self.recorder.flush()  # what is recorded up to a checkpoint is on disk before it
        extra = {"data": self.iterator.get_state(), "config": self.run.to_dict()}
        self.checkpoints.save(step, self.state, extra, loss=self.last.get("heldout_bits_per_byte"))
        self.saved = step

    def _finish(self) -> Result:
        self.checkpoints.wait()
        known = describe(self.run.model.abstract())
        step = int(self.state["step"])
        facts = processes.first(lambda: report.summary(self.folder.path, step)) | {
            "heldout_bytes": self.batches.heldout_bytes,
            "parameters": sum(what.size for what in known.values()),
            "devices": self.devices,
            "bytes_per_token": sum(store.bytes for store in self.batches.stores) / max(1, self.batches.train_tokens),
            "data": self.batches.describe(),
        }
        facts["tokens_per_second"] = self.run.batch * self.run.length / facts["median_seconds"]
        page = processes.first(lambda: f"{report.write(self.folder.path, self.run, facts)}")
        bits = facts["heldout_bits_per_byte"]
        score = "no text was held out" if bits is None else f"held-out {bits:.4f} bits per byte"
        self.board.say(f"{score} after {facts['step']} steps; report in {page}")
        return Result(self.folder.path, facts["step"], facts["loss"], bits, facts["tokens_per_second"])

"""Layouts of a run on a slice: ranked by arithmetic, the best of them compiled."""

import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import AbstractMesh

from ...configs.run import Run
from ...layers.loss import tokens_at_a_time
from ...layers.moe.layer import MoE
from ...layers.sharding.axes import MESH_AXES, batch_partition, shard_count
from ...zoo.parameters import Description, describe, partitions
from ..distributed import mesh as meshes
from .chips import Chip, chip_of
from .plan import Plan, plan

REMATS = ("none", "dots", "full")
AXES = ("data", "fsdp", "tensor")
SHARE = 0.6
"""Of the peak that computation reaches, for the ranking alone."""
ROOMY = 0.7
"""The share of the memory up to which a layout fits surely: momentum in bfloat16 would gain it nothing."""
WORKERS = 2
"""Compilers at once: each takes one or two cores and some GiB."""


@dataclass(frozen=True)
class Guess:
    """What arithmetic says of a layout, before anything is compiled."""

    run: Run
    bytes: float
    """Of a chip's memory, about; rather less than more."""
    seconds: float
    """Of a step."""


def layouts(run: Run, chips: int, momentum: bool = False) -> Iterator[Run]:
    """The run with every mesh, recomputation and number of parts that divides its batch and parameters.

    With `momentum`, also with that of its optimizer in bfloat16, which is the one thing that changes a result.
    """
    axes = (*AXES, "expert") if any(isinstance(block.ffn, MoE) for block in run.model.all_blocks) else AXES
    for sizes in _factors(chips, len(axes)):
        text = ",".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True) if size > 1)
        text = text or f"fsdp={chips}"
        for accumulate in (n for n in range(1, run.batch + 1) if run.batch % n == 0 and n & (n - 1) == 0):
            other = run.replace(mesh=text, accumulate=accumulate)
            try:
                meshes.check(other, _abstract(other))
            except ValueError:
                continue
            others = [other, other.replace(**{"optimizer.momentum_dtype": "bfloat16"})] if momentum else [other]
            yield from (one.replace(remat=remat) for one in dict.fromkeys(others) for remat in REMATS)


def guess(run: Run, chip: Chip, known: dict[str, Description]) -> Guess:
    """The arithmetic of a layout: memory from below, time from the FLOPs, the bytes of weights and of activations."""
    mesh = _abstract(run)
    into = {axis: mesh.shape.get(axis, 1) for axis in MESH_AXES}
    splits = partitions(known, mesh)
    share = {name: math.prod(shard_count(entry, mesh) for entry in spec) for name, spec in splits.items()}
    held = sum(what.size / share[name] for name, what in known.items())
    batch, time = batch_partition(mesh)
    tokens = run.batch * run.length / run.accumulate / shard_count(batch, mesh) / shard_count(time, mesh)
    model, layers = run.model, len(run.model.all_blocks)
    # What is kept of a layer: its input; or what its matrices make, too; or twice that, with what is between.
    wide = sum(_outputs(what) / into["tensor"] for what in known.values()) / layers
    stream = model.dim / into["tensor"]
    kept = {"full": stream, "dots": stream + wide, "none": stream + 2 * wide}[run.remat]
    states = {"adamw": 2, "lion": 1, "muon": 1.5, "adafactor": 0.1, "sgd": 1}[run.optimizer.name]
    states -= 0.5 * (run.optimizer.momentum_dtype == "bfloat16")
    copies = 2 + states + bool(run.ema) + (run.accumulate > 1)  # parameters, gradients of a part, and of all parts
    memory = (4 * copies + 2) * held + 2 * tokens * kept * layers
    # Logits in float32, and their gradient in bfloat16, of the tokens that have them at a time.
    memory += 6 * min(tokens, tokens_at_a_time(model.vocab, model.dim)) * model.vocab / into["tensor"]
    forward = model.flops(run.length) * run.batch * run.length / mesh.size
    compute = forward * {"none": 3, "dots": 3.2, "full": 4}[run.remat] / (SHARE * chip.tflops * 1e12)
    # Weights are gathered twice and their gradients scattered in each part; over data, gradients are summed once.
    weights = 2 * sum(what.size / into["tensor"] for what in known.values())
    over = (into["fsdp"] > 1) * 3 * run.accumulate + (into["data"] > 1) * 2 / into["fsdp"]
    activations = (into["tensor"] > 1) * 4 * layers * run.accumulate * 2 * tokens * model.dim * 2
    moved = (weights * over + activations) / chip.sending(mesh.size, whole=True)
    return Guess(run, memory, compute + moved)


def search(
    run: Run, topology: str, say: Callable[[int, int], None], count: int = 8, *, momentum: bool = False
) -> tuple[int, list[Plan]]:
    """How many layouts there are, and the plans of the best, the fastest first.

    Args:
        run: its mesh, remat and accumulate are what is searched; nothing else changes, so neither does the result.
        topology: e.g. "v6e:2x4".
        say: is told how many are compiled, of how many.
        count: how many are compiled; where none of them fits, the next ones as well.
        momentum: whether that of the optimizer is tried in bfloat16, too, where memory is short. It changes the result.

    Raises ValueError where no layout divides the batch and the parameters, or all are too large by arithmetic alone.
    """
    chip, chips = chip_of(topology)
    known = describe(run.model.abstract())
    guesses = [guess(other, chip, known) for other in layouts(run, chips, momentum)]
    roomy = {_wide(one.run) for one in guesses if one.run == _wide(one.run) and one.bytes < ROOMY * chip.hbm}
    guesses = [one for one in guesses if one.run == _wide(one.run) or _wide(one.run) not in roomy]
    if not guesses:
        raise ValueError(f"no mesh of {chips} chips divides batch={run.batch} and the parameters of the model")
    fitting = sorted((one for one in guesses if one.bytes < chip.hbm), key=lambda one: one.seconds)
    if not fitting:
        least = min(one.bytes for one in guesses) / 2**30
        raise ValueError(
            f"no layout fits {topology}: the smallest of {len(guesses)} needs {least:.1f} GiB of "
            f"{chip.hbm / 2**30:.2f} a chip; take more chips, a smaller batch or length, or an optimizer of less state"
        )
    found: list[Plan] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        for batch in itertools.batched(fitting[: 2 * count], count):
            pending = [pool.submit(plan, one.run, topology) for one in batch]
            for done, future in enumerate(as_completed(pending), 1):
                found.append(future.result())
                say(done, len(pending))
            if any(one.fits for one in found):
                break
    return len(guesses), sorted(found, key=_order)


def _wide(run: Run) -> Run:
    return run.replace(**{"optimizer.momentum_dtype": "float32"})


def pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Those that fit and that no other one beats in both speed and memory."""
    kept: list[Plan] = []
    for one in sorted((one for one in plans if _timed(one)), key=lambda one: -one.tokens_per_second):
        if not kept or one.memory.used < kept[-1].memory.used:
            kept.append(one)
    return kept


def picture(plans: list[Plan], file: Path) -> None:
    """Draws speed against memory, by the numbers of the table; the front is joined. Needs the extra viz."""
    from matplotlib.figure import Figure  # a second of import

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    best = pareto(plans)
    others = [one for one in plans if _timed(one) and one not in best]
    for line, style, color, name in ((best, "o-", "tab:blue", "front"), (others, "o", "tab:gray", None)):
        places = [_gib(one) for one in line], [one.tokens_per_second for one in line]
        axes.plot(*places, style, color=color, label=name)
    for number, one in enumerate(plans, 1):
        if _timed(one):
            place = _gib(one), one.tokens_per_second
            axes.annotate(str(number), place, textcoords="offset points", xytext=(4, 4))
            parts = f", {one.run.accumulate} parts" if one.run.accumulate > 1 else ""
            axes.plot([], [], " ", label=f"{number}  {one.run.mesh}, {one.run.remat}{parts}")
    most = plans[0].chip.hbm / 2**30
    axes.axvline(most, color="tab:red", linestyle="--", label="memory of a chip")
    axes.set(xlabel="GiB of a chip", ylabel="tokens/s a chip", title=f"{plans[0].topology}, predicted")
    axes.set_xlim(0.95 * min(most, *map(_gib, plans)), 1.02 * most)
    axes.set_ylim(0, 1.1 * max((one.tokens_per_second for one in best), default=1.0))
    figure.legend(loc="outside right upper", handlelength=1, frameon=False)
    figure.savefig(file, dpi=150)


def _gib(one: Plan) -> float:
    return one.memory.used / 2**30


def _timed(one: Plan) -> bool:
    return one.fits and one.time is not None and not one.time.unknown


def _order(one: Plan) -> tuple[bool, float]:
    return not one.fits, -one.tokens_per_second if _timed(one) else one.memory.used


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """The ways to write a number as a product of `count` factors, in order."""
    if count == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def _abstract(run: Run) -> AbstractMesh:
    sizes = meshes.parse(run.mesh)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def _outputs(what: Description) -> float:
    """How many numbers a token gets from a matrix, in all layers that stack it."""
    letters = what.axes.split()
    stack = sum(letter in "LE" for letter in letters)
    layers = math.prod(size for letter, size in zip(letters, what.shape, strict=True) if letter == "L")
    return layers * math.prod(what.shape[stack + what.inputs :]) if what.inputs and "V" not in letters else 0.0

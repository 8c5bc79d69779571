"""A plan as a page of text and as JSON."""

import importlib.util
import json
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...configs.run import Run
from ...layers.sharding import stages
from ...layers.spec import missing_package
from ..runs.progress import memory_size, print_whole
from .chips import Chip
from .plan import Memory, Plan, SlicePlan, first_that_fits, plan
from .search import pareto, picture, search
from .time import PARTS as TIMES
from .time import Time

PARTS = {
    "parameters": "split as the mesh says",
    "optimizer": "its state",
    "average": "moving average of the parameters",
    "batch": "tokens, targets, segments, positions, weights",
    "cache": "the KV cache, full",
    "tiles": "padding of these arrays in tiles",
    "gradients": "float32, split as the parameters are",
    "temporary": "activations and everything else that the compiler allocates",
    "code": "of the program",
}
"""Explanations of the parts of `Memory`."""


def command(run: Run, topology: str, *, as_json: bool, usd_hour: float | None, watts: float | None) -> None:
    """Plans a run and prints what was found; where it does not fit, also the mildest change that makes it fit."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    console, asides = Console(), Console(stderr=True)
    with asides.status(f"compiling the step for {topology} ..."):
        found = plan(run, topology)
    if as_json:
        print(json_of(found, usd_hour=usd_hour, watts=watts))
        return
    page(found, console, usd_hour=usd_hour, watts=watts)
    if found.fits:
        return
    with asides.status("looking for a change that makes it fit ...") as status:
        better = first_that_fits(
            run, topology, lambda other: status.update(f"compiling with {change_text(run, other)} ...")
        )
    if better is None:
        console.print(
            "\nNeither more recomputation nor smaller micro-batches make it fit. It needs more chips, an optimizer "
            "with less state (--optimizer adafactor, --momentum-dtype bfloat16), a shorter length or a smaller model.",
            soft_wrap=True,
        )
        return
    console.print(f"\nIt fits with [bold]{change_text(run, better.run)}[/]:\n")
    page(better, console, usd_hour=usd_hour, watts=watts)


def search_command(
    name: str,
    run: Run,
    topology: str,
    *,
    usual: Run,
    momentum: bool,
    plot: Path | None,
    as_json: bool,
    usd_hour: float | None,
    watts: float | None,
) -> None:
    """Searches the layouts of a run and prints the best, and the command that trains with it.

    `usual` is the run that `zoo train NAME` starts without flags.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    console, asides = Console(), Console(stderr=True)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise missing_package("pictures take", "matplotlib")
    with asides.status("ranking the layouts ...") as status:
        ranked, plans = search(
            run,
            topology,
            lambda done, count: status.update(f"compiled {done} of the {count} most promising layouts ..."),
            momentum=momentum,
        )
    if plot is not None:
        picture(plans, plot)
    if as_json:
        print(json.dumps([json.loads(json_of(one, usd_hour=usd_hour, watts=watts)) for one in plans], indent=2))
        return
    console.print(f"{ranked} layouts of {topology} ranked by arithmetic, {len(plans)} compiled:\n", highlight=False)
    rows = Table(box=None, pad_edge=False, header_style="bold")
    named = (("", "right"), ("mesh", "left"), ("remat", "left"))
    for heading, side in (*named, *((h, "right") for h in SEARCHED)):
        rows.add_column(heading, justify=side, no_wrap=True)  # pyright: ignore[reportArgumentType]
    best = pareto(plans)
    for number, one in enumerate(plans, 1):
        memory = memory_size(one.memory.used)
        told = one.time is not None and not one.time.unknown and one.fits
        told_as = (
            [f"{one.tokens_per_second:,.0f}", f"{one.mfu:.1%}", one.time.bound] if told and one.time else ["-", "-", ""]
        )
        other = one.run.optimizer.momentum_dtype != run.optimizer.momentum_dtype
        marks = ["front"] * (one in best) + ["does not fit"] * (not one.fits)
        marks += [f"momentum in {one.run.optimizer.momentum_dtype}: another result"] * other
        layout = str(number), one.run.mesh, one.run.remat, str(one.run.accumulate)
        rows.add_row(*layout, memory, *told_as, ", ".join(filter(None, marks)))
    print_whole(console, rows)
    if plot is not None:
        console.print(f"\ndrawn in {plot}", highlight=False)
    if best:
        console.print(f"\nThe fastest:\n\n  {train_line(name, best[0].run, usual)}\n", highlight=False, soft_wrap=True)
        page(best[0], console, usd_hour=usd_hour, watts=watts)


SEARCHED = ("accumulate", "memory", "tokens/s a chip", "MFU", "bound by", "")
"""Headings of what is told of a layout beside its mesh and remat."""


def train_line(name: str, run: Run, usual: Run) -> str:
    """The command that trains a run by this name in the layout of `run`; without flags it would train `usual`."""
    names = ("batch", "length", "dtype", "quantize", "mesh", "remat", "accumulate")
    names += ("optimizer.name", "optimizer.momentum_dtype")
    given, default = run.flat(), usual.flat()
    flags = [text for key in names if given[key] != default[key] for text in (f"--{key}", str(given[key]))]
    return shlex.join(["zoo", "train", name, *flags])


def page(found: Plan, console: Console, *, usd_hour: float | None = None, watts: float | None = None) -> None:
    """Prints a plan."""
    run, chips = found.run, math.prod(found.mesh.values())
    mesh = ",".join(f"{axis}={size}" for axis, size in found.mesh.items())
    size = f"{run.batch} x {run.length} tokens a step" + (f" in {run.accumulate} parts" if run.accumulate > 1 else "")
    kinds = run.dtype if run.quantize == "none" else f"{run.dtype} and {run.quantize}"
    layout = f"mesh {mesh}, {size}, {kinds}, remat {run.remat}"
    console.print(f"{found.topology}: {chips} x {found.chip.kind}, {layout}", highlight=False, soft_wrap=True)
    if found.bubble:
        console.print(
            f"Each of {found.mesh[stages.AXIS]} stages waits {found.bubble:.0%} of the time with "
            f"accumulate={run.accumulate}: less with more.",
            highlight=False,
        )
    memory_table(found.memory, console)
    if found.time is None:
        return
    if found.time.unknown:
        console.print(f"\nNo time is reported: there is no model of {', '.join(found.time.unknown)}.")
        return
    time = found.time
    console.print(
        f"\nA step {found.chip.verb} {time.seconds:.3g} s: {found.tokens_per_second:,.0f} tokens/s a chip, "
        f"{found.mfu:.1%} MFU; bound by {time.bound}.",
        soft_wrap=True,
    )
    time_table(time, found.chip, console)
    costs(found.chip, found.tokens_per_second, console, usd_hour, watts)
    console.print(f"Accuracy: {found.chip.trust}.", highlight=False, soft_wrap=True)


def costs(chip: Chip, speed: float, console: Console, usd_hour: float | None, watts: float | None) -> None:
    """Prints what a million tokens cost at so many a second and chip, where a price or a power is known."""
    known = prices_of(chip, speed, usd_hour, watts)
    usd_hour, watts = chip.costs(usd_hour, watts)
    if (usd := known["usd_per_million_tokens"]) is not None:
        console.print(f"At ${usd_hour:.2f} a chip and hour: ${usd:.3f} a million tokens.")
    if (kwh := known["kwh_per_million_tokens"]) is not None:
        console.print(f"At {watts:.0f} W a chip: {kwh:.3f} kWh a million tokens.")


def prices_of(chip: Chip, speed: float, usd_hour: float | None, watts: float | None) -> dict[str, float | None]:
    """Dollars and energy of a million tokens, for JSON."""
    usd_hour, watts = chip.costs(usd_hour, watts)
    hours = 1e6 / speed / 3600
    return {
        "usd_per_million_tokens": None if usd_hour is None else usd_hour * hours,
        "kwh_per_million_tokens": None if watts is None else watts * hours / 1e3,
    }


def json_of(found: Plan, *, usd_hour: float | None = None, watts: float | None = None) -> str:
    """A plan as JSON; sizes in bytes, times in seconds."""
    names = ("batch", "length", "accumulate", "dtype", "quantize", "remat")
    job = {name: getattr(found.run, name) for name in names} | {"bubble": found.bubble}

    def times() -> dict[str, float]:
        return {
            "step_seconds": found.program_seconds,
            "tokens_per_second_per_chip": found.tokens_per_second,
            "mfu": found.mfu,
        }

    return slice_json(found, job, times, usd_hour=usd_hour, watts=watts)


def slice_json(
    found: SlicePlan,
    job: dict[str, Any],
    times: Callable[[], dict[str, float]],
    *,
    usd_hour: float | None,
    watts: float | None,
) -> str:
    """A plan as JSON.

    Args:
        found: the plan.
        job: what was planned.
        times: gives figures of time, tokens_per_second_per_chip among them; called if every part has a model.
        usd_hour: price of a device.
        watts: power of a device.
    """
    result = {"topology": found.topology, "chip": found.chip.kind, "mesh": found.mesh, **job}
    result |= {"fits": found.fits, "memory": asdict(found.memory) | {"used": found.memory.used}}
    if found.time is not None:
        result["time"] = found.time.as_json()
        if not found.time.unknown:
            figures = times()
            prices = prices_of(found.chip, figures["tokens_per_second_per_chip"], usd_hour, watts)
            result |= figures | {"bound": found.time.bound, "trust": found.chip.trust} | prices
    return json.dumps(result, indent=2)


def change_text(run: Run, other: Run) -> str:
    """The flags that make one run's layout that of another."""
    names = ("remat", "accumulate")
    return " ".join(f"--{name} {getattr(other, name)}" for name in names if getattr(run, name) != getattr(other, name))


def memory_table(memory: Memory, console: Console) -> None:
    """Prints whether the program fits, and a bar for each part of the memory."""
    whole = max(memory.capacity, memory.used)
    verdict = (
        f"[bold red]does not fit[/]: {memory_size(memory.missing)} too much for {memory_size(memory.capacity)} a chip"
        if memory.missing
        else f"[bold green]fits[/]: {memory_size(memory.used)} of {memory_size(memory.capacity)} a chip"
    )
    console.print(verdict, highlight=False)
    rows = Table(box=None, pad_edge=False, show_header=False)
    for column in ("left", "right", "left", "left"):
        rows.add_column(justify=column, no_wrap=True)  # pyright: ignore[reportArgumentType]
    for name, what in PARTS.items():
        size = getattr(memory, name)
        if size >= 2**20:
            rows.add_row(name, memory_size(size), "█" * max(1, round(30 * size / whole)), f"[dim]{what}[/]")
    print_whole(console, rows)


def time_table(time: Time, chip: Chip, console: Console) -> None:
    """Prints the parts of a time and where each comes from."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in (
        ("", "left"),
        ("seconds", "right"),
        ("waits", "right"),
        ("sent a chip", "right"),
        ("source", "left"),
    ):
        rows.add_column(name, justify=side)  # pyright: ignore[reportArgumentType]
    for name, shown in TIMES.items():
        if seconds := getattr(time, name):
            rows.add_row(shown, f"{seconds:.4f}", "", "", chip.sources[name])
    for (kind, axis), part in sorted(time.traffic.items(), key=lambda item: -item[1].seconds):
        speed = "HBM" if axis == "HBM" else "link"
        how = f"{part.count} over {axis}: bytes at {speed} bandwidth, a lower bound"
        rows.add_row(kind, f"{part.seconds:.4f}", f"{part.exposed:.4f}", memory_size(part.bytes), how)
    print_whole(console, rows)

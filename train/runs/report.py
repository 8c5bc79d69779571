"""What a run leaves for people: a picture of its losses and a page about it."""

import importlib.util
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from ...configs.run import Run
from . import metrics
from .changes import History
from .progress import amount, duration

PICTURE = "loss.png"


def summary(folder: Path) -> dict[str, Any]:
    """The last step's metrics, the last held-out score (None: nothing was held out), and times in seconds."""
    records = metrics.read(folder)
    steps = [record for record in records if "loss" in record]
    scores = [record["heldout_bits_per_byte"] for record in records if "heldout_bits_per_byte" in record]
    seconds = [record["seconds"] for record in steps]
    if not steps:
        raise ValueError(f"{folder / metrics.FILE} holds no training step: there is nothing to report on")
    return steps[-1] | {
        "heldout_bits_per_byte": scores[-1] if scores else None,
        "seconds": sum(seconds),
        "median_seconds": statistics.median(seconds),
    }


def draw(folder: Path) -> Path | None:
    """Draws the loss of every step and the held-out bits per byte; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # a second of import, needed once, at the end

    records = metrics.read(folder)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    heldout = [(r["step"], r["heldout_bits_per_byte"]) for r in records if "heldout_bits_per_byte" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
    left = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    left.plot(steps, losses, color="#9db8d9", linewidth=0.8)
    left.plot(steps, _smooth(losses), color="#1f5fa8", linewidth=1.8)
    left.set_xlabel("step")
    left.set_ylabel("training loss (nats per token)", color="#1f5fa8")
    left.spines[["top", "right"]].set_visible(False)
    left.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    if heldout:
        _draw_heldout(left, heldout)
    left.set_title(folder.name, loc="left", fontweight="bold")
    figure.savefig(folder / PICTURE)
    return folder / PICTURE


def _draw_heldout(left: Any, heldout: list[tuple[int, float]]) -> None:
    """Adds the held-out scores on an axis of their own, on the right."""
    right = left.twinx()
    right.plot(*zip(*heldout, strict=True), color="#c2541b", marker="o", markersize=5, linewidth=1.8)
    right.set_ylabel("held-out bits per byte", color="#c2541b")
    right.spines[["top", "left"]].set_visible(False)
    step, bits = heldout[-1]
    right.annotate(f"{bits:.3f}", (step, bits), textcoords="offset points", xytext=(0, 12), ha="right", color="#c2541b")


def _smooth(values: tuple[float, ...]) -> np.ndarray:
    """The mean over a centred window of a twentieth of the steps; shorter at the ends."""
    window = np.ones(max(1, len(values) // 20) | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def write(folder: Path, run: Run, facts: dict[str, Any]) -> Path:
    """Writes report.md: the score, what was trained on what, the picture, and samples of the text on the way."""
    picture = draw(folder)
    bits, heldout = facts["heldout_bits_per_byte"], amount(facts["heldout_bytes"], "B")
    samples = [(record["step"], record["sample"]) for record in metrics.read(folder) if "sample" in record]
    tokens = History(folder).tokens(run, facts["step"])
    rows = {
        "held-out": "no text was held out" if bits is None else f"**{bits:.4f} bits per byte** on {heldout}",
        "final training loss": f"{facts['loss']:.4f} nats per token",
        "parameters": f"{facts['parameters']:,}",
        "steps": f"{facts['step']:,} of {run.batch} x {run.length} tokens ({amount(tokens)} tokens)",
        "skipped steps": f"{facts['skipped']:.0f}",
        "time in training steps": f"{duration(facts['seconds'])} ({amount(facts['tokens_per_second'])} tokens/s)",
        "devices": facts["devices"],
        "data": facts["data"],
    }
    shown = (
        f"![Training loss and held-out bits per byte by step]({PICTURE})"
        if picture
        else ("No picture was drawn: matplotlib is not installed (`pip install 'flaxzoo[viz]'`).")
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    texts = "\n\n".join(f"After {step} steps:\n\n~~~text\n{text.strip()}\n~~~" for step, text in samples)
    page = (
        f"# {folder.name}\n\n| | |\n|---|---|\n{table}\n\n{shown}\n\n## Samples\n\n{texts or 'None were asked for.'}\n"
    )
    path = folder / "report.md"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path

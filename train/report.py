"""What a run leaves for people: a picture of its losses and a page about it."""

import importlib.util
from pathlib import Path
from typing import Any

from ..configs.run import Run
from . import metrics
from .progress import amount, duration

PICTURE = "loss.png"


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
    right = left.twinx()
    right.plot(*zip(*heldout, strict=True), color="#c2541b", marker="o", markersize=5, linewidth=1.8)
    right.set_ylabel("held-out bits per byte", color="#c2541b")
    right.spines[["top", "left"]].set_visible(False)
    step, bits = heldout[-1]
    right.annotate(f"{bits:.3f}", (step, bits), textcoords="offset points", xytext=(-4, 8), ha="right", color="#c2541b")
    left.set_title(folder.name, loc="left", fontweight="bold")
    figure.savefig(folder / PICTURE)
    return folder / PICTURE


def _smooth(values: tuple[float, ...], keep: float = 0.9) -> list[float]:
    """Bias-corrected exponential moving average."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return smooth


def write(folder: Path, run: Run, facts: dict[str, Any], samples: list[tuple[int, str]]) -> Path:
    """Writes report.md: the score, what was trained on what, the picture, and samples of the text on the way."""
    picture = draw(folder)
    rows = {
        "held-out": f"**{facts['heldout_bits_per_byte']:.4f} bits per byte** on {amount(facts['heldout_bytes'], 'B')}",
        "final training loss": f"{facts['loss']:.4f} nats per token",
        "parameters": f"{facts['parameters']:,}",
        "steps": f"{facts['step']:,} of {run.batch} x {run.length} tokens ({amount(facts['step'] * run.batch * run.length)} tokens)",
        "skipped steps": f"{facts['skipped']:.0f}",
        "time in training steps": f"{duration(facts['seconds'])} ({amount(facts['tokens_per_second'])} tokens/s)",
        "devices": facts["devices"],
        "data": facts["data"],
    }
    shown = f"![Training loss and held-out bits per byte by step]({PICTURE})" if picture else (
        "No picture was drawn: matplotlib is not installed (`pip install 'flaxzoo[viz]'`)."
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    texts = "\n\n".join(f"After {step} steps:\n\n~~~text\n{text.strip()}\n~~~" for step, text in samples)
    page = f"# {folder.name}\n\n| | |\n|---|---|\n{table}\n\n{shown}\n\n## Samples\n\n{texts or 'None were asked for.'}\n"
    path = folder / "report.md"
    path.write_text(page)
    return path

"""What a run leaves for people: a picture of its losses and a page about it."""

import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from ...configs.run import Run
from . import metrics
from .changes import History
from .progress import amount, duration

PICTURE = "loss.png"


def summary(folder: Path, step: int) -> dict[str, Any]:
    """The metrics of the last step and the last held-out score; times in seconds.

    `heldout_bits_per_byte` is None where nothing was held out; numbers are NaN where the metrics are lost.
    """
    records = metrics.read(folder)
    steps = [record for record in records if "loss" in record and "seconds" in record]
    scores = [record["heldout_bits_per_byte"] for record in records if "heldout_bits_per_byte" in record]
    seconds = [record["seconds"] for record in steps]
    last = steps[-1] if steps else {"step": step, "loss": math.nan, "skipped": math.nan}
    return last | {
        "step": step,
        "heldout_bits_per_byte": scores[-1] if scores else None,
        "seconds": sum(seconds),
        "median_seconds": statistics.median(seconds) if seconds else math.nan,
    }


def draw(folder: Path, title: str, bytes_per_token: float) -> Path | None:
    """Draws the training and held-out loss by step into `PICTURE`, both in bits per byte.

    Returns None where matplotlib is not installed or no step is recorded.

    Args:
        folder: of the run.
        title: of the picture.
        bytes_per_token: bytes of training text per token, which converts nats per token into bits per byte.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # a second of import, needed once, at the end

    records = metrics.read(folder)
    train = [(r["step"], r["nll"]) for r in records if "nll" in r]
    heldout = [(r["step"], r["heldout_bits_per_byte"]) for r in records if "heldout_bits_per_byte" in r]
    if not train:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    steps, losses = (np.array(values, float) for values in zip(*train, strict=True))
    bits = losses / math.log(2) / bytes_per_token
    axes.plot(steps, bits, color="#9db8d9", linewidth=0.8, label="training text, each step")
    axes.plot(steps, _smooth(bits), color="#1f5fa8", linewidth=1.8, label="training text, moving average")
    if heldout:
        axes.plot(
            *zip(*heldout, strict=True),
            color="#c2541b",
            marker="o",
            markersize=5,
            linewidth=1.8,
            label=f"held-out text, {heldout[-1][1]:.3f} at step {heldout[-1][0]:,}",
        )
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (bits per byte)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, loc="upper right")
    axes.set_title(title, loc="left", fontweight="bold")
    figure.savefig(folder / PICTURE)
    return folder / PICTURE


def _smooth(values: tuple[float, ...] | np.ndarray) -> np.ndarray:
    """The mean over a centred window of a twentieth of the steps; shorter at the ends."""
    window = np.ones(max(1, len(values) // 20) | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def write(folder: Path, run: Run, facts: dict[str, Any]) -> Path:
    """Writes report.md: the score, what was trained on what, the picture, and samples of the text on the way."""
    title = f"{folder.name}: {amount(facts['parameters'])} parameters"
    picture = draw(folder, title, facts["bytes_per_token"])
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
        f"![Training and held-out loss in bits per byte, by step]({PICTURE})"
        if picture
        else (
            "No picture was drawn: no step is recorded, or matplotlib is not installed (`pip install 'flaxzoo[viz]'`)."
        )
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    texts = "\n\n".join(f"After {step} steps:\n\n~~~text\n{text.strip()}\n~~~" for step, text in samples)
    page = (
        f"# {folder.name}\n\n| | |\n|---|---|\n{table}\n\n{shown}\n\n## Samples\n\n{texts or 'None were asked for.'}\n"
    )
    path = folder / "report.md"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path

"""Settings that change when a run is resumed: which may change, what the change does, and the record of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...configs.run import LAYOUT, Optimizer, Run
from .. import optimizer as optimizers

FILE = "changes.jsonl"
"""One JSON line for each change: `step`, the last step under the old values, and `changes`, [old, new] by field."""

FIXED = {
    "model": "the parameters of a checkpoint belong to one model",
    "weights": "a run starts from weights only at its first step",
    "data.tokenizer": "the model was trained on the token ids of its tokenizer",
    "optimizer.name": "a checkpoint holds the state of one optimizer",
    "optimizer.momentum_dtype": "a checkpoint holds the state of the optimizer in this dtype",
}
"""Why a field, or all fields inside it, can never change within a run."""

Differences = dict[str, tuple[Any, Any]]
"""[old, new] value of each field that differs, by dotted name."""


def differences(before: Run, now: Run) -> Differences:
    """The fields in which two runs differ."""
    old, new = before.flat(), now.flat()
    return {
        name: (old.get(name), new.get(name)) for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)
    }


def check(folder: Path, before: Run, now: Run, *, allow: bool) -> None:
    """Raises ValueError, naming each field, where a run cannot be resumed with these settings.

    Where and when things happen (`LAYOUT`) and the number of steps may always change; what is learned may change where
    `allow` is true; what the checkpoint's arrays depend on (`FIXED`) never.
    """
    changed = differences(before, now)
    fixed = {name: reason for name in changed if (reason := _fixed(name, changed[name]))}
    if fixed:
        lines = "".join(f"\n{line} ({fixed[name]})" for name, line in zip(fixed, _lines(changed, fixed), strict=True))
        raise ValueError(
            f"{folder} holds a run with settings that cannot change:{lines}\n"
            f"choose another --name; --weights {folder} starts a new run from the parameters of this one"
        )
    learned = [name for name in changed if name not in LAYOUT and name != "steps"]
    if learned and not allow:
        lines = "".join(f"\n{line}" for line in _lines(changed, learned))
        raise ValueError(
            f"{folder} was started with other settings:{lines}\n"
            "--allow-changes resumes it with the new values; choose another --name to keep both, or leave the settings "
            "out to resume it as it is"
        )


def _fixed(name: str, values: tuple[Any, Any]) -> str:
    if name == "ema" and 0 in values:
        return "a checkpoint holds a moving average or none"
    return next((reason for field, reason in FIXED.items() if name == field or name.startswith(f"{field}.")), "")


def _lines(changed: Differences, names: Any) -> list[str]:
    return [f"  {name}: {changed[name][0]!r} -> {changed[name][1]!r}" for name in names]


def reads_other_data(changed: Differences) -> bool:
    """Whether a change affects which rows are read, so that the data starts again at its beginning."""
    return any(name in ("batch", "length", "seed") or name.startswith("data.") for name in changed)


def describe(changed: Differences, before: Run, now: Run, step: int, updates: int) -> str:
    """The changes as lines, with the learning rate before and after `updates` updates of the optimizer."""
    lines = [f"changed from step {step + 1} on:", *_lines(changed, changed)]
    if any(name == "steps" or name.startswith("optimizer.") for name in changed):
        old = learning_rate(before.optimizer, before.steps, updates)
        new = learning_rate(now.optimizer, now.steps, updates)
        lines.append(
            f"the learning rate follows the {now.optimizer.schedule} schedule of {now.steps} steps: {new:.3g} at step "
            f"{step + 1}, where the settings before give {old:.3g}"
        )
    return "\n".join(lines)


def learning_rate(optimizer: Optimizer, steps: int, updates: int) -> float:
    """The learning rate of the next update after `updates` of them."""
    return float(np.asarray(optimizers.schedule(optimizer, steps)(updates)))


@dataclass(frozen=True)
class History:
    """The changes of a run so far, in the order of their steps."""

    folder: Path

    def read(self) -> list[dict[str, Any]]:
        """The records of `FILE`; a line that is not JSON is left out."""
        path, records = self.folder / FILE, []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            try:
                record = json.loads(line)
                records.append({"step": int(record["step"]), "changes": dict(record["changes"])})
            except (ValueError, KeyError, TypeError):
                continue
        return records

    def write(self, step: int, changed: Differences) -> None:
        """Records what changes after `step`, in place of what was recorded from that step on."""
        records = [record for record in self.read() if record["step"] < step]
        if changed:
            records.append({"step": step, "changes": changed})
        path = self.folder / FILE
        if records or path.exists():
            aside = path.with_suffix(".new")
            aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            aside.replace(path)

    def tokens(self, run: Run, step: int) -> int:
        """Tokens trained on up to `step`, with the batch and length that were in effect."""
        total, end = 0, step
        sizes = {"batch": run.batch, "length": run.length}
        for record in reversed(self.read()):
            start = min(record["step"], end)
            total += (end - start) * sizes["batch"] * sizes["length"]
            end = start
            sizes |= {name: record["changes"][name][0] for name in sizes if name in record["changes"]}
        return total + end * sizes["batch"] * sizes["length"]

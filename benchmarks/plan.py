"""What `zoo plan` predicts beside what others published, for jobs of well-known size.

    .venv/bin/python benchmarks/plan.py               plan all, write benchmarks/results/plan.{json,md}
    .venv/bin/python benchmarks/plan.py "8B v6e"      those whose name holds this text; the others stay

No TPU is needed. Each takes one to three minutes on two cores.
"""

import datetime
import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flaxzoo import configs
from flaxzoo.configs import Optimizer, Run
from flaxzoo.train.plan import plan
from flaxzoo.train.plan_report import json_of

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Job:
    """A run on a slice, and the tokens a second and chip that were published for the like."""

    name: str
    model: str
    topology: str
    batch: int
    length: int
    layout: dict[str, Any]
    published: float | None = None
    source: str = ""


MAXTEXT = "MaxText, its README's table for v6e"
JOBS = (
    Job("0.5B colab-v5e", "qwen2_5_0_5b", "colab-v5e", 8, 2048, {"remat": "full"}),
    Job("0.5B colab-v6e", "qwen2_5_0_5b", "colab-v6e", 8, 2048, {"remat": "full"}),
    Job("Llama 3.1 8B v6e:2x4", "llama3_1_8b", "v6e:2x4", 16, 8192, {"mesh": "fsdp=8", "remat": "full"}, 7139, MAXTEXT),
    Job("Llama 3.1 8B v5p:2x2x2", "llama3_1_8b", "v5p:2x2x2", 16, 8192, {"mesh": "fsdp=8", "remat": "dots"}),
    Job(
        "Llama 3 70B v6e:16x16",
        "llama3_70b",
        "v6e:16x16",
        256,
        8192,
        {"mesh": "fsdp=256", "remat": "full"},
        960,
        MAXTEXT,
    ),
    Job(
        "Mixtral 8x7B v6e:16x16",
        "mixtral_8x7b",
        "v6e:16x16",
        1024,
        4096,
        {"mesh": "fsdp=256", "remat": "full"},
        3645,
        MAXTEXT,
    ),
    Job("Mixtral 8x7B v5p:4x4x4", "mixtral_8x7b", "v5p:4x4x4", 64, 4096, {"mesh": "fsdp=64", "remat": "full"}),
)


def measured(job: Job) -> dict[str, Any]:
    """The plan of a job as JSON, with what was published."""
    optimizer = Optimizer(name="adamw")
    run = Run(
        model=configs.get_model(job.model),
        batch=job.batch,
        length=job.length,
        dtype="bfloat16",
        optimizer=optimizer,
        **job.layout,
    )
    found = json.loads(json_of(plan(run, job.topology)))
    return {"job": job.name, "published": job.published, "source": job.source, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """All jobs as Markdown."""
    lines = [
        "| job | mesh | batch x length | remat | memory, GiB | step, s | tokens/s a chip | MFU | published | ratio "
        "| bound by |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        mesh = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
        memory = f"{row['memory']['used'] / 2**30:.1f} of {row['memory']['capacity'] / 2**30:.1f}"
        told = "step_seconds" in row
        speed = f"{row['tokens_per_second_per_chip']:,.0f}" if told else "-"
        ratio = f"{row['tokens_per_second_per_chip'] / row['published']:.2f}" if told and row["published"] else ""
        why = (
            row["bound"] if told else "no model of " + ", ".join(row.get("time", {}).get("unknown", ["it: too large"]))
        )
        lines.append(
            f"| {row['job']} | {mesh} | {row['batch']} x {row['length']} | {row['remat']} | {memory} "
            f"| {row['step_seconds']:.3g} | {speed} | {row['mfu']:.1%} | {row['published'] or ''} | {ratio} | {why} |"
            if told
            else f"| {row['job']} | {mesh} | {row['batch']} x {row['length']} | {row['remat']} | {memory} "
            f"| - | - | - | {row['published'] or ''} | | {why} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Plans, prints and writes."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    file = RESULTS / "plan.json"
    known = {row["job"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
    facts = {name: version(name) for name in ("jax", "libtpu")} | {"date": str(datetime.date.today())}
    for job in JOBS:
        if wanted in job.name:
            known[job.name] = measured(job)
            rows = [known[job.name] for job in JOBS if job.name in known]
            file.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
            print(table([known[job.name]]), flush=True)
    rows = [known[job.name] for job in JOBS if job.name in known]
    note = f"jax {facts['jax']}, libtpu {facts['libtpu']}, {facts['date']}. Written by `benchmarks/plan.py`."
    (RESULTS / "plan.md").write_text(f"# Plans beside published speeds\n\n{note}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()

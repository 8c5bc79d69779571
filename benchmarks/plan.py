"""What `zoo plan` predicts beside what others published, for jobs of well-known size.

    .venv/bin/python benchmarks/plan.py               plan all, write benchmarks/results/plan.{json,md} and docs' tables
    .venv/bin/python benchmarks/plan.py "8B v6e"      those whose name holds this text; the others stay
    .venv/bin/python benchmarks/plan.py rows          those of training on TPUs; "gpus", "decoding", or
    .venv/bin/python benchmarks/plan.py options       what options of the compiler change
    .venv/bin/python benchmarks/plan.py compiling     how long a step takes to compile, where nothing else runs

No TPU is needed, nor a GPU, but the compilers of both. Each takes one to three minutes on two cores.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from flaxzoo import configs
from flaxzoo.configs import Optimizer, Run
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.plan import decode as plan_decode
from flaxzoo.train.plan.chips import chip_of, chips
from flaxzoo.train.plan.decode import Decoding, plan_decoding
from flaxzoo.train.plan.plan import devices_of, plan
from flaxzoo.train.plan.report import json_of
from flaxzoo.train.step import abstract_batch, abstract_state, make_step

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


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
    Job("Mixtral 8x7B v5p:4x4x4", "mixtral_8x7b", "v5p:4x4x4", 256, 4096, {"mesh": "fsdp=64", "remat": "full"}),
)
GPUS = (
    Job("0.5B h100:1", "qwen2_5_0_5b", "h100:1", 8, 2048, {"remat": "full"}),
    Job("Llama 3.1 8B h100:8", "llama3_1_8b", "h100:8", 16, 8192, {"mesh": "fsdp=8", "remat": "full"}),
)
"""On GPUs, which takes `pip install 'jax[cuda13]'`."""
DECODING = {
    "0.5B colab-v5e, one row": ("qwen2_5_0_5b", "colab-v5e", {"batch": 1, "length": 2048}),
    "0.5B colab-v5e": ("qwen2_5_0_5b", "colab-v5e", {"batch": 8, "length": 2048}),
    "Llama 3.1 8B v5e:2x4, one row": ("llama3_1_8b", "v5e:2x4", {"batch": 1, "length": 8192}),
    "Llama 3.1 8B v5e:2x4": ("llama3_1_8b", "v5e:2x4", {"batch": 8, "length": 8192}),
    "Llama 3.1 8B v5e:2x4, int8": ("llama3_1_8b", "v5e:2x4", {"batch": 8, "length": 8192, "cache_dtype": "int8"}),
    "Llama 3.1 8B v6e:2x4": ("llama3_1_8b", "v6e:2x4", {"batch": 8, "length": 8192}),
    "Mixtral 8x7B v5p:2x2x2": ("mixtral_8x7b", "v5p:2x2x2", {"batch": 8, "length": 4096}),
}
"""Generation: a model, a slice, rows and their length."""
COMPILED = (Job("Llama 3.1 8B v6e:8x8", "llama3_1_8b", "v6e:8x8", 128, 8192, {"mesh": "fsdp=64", "remat": "full"}),)
"""What is timed while it is compiled, `COMPILES` times."""
COMPILES = 3
GATHERS = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
}
SUMS = {"xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "all-gathers on SparseCores": GATHERS,
    "reduce-scatters, too": GATHERS | SUMS,
    "and weights gathered a layer ahead": GATHERS | SUMS | {"xla_tpu_enable_ici_ag_pipelining": True},
}
"""Options of the compiler, tried on Llama 3.1 8B on v6e:2x4: also those of `train/plan/chips.toml`."""


def run_of(job: Job) -> Run:
    """The run of a job, in bfloat16 by AdamW."""
    size = {"batch": job.batch, "length": job.length, **job.layout}
    return Run(model=configs.get_model(job.model), dtype="bfloat16", optimizer=Optimizer(name="adamw"), **size)


def measured(job: Job) -> dict[str, Any]:
    """The plan of a job as JSON, with what was published."""
    found = json.loads(json_of(plan(run_of(job), job.topology)))
    return {"job": job.name, "published": job.published, "source": job.source, **found}


def with_options(name: str) -> dict[str, Any]:
    """The plan of Llama 3.1 8B on v6e:2x4 with some options of the compiler."""
    chip, _ = chip_of("v6e:2x4")
    usual = chips()[chip.kind]
    chips()[chip.kind] = dataclasses.replace(usual, options=OPTIONS[name])
    try:
        row = measured(next(job for job in JOBS if job.name == "Llama 3.1 8B v6e:2x4"))
    finally:
        chips()[chip.kind] = usual
    return row | {"job": name, "options": OPTIONS[name]}


def options_table(rows: list[dict[str, Any]]) -> str:
    """Those of the options as Markdown."""
    lines = [
        "| options | tokens/s a chip | memory, GiB | computation, s | all-gathers, waits | reduce-scatters, waits |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        traffic = {part["kind"]: part for part in row["time"]["traffic"]}
        waits = [
            f"{traffic[kind]['seconds']:.3f}, {traffic[kind]['exposed']:.3f}" if kind in traffic else ""
            for kind in ("all-gather", "reduce-scatter")
        ]
        lines.append(
            f"| {row['job']} | {row['tokens_per_second_per_chip']:,.0f} | {row['memory']['used'] / 2**30:.1f} "
            f"| {row['time']['compute']:.3f} | {' | '.join(waits)} |"
        )
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """All jobs as Markdown."""
    lines = [
        "| job | mesh | batch x length | remat | memory, GiB | step, s | tokens/s a chip | MFU | published | ratio "
        "| bound by |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        told = "step_seconds" in row and row["published"]
        ratio = f"{row['tokens_per_second_per_chip'] / row['published']:.2f}" if told else ""
        lines.append(f"| {' | '.join(cells(row))} | {row['published'] or ''} | {ratio} | {bound(row)} |")
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> list[str]:
    """What tables of training have of a job: its layout, memory and, where it is known, its speed."""
    mesh = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    memory = f"{row['memory']['used'] / 2**30:.1f} of {row['memory']['capacity'] / 2**30:.1f}"
    speed = ["-"] * 3
    if "step_seconds" in row:
        speed = [f"{row['step_seconds']:.3g}", f"{row['tokens_per_second_per_chip']:,.0f}", f"{row['mfu']:.1%}"]
    return [row["job"], mesh, f"{row['batch']} x {row['length']}", row["remat"], memory, *speed]


def bound(row: dict[str, Any]) -> str:
    """What bounds a job, or why its time is not known."""
    unknown = row.get("time", {}).get("unknown", ["it: too large"])
    return row["bound"] if "bound" in row else f"no model of {', '.join(unknown)}"


def gpu_table(rows: list[dict[str, Any]]) -> str:
    """Jobs on GPUs as Markdown: their times are the least that arithmetic allows."""
    lines = [
        "| job | mesh | batch x length | remat | memory, GiB | step, s, at least | tokens/s a chip, at most "
        "| MFU, at most | bound by |",
        "|---|---|---|---|--:|--:|--:|--:|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} | {bound(row)} |" for row in rows)])


def decoded(name: str) -> dict[str, Any]:
    """The plan of a job of generation as JSON."""
    model, topology, given = DECODING[name]
    found = plan_decoding(Decoding(model=configs.get_model(model), **given), topology)
    return {"job": name, **json.loads(plan_decode.json_of(found))}


def decoding_table(rows: list[dict[str, Any]]) -> str:
    """Those of generation as Markdown."""
    lines = [
        "| job | mesh | rows x tokens | cache | memory, GiB | a token, ms | to read once, ms | tokens/s a row "
        "| tokens/s a chip | rows that would fit | bound by |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        mesh = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
        memory = f"{row['memory']['used'] / 2**30:.1f} of {row['memory']['capacity'] / 2**30:.1f}"
        told = [
            f"{row['token_seconds'] * 1e3:.3g}",
            f"{row['least_token_seconds'] * 1e3:.3g}",
            f"{row['tokens_per_second_per_row']:.1f}",
            f"{row['tokens_per_second_per_chip']:.1f}",
        ]
        lines.append(
            f"| {row['job']} | {mesh} | {row['batch']} x {row['length']} | {row['cache_dtype']} | {memory} "
            f"| {' | '.join(told)} | {row['largest_batch_by_arithmetic']} | {row['bound']} |"
        )
    return "\n".join(lines)


def compiled(job: Job) -> dict[str, Any]:
    """Seconds to trace, to lower and to compile the step of a job, each of `COMPILES` times."""
    run, devices = run_of(job), devices_of(job.topology)
    seconds = []
    for _ in range(COMPILES):
        mesh, _ = meshes.make(run, devices)
        with jax.set_mesh(mesh):
            times = [time.perf_counter()]
            step: Any = make_step(run)
            traced = step.trace(abstract_state(run, mesh), abstract_batch(run, mesh))
            times.append(time.perf_counter())
            lowered = traced.lower()
            times.append(time.perf_counter())
            lowered.compile()
            times.append(time.perf_counter())
        seconds.append([after - before for before, after in itertools.pairwise(times)])
    size = {"batch": job.batch, "length": job.length, "topology": job.topology}
    return {"job": job.name, "cores": os.cpu_count(), "seconds": seconds, **size, **job.layout}


def compiling_table(rows: list[dict[str, Any]]) -> str:
    """Those of compiling as Markdown: medians."""
    lines = [
        "| job | mesh | batch x length | cores | trace, s | lower, s | compile, s | in all, s |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        parts = [*zip(*row["seconds"], strict=True), [sum(times) for times in row["seconds"]]]
        shown = " | ".join(f"{statistics.median(times):.1f}" for times in parts)
        lines.append(f"| {row['job']} | {row['mesh']} | {row['batch']} x {row['length']} | {row['cores']} | {shown} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Part:
    """Jobs by name that stand in one table."""

    heading: str
    jobs: dict[str, Callable[[], dict[str, Any]]]
    table: Callable[[list[dict[str, Any]]], str]


PARTS = {
    "rows": Part("Plans beside published speeds", {job.name: functools.partial(measured, job) for job in JOBS}, table),
    "gpus": Part("GPUs", {job.name: functools.partial(measured, job) for job in GPUS}, gpu_table),
    "decoding": Part("Generation", {name: functools.partial(decoded, name) for name in DECODING}, decoding_table),
    "options": Part(
        "Options of the compiler", {name: functools.partial(with_options, name) for name in OPTIONS}, options_table
    ),
    "compiling": Part("Compiling", {job.name: functools.partial(compiled, job) for job in COMPILED}, compiling_table),
}


def main() -> None:
    """Plans, prints and writes."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    file = RESULTS / "plan.json"
    saved = json.loads(file.read_text()) if file.exists() else {}
    by = f"jax {version('jax')}, libtpu {version('libtpu')}, {datetime.date.today()}"
    known = {name: {row["job"]: row for row in saved.get(name, [])} for name in PARTS}

    def rows(name: str) -> list[dict[str, Any]]:
        return [known[name][job] for job in PARTS[name].jobs if job in known[name]]

    for name, part in PARTS.items():
        for job, measure in part.jobs.items():
            if wanted in f"{name} {job}":
                known[name][job] = {**measure(), "by": by}
                print(part.table([known[name][job]]), flush=True)
                file.write_text(json.dumps({name: rows(name) for name in PARTS}, indent=1) + "\n")
    text = []
    for name, part in PARTS.items():
        times = "; ".join(sorted({row["by"] for row in rows(name)}))
        made = part.table(rows(name))
        text.append(f"{'##' if text else '#'} {part.heading}\n\n{times}. By `benchmarks/plan.py`.\n\n{made}\n")
        put_into_docs(made)
    (RESULTS / "plan.md").write_text("\n".join(text))


def put_into_docs(table: str) -> None:
    """Puts a table in the place of the one with its heading, in whatever page has it."""
    heading = table.splitlines()[0]
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        if heading + "\n" in text:
            before, after = text.split(heading + "\n", 1)
            rest = after.splitlines(keepends=True)
            end = next((i for i, line in enumerate(rest) if not line.startswith("|")), len(rest))
            page.write_text(before + table + "\n" + "".join(rest[end:]))


if __name__ == "__main__":
    main()

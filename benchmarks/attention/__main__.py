"""Attention beside the best there is: on TPU by the compiler's own schedule, its mask processing, and on this CPU.

    make bench-attention                                       measure all, write benchmarks/results/attention.{json,md}
    make bench-attention ARGS="chips --chips v5e --cases 16K"  a part of it; what else is saved there stays
    make bench-attention ARGS="chips --resume"                 what is not there yet
    make tune-attention                                        rank block sizes, write .../attention_blocks.{json,md}

No TPU is needed: libtpu compiles for the chips, and tpu_static.py executes the scalar core of the schedule that it
makes, with a model of HBM behind the copies. Its times are deterministic. On v5e they were within some percent of
measured ones; elsewhere they serve to compare programs on the same chip, and no more.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import others
import page
import tune
from cases import CASES, PASSES, TOPOLOGIES, searched
from search import RIVALS, work

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("chips", "masks", "million", "cpu")
KEYS = {
    "chips": ("chip", "case", "pass", "who"),
    "blocks": ("chip", "dims", "pass"),
    "here": ("backend", "length", "block", "pass"),
    "masks": ("length", "mask"),
    "million": ("chip", "length", "mask", "pass"),
    "cpu": ("length", "name", "mode"),
}
"""What distinguishes the rows of a part: a new row takes the place of the old one."""


class Results:
    """Rows of all parts, in a file that is up to date after each, even if several commands add to it at once."""

    def __init__(self, name: str, packages: tuple[str, ...]) -> None:
        self.file = RESULTS / f"{name}.json"
        self.facts = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "cores": os.cpu_count(),
            "versions": {name: version(name) for name in packages},
        }
        with self.changing() as found:
            saved = json.loads(self.file.read_text())["facts"]["versions"] if self.file.exists() else {}
            if saved != self.facts["versions"]:  # nothing measured with these stands beside what others gave
                found.clear()

    @property
    def found(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of each part."""
        return json.loads(self.file.read_text())["found"] if self.file.exists() else {}

    @contextlib.contextmanager
    def changing(self) -> Iterator[dict[str, list[dict[str, Any]]]]:
        """The rows, saved at the end."""
        with filelock.FileLock(self.file.with_suffix(".lock")):
            found = self.found
            yield found
            self.file.write_text(json.dumps({"facts": self.facts, "found": found}, indent=1) + "\n")

    def key(self, part: str, row: dict[str, Any]) -> tuple[Any, ...]:
        """Of a row."""
        return tuple(row.get(name) for name in KEYS[part])

    def keep(self, part: str, wanted: Any) -> None:
        """Drops the rows whose key is not among those."""
        with self.changing() as found:
            found[part] = [row for row in found.get(part, []) if self.key(part, row) in wanted]

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Puts a row in, in place of one with the same key."""
        with self.changing() as found:
            key = self.key(part, row)
            found[part] = [*(old for old in found.get(part, []) if self.key(part, old) != key), row]


def gather(results: Results, part: str, jobs: list[tuple[Any, ...]], expected: int = 0) -> None:
    """Adds what functions send from processes of their own, which run at once; each job is a function and arguments."""
    context = multiprocessing.get_context("spawn")
    began, done, pipes = time.perf_counter(), 0, []
    for function, *arguments in jobs:
        mine, other = context.Pipe()
        context.Process(target=function, args=(other, *arguments), daemon=True).start()
        other.close()
        pipes.append(mine)
    while pipes:
        for pipe in multiprocessing.connection.wait(pipes):
            assert isinstance(pipe, multiprocessing.connection.Connection)
            row = pipe.recv()  # EOFError where the process died
            if row is None:
                pipes.remove(pipe)
                continue
            results.add(part, row)
            done += 1
            minutes, short = (time.perf_counter() - began) / 60, {n: x for n, x in row.items() if n != "tried"}
            print(f"{part} {done}/{expected or '?'}, {minutes:.1f} min: {short}", file=sys.stderr, flush=True)


def chips(results: Results, arguments: argparse.Namespace) -> None:
    """All that is asked for, the chips shared out to processes."""
    whose = ("ours", *RIVALS)
    everything = [
        (chip, case, which, who) for case in CASES.values() for chip in TOPOLOGIES for which in PASSES for who in whose
    ]

    def key(wanted: tuple[Any, ...]) -> tuple[Any, ...]:
        chip, case, which, who = wanted
        return chip, case.name, which, who

    results.keep("chips", {key(x) for x in everything})
    there = {results.key("chips", row) for row in results.found["chips"] if "error" not in row}
    known = {
        (row["chip"], searched(CASES[row["case"]]).name, row["pass"], row["who"]): row["settings"]
        for row in results.found["chips"]
        if row["who"] != "ours" and "settings" in row
    }
    wanted = [
        x
        for x in everything
        if x[0] in arguments.chips.split(",")
        and x[3] in arguments.whose.split(",")
        and any(part in x[1].name for part in arguments.cases.split(";"))
        and not (arguments.resume and key(x) in there)
    ]
    if arguments.quick:
        wanted = [x for x in wanted if x[1] == next(iter(CASES.values()))]
    known = known if arguments.resume or arguments.settings else {}
    names = [name for name in TOPOLOGIES if any(x[0] == name for x in wanted)]
    shares = [names[turn :: arguments.processes] for turn in range(arguments.processes)]
    jobs = [(work, [x for x in wanted if x[0] in share], known) for share in shares if share]
    gather(results, "chips", jobs, len(wanted))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all if none is named; or tune")
    parser.add_argument("--chips", default=",".join(TOPOLOGIES), help="of " + ", ".join(TOPOLOGIES))
    parser.add_argument("--cases", default="", help="parts of the names of cases, between semicolons")
    parser.add_argument("--whose", default=",".join(("ours", *RIVALS)), help="of ours, " + ", ".join(RIVALS))
    parser.add_argument("--processes", type=int, default=2, help="that compile at once")
    parser.add_argument("--resume", action="store_true", help="leave out what is in the results already")
    parser.add_argument("--settings", action="store_true", help="measure again, with the settings found before")
    parser.add_argument("--quick", action="store_true", help="one case a chip, short lengths")
    parser.add_argument(
        "--here", action="store_true", help="tune: by time, on this CPU; with JAX_PLATFORMS=cuda on its GPU"
    )
    arguments = parser.parse_args()
    for name, allowed in (("chips", TOPOLOGIES), ("whose", ("ours", *RIVALS))):
        if unknown := set(getattr(arguments, name).split(",")) - set(allowed):
            parser.error(f"--{name} are of {', '.join(allowed)}, got {', '.join(unknown)}")
    if unknown := set(arguments.parts) - {*PARTS, "tune"}:
        parser.error(f"parts are {', '.join(PARTS)} and tune, got {', '.join(unknown)}")
    arguments.parts = arguments.parts or list(PARTS)
    return arguments


def main() -> None:
    arguments = parse()
    os.environ |= {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu") if arguments.here else "cpu",  # for the children
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    if "tune" in arguments.parts:
        results = Results("attention_blocks", ("jax", "libtpu"))
        if arguments.here:
            gather(results, "here", [(tune.here, arguments.quick)])
        else:
            jobs = tune.jobs(results, arguments)
            gather(results, "blocks", jobs, sum(len(wanted) for _, wanted in jobs))
        text = page.blocks(results.facts, results.found)
    else:
        results = Results("attention", ("jax", "libtpu", "tokamax"))
        for part in arguments.parts:
            if part == "chips":
                chips(results, arguments)
            else:
                results.keep(part, ())
                gather(results, part, [(getattr(others, part), arguments.quick)])
        text = page.attention(results.facts, results.found)
    results.file.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""The pages of results that a reader sees."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from cases import CASES, DOCUMENT, PASSES, PEAK, TOPOLOGIES, WINDOW, geometric_mean
from search import RIVALS

Row = dict[str, Any]

PEAKS = ", ".join(f"{chip} {peak}" for chip, peak in PEAK.items())
ABOUT = f"""\
bfloat16, one sequence. A case is a mask, a length, query heads:key heads and the head dim (of keys/values where they
differ); heads are few where sequences are long, as time grows linearly with them. Times are those of the kernels, in
microseconds, by the schedule that the TPU compiler made for them. The passes are compiled apart: backward is from the
saved output and the logarithms of the sums.

Ours are in the block sizes that they ship with. The others are in the fastest settings of a search on the same case (on
32K tokens for 128K): blocks of 512 and 1024, in the longest 1024 and 2048, 512 keys at a time; then, one after the
other and kept where it is faster: forward 256 keys at a time, backward 1024; in tokamax forward skipped products in
diagonal blocks, two stacked heads of a group and the other scheduler, backward the sum in three parts. Where they do
not fit into the VMEM that XLA grants by default they get 64 MiB. All are mapped over key heads, for otherwise they use
one of the two cores of v5p. Not among the options is tokamax's given bound of the logits, which changes results. All
that was tried is in attention.json.

Documents have many lengths, {DOCUMENT} tokens in the mean. They are segment ids to the others: JAX's kernel masks them
and skips no block for them, tokamax's does. A window has {WINDOW} keys. *Ratio* is ours to the faster of the two;
*program* the same of whole programs, with what XLA does around the kernels; HBM is what a program reads and writes,
temporary what it allocates, ours : the faster one's. *Peak* is what share of the chip's bfloat16 FLOP/s our kernel
reaches, counting products of visible pairs alone ({PEAKS} TFLOP/s;
cloud.google.com/tpu/docs). On TPU7x measured times were 1.2 to 1.8 times the predicted ones, so its share is too high
by as much. *Bound by* are the two busiest units of our kernel, and how long it waits for copies where that is 3% or
more.
"""


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def versions(facts: Row) -> str:
    """In a sentence."""
    return ", ".join(f"{name} {number}" for name, number in facts["versions"].items())


def attention(facts: Row, found: dict[str, list[Row]]) -> str:
    """Attention beside the others."""
    lines = ["# Attention beside the best there is", ""]
    lines += [f"Written by `make bench-attention`, {facts['date']}; {versions(facts)}.", ""]
    parts: dict[str, Callable[[Row, list[Row]], list[str]]] = {
        "chips": chips,
        "million": million,
        "masks": masks,
        "cpu": cpu,
    }
    for name, part in parts.items():
        if rows := found.get(name):
            lines += part(facts, rows)
    return "\n".join(lines).rstrip("\n") + "\n"


def chips(facts: Row, rows: list[Row]) -> list[str]:
    """The kernels side by side."""
    by_place = {(row["chip"], row["case"], row["pass"], row["who"]): row for row in rows}
    pairs = []
    for chip, name, which in itertools.product(TOPOLOGIES, CASES, PASSES):
        mine, *theirs = (by_place.get((chip, name, which, who)) for who in ("ours", *RIVALS))
        measured = [row for row in theirs if row and "us" in row]
        if mine and "us" in mine and all(theirs) and measured:
            pairs.append((mine, min(measured, key=lambda row: row["us"]), measured))
    heads = ("chip", "case", "pass", "ours", *RIVALS, "ratio", "program", "HBM MB", "temporary MiB", "peak", "bound by")
    body = [_line(*pair) for pair in pairs]
    lines = ["## TPU, by the compiler's schedule", "", *ABOUT.splitlines(), *summary(pairs), *table(heads, body)]
    if errors := [row for row in rows if "error" in row]:
        lines += ["Not measured:", ""]
        lines += [f"- {row['chip']}, {row['case']}, {row['pass']}, {row['who']}: {row['error']}" for row in errors]
        lines += [""]
    return lines


def _line(mine: Row, best: Row, theirs: list[Row]) -> list[str]:
    times = {row["who"]: f"{row['us']:.0f}" for row in theirs}
    reached = CASES[mine["case"]].flops(mine["pass"]) / (mine["us"] * PEAK[mine["chip"]] * 1e6)
    units = sorted((x for x in mine["units"].items() if ":" not in x[0]), key=lambda x: -x[1])[:2]
    busy = ", ".join(f"{unit} {share:.0%}" for unit, share in units)
    return [
        mine["chip"],
        mine["case"],
        mine["pass"],
        f"{mine['us']:.0f}",
        *(times.get(who, "-") for who in RIVALS),
        f"{mine['us'] / best['us']:.2f}",
        f"{mine['program_us'] / best['program_us']:.2f}",
        f"{mine['hbm_bytes'] / 1e6:.0f} : {best['hbm_bytes'] / 1e6:.0f}",
        f"{mine['temp_bytes'] / 2**20:.0f} : {best['temp_bytes'] / 2**20:.0f}",
        f"{reached:.0%}",
        busy + (f", waits {mine['waits']:.0%}" if mine["waits"] >= 0.03 else ""),
    ]


def summary(pairs: list[tuple[Row, Row, list[Row]]]) -> list[str]:
    """Means over chips and passes, and what misses the targets."""
    rows = []
    for chip in (*TOPOLOGIES, "all"):
        for which in (*PASSES, "both"):
            chosen = [x for x in pairs if chip in (x[0]["chip"], "all") and which in (x[0]["pass"], "both")]
            if not chosen:
                continue
            ratios, programs = ([mine[name] / best[name] for mine, best, _ in chosen] for name in ("us", "program_us"))
            numbers = (geometric_mean(ratios), max(ratios), geometric_mean(programs))
            rows.append([chip, which, str(len(chosen)), *(f"{x:.2f}" for x in numbers)])
    slow = [x for x in pairs if x[0]["us"] > 1.1 * x[1]["us"]]
    more = [x for x in pairs if x[0]["pass"] == "backward" and x[0]["temp_bytes"] > x[1]["temp_bytes"] + 2**20]
    lines = table(("chip", "pass", "cases", "geometric mean of ratios", "largest", "of whole programs"), rows)
    for what, misses in (
        ("A ratio above 1.1", slow),
        ("More temporary memory backward than the faster of the others, by a MiB or more", more),
    ):
        names = "; ".join(f"{mine['chip']} {mine['case']} {mine['pass']}" for mine, _, _ in misses)
        lines.append(f"{what}: {names or 'none'}.")
        lines.append("")
    return lines[:-1]


def million(facts: Row, rows: list[Row]) -> list[str]:
    """HBM of a million tokens."""
    lines = ["## A million tokens", "", "8 query heads, 1 of keys, head dim 128, bfloat16, compiled for one chip; GiB."]
    heads = ("chip", "tokens", "mask", "pass", "arguments", "results", "temporary")
    body = [
        [row["chip"], f"{row['length']:,}", row["mask"], row["pass"]]
        + [f"{row[name] / 2**30:.2f}" for name in ("arguments", "results", "temp")]
        for row in rows
    ]
    return [*lines, *table(heads, body)]


def masks(facts: Row, rows: list[Row]) -> list[str]:
    """The processing of masks."""

    def shown(row: Row, who: str) -> str:
        return f"{row[who]['seconds']:.3f} s, {row[who]['bytes'] / 1024:,.0f} KiB" if who in row else "-"

    rows = sorted(rows, key=lambda row: row["length"])
    body = [[f"{row['length']:,}", row["mask"], *(shown(row, who) for who in ("ours", *RIVALS))] for row in rows]
    lines = [
        "## Mask schedules",
        "",
        "Blocks of 1024; seconds, and bytes that are kept. Not run where it takes minutes.",
    ]
    return [*lines, *table(("tokens", "mask", "ours", *RIVALS), body)]


def cpu(facts: Row, rows: list[Row]) -> list[str]:
    """This machine."""
    lines = [f"## This CPU ({facts['cores']} cores)", "", "8 heads of 64, float32; medians of 3, in turns."]
    body = [
        [f"{row['length']:,}", row["name"], row["mode"], f"{row['seconds']:.3f}", f"{row['temp_bytes'] / 2**20:,.0f}"]
        for row in rows
    ]
    return [*lines, *table(("tokens", "", "pass", "seconds", "temporary MiB"), body)]


def _blocks(row: Row) -> str:
    return f"{row['settings']['block_q']}/{row['settings']['strip']}: {row['us']:.1f}"


def blocks(facts: Row, found: dict[str, list[Row]]) -> str:
    """Block sizes."""
    lines = [
        "# Block sizes of attention",
        "",
        f"Written by `make tune-attention`, {facts['date']}; {versions(facts)}.",
        "",
    ]
    if rows := found.get("blocks"):
        lines += [
            "## TPU, by the compiler's schedule",
            "",
            "Causal, 4096 tokens, 4 heads. Microseconds of ours: in what ships (`CHIPS` of "
            "layers/kernels/attention/tpu/implementation.py),",
            "then in blocks of so many queries and keys, in strips of so many keys, from the fastest on.",
        ]
        body = []
        order = [(chip, which) for chip in TOPOLOGIES for which in PASSES]
        for row in sorted(rows, key=lambda row: (order.index((row["chip"], row["pass"])), row["dims"])):
            ships, *_ = row["tried"]
            ranked = sorted((x for x in row["tried"] if "us" in x), key=lambda x: x["us"])
            body.append([row["chip"], row["pass"], row["dims"], _blocks(ships), ", ".join(map(_blocks, ranked))])
        lines += table(("chip", "pass", "head dim", "ships", "blocks/strips"), body)
    if rows := found.get("here"):
        lines += ["## `portable`, by time", "", "Causal, 8 heads of 64, float32; medians of 5, in turns."]
        body = [
            [row["backend"], f"{row['length']:,}", row["pass"], str(row["block"]), f"{row['seconds']:.4f}"]
            for row in sorted(rows, key=lambda row: (row["backend"], row["length"], row["pass"], row["block"]))
        ]
        lines += table(("backend", "tokens", "pass", "block", "seconds"), body)
    return "\n".join(lines).rstrip("\n") + "\n"

"""Kernels that `zoo plan` has a model of, by the TPU compiler's schedule: decoding, and products of experts.

    .venv/bin/python benchmarks/attention/kernels.py          measure all, write benchmarks/results/kernels.{json,md}
    .venv/bin/python benchmarks/attention/kernels.py v6e      one chip; the others stay

No TPU is needed. `train/plan/chips.toml` takes its numbers from the first case of each kind (a test compares them),
and the others say how far the models of `train/plan/kernels.py` are off.
"""

import datetime
import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import numpy as np
import tpu_static
from cases import TOPOLOGIES
from schedule import Compiler

RESULTS = Path(__file__).parents[1] / "results"
DECODE = ((8, 8192, 32, 8), (8, 8192, 4, 1), (32, 2048, 32, 8))
"""Documents, tokens in the cache of each, heads of queries and of keys; head dim 128."""
PUT = ((8, 8192, 8), (8, 8192, 1), (64, 8192, 1))
"""Rows that are given one more token, slots of each, and heads of keys; head dim 128."""
GROUPED = (
    (8192, 8, 4096, 14336),
    (32768, 8, 4096, 14336),
    (8192, 8, 14336, 4096),
    (8192, 128, 2048, 768),
    (32768, 64, 2048, 1024),
)
"""Rows, groups, inputs and outputs: of Mixtral 8x7B, Qwen3 30B-A3B and OLMoE."""
METADATA = re.compile(r"(ragged-dot-metadata[\w.\-]*)#(\d)")


def tiles_of(sizes: np.ndarray, tile: int, room: int) -> list[np.ndarray]:
    """What XLA's kernel computes for its products of grouped rows: where groups end, and which tiles have which."""
    ends = np.cumsum(sizes)
    parts = [(g, t) for g, end in enumerate(ends) for t in range((end - sizes[g]) // tile, -(-end // tile)) if sizes[g]]
    rest = [(len(sizes) - 1, -(-ends[-1] // tile) - 1)] * (room - len(parts))
    groups, places = np.array([*parts, *rest], np.int32).T
    return [np.array([0, *ends], np.int32), groups, places, np.array([len(parts)], np.int32)]


def knows_tiles(sizes: np.ndarray) -> None:
    """Teaches the emulator what the kernel of the tiles leaves to that of the products."""
    parse, resolve = parsers

    def parse_module(text: str) -> Any:
        computations, entry = parse(METADATA.sub(r"\1__\2", text))
        for operations in computations.values():
            for name, rest in list(operations):
                if name.startswith("ragged-dot-metadata"):
                    kinds = re.findall(r"s32\[\d+\]\{[^}]*\}", rest)[:4]
                    operations += [[f"{name}__{index}", f"{kind} parameter(-1)"] for index, kind in enumerate(kinds)]
        return computations, entry

    def resolved(name: str, operations: dict[str, str], *rest: Any) -> Any:
        if not (found := re.fullmatch(r"(ragged-dot-metadata[\w.\-]*)__(\d)", name)):
            return resolve(name, operations, *rest)
        tiling = next(filter(None, (re.search(r'ragged_dot_tiling="(\d+)', text) for text in operations.values())))
        room = int(re.findall(r"s32\[(\d+)\]", operations[found[1]])[1])
        return tiles_of(sizes, int(tiling[1]), room)[int(found[2])]

    tpu_static.parse_module, tpu_static.resolve = parse_module, resolved


parsers = tpu_static.parse_module, tpu_static.resolve


def decode(compiler: Compiler, chip: str, case: tuple[int, ...]) -> dict[str, Any]:
    """Attention of one token of each document to its full cache."""
    import jax
    import jax.numpy as jnp
    from flaxzoo.layers.kernels.attention import pair_function as pairs
    from flaxzoo.layers.kernels.attention.masks import Causal
    from flaxzoo.layers.kernels.attention.problem import Operands, Problem
    from flaxzoo.layers.kernels.attention.tpu import forward as tpu_forward
    from flaxzoo.layers.kernels.attention.tpu import implementation as tpu
    from flaxzoo.layers.kernels.attention.tpu import parts as tpu_parts
    from programs import sizes

    batch, length, heads, kv_heads = case
    traced, counts = pairs.trace(Causal().visible), pairs.Sizes(batch, heads, 1, length, length - 1)
    hoisted = [np.asarray(x) for x in traced.hoisted_values(counts)]
    problem = Problem(traced, None, 128**-0.5, jnp.bfloat16, query_offset=length - 1, mask_hoisted=hoisted)
    query = jax.ShapeDtypeStruct((batch, 1, heads, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((batch, kv_heads, length, 128), jnp.bfloat16)

    def operands(q: Any, k: Any, v: Any) -> Operands:
        return Operands(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask_hoisted=[], score_hoisted=[])

    given = jax.eval_shape(operands, query, cache, cache)
    chosen = sizes(compiler.devices(chip)[0], given, heads // kv_heads)
    steering = np.asarray(tpu_parts.schedule(problem.blocks(given, chosen.block_q, chosen.block_k)))

    def attention(steering: Any, *arrays: Any) -> Any:
        setattr(tpu_forward, "schedule", lambda _: steering)  # noqa: B010
        return tpu.forward(problem, operands(*arrays), chosen=chosen)

    found = measure(compiler, chip, attention, (steering, query, cache, cache))
    size = 2 * batch * kv_heads * length * 128 * 2
    return {"us": found["us"], "share": size / (found["us"] * 1e-6 * tpu_static.CHIPS[found["chip"]]["hbm"] * 1e9)}


def put(compiler: Compiler, chip: str, case: tuple[int, ...]) -> dict[str, Any]:
    """One token of every row, written into its cache."""
    import jax
    import jax.numpy as jnp
    from flaxzoo.layers.kernels.cache_update import write_tiles

    batch, length, heads = case
    shapes = [jax.ShapeDtypeStruct((batch, heads, slots, 128), jnp.bfloat16) for slots in (length, 1)]
    index = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return {"us": measure(compiler, chip, write_tiles, (*shapes, index))["us"]}


def grouped(compiler: Compiler, chip: str, case: tuple[int, ...], outer: bool) -> dict[str, Any]:
    """XLA's product of grouped rows with matrices, or with other rows."""
    import jax
    import jax.numpy as jnp
    from flaxzoo.layers.kernels.grouped.matmul import _outer_ragged, _ragged

    rows, groups, inputs, outputs = case
    sizes = np.random.default_rng(0).multinomial(rows, np.full(groups, 1 / groups))
    knows_tiles(sizes)
    right = (rows, outputs) if outer else (groups, inputs, outputs)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, inputs), right)]
    arguments = *shapes, jax.ShapeDtypeStruct((groups,), jnp.int32)
    found = measure(compiler, chip, _outer_ragged if outer else _ragged, arguments)
    worked = found["us"] * found["issue_cycles"] / found["cycles"]
    peak = 2 * rows * inputs * outputs / found["us"] / tpu_static.CHIPS[found["chip"]]["peak"] / 1e6
    return {"us": found["us"], "over": worked / found["mxu_bound_us"], "share": peak, "tiling": found["tiling"]}


def measure(compiler: Compiler, chip: str, function: Any, arguments: Any) -> dict[str, Any]:
    """The longest kernel of a program. Raises ValueError where the schedule has branches that nothing decides."""
    tilings: list[str] = []
    split = tpu_static.split_type

    def split_type(text: str) -> Any:
        tilings.extend(re.findall(r'ragged_dot_tiling="([\d,]+)"', text))
        return split(text)

    tpu_static.split_type = split_type
    try:
        found = tpu_static.analyze(function, arguments, TOPOLOGIES[chip], compiler.dump, compiler.devices(chip))
    finally:
        tpu_static.split_type = split
    kernel = max(found["kernels"].values(), key=lambda kernel: kernel["us"])
    if kernel["unknown_branches"]:
        raise ValueError(f"branches that nothing decides: {kernel['unknown_branches']}")
    return kernel | {"chip": found["chip"], "tiling": tilings[0] if tilings else ""}


def page(facts: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    from flaxzoo.train.plan.chips import tpus
    from flaxzoo.train.plan.kernels import grouped_seconds, outer_seconds, put_seconds

    named = {chip.name: chip for chip in tpus().values()}

    lines = [
        "# Kernels of which `zoo plan` has a model",
        "",
        f"By the compiler's schedule; jax {facts['jax']}, libtpu {facts['libtpu']}, {facts['date']}. "
        "Written by `benchmarks/attention/kernels.py`.",
        "",
        "Attention of one token to a full cache, bfloat16, head dim 128; *share* of the HBM's published speed.",
        "",
        "| chip | documents x tokens, heads | us | share |",
        "|---|---|--:|--:|",
    ]
    for row in rows:
        if row["kind"] == "decode":
            batch, length, heads, kv_heads = row["case"]
            name = f"{batch} x {length}, {heads}:{kv_heads}"
            lines.append(f"| {row['chip']} | {name} | {row['us']:.0f} | {row['share']:.0%} |")
    lines += [
        "",
        "One token of every row, written into its cache; *model* is what `zoo plan` says by what the schedule says.",
        "",
        "| chip | rows x slots, heads | us | model |",
        "|---|---|--:|--:|",
    ]
    for row in rows:
        if row["kind"] == "put":
            batch, length, heads = row["case"]
            told = put_seconds(named[row["chip"]], (batch, heads, length, 128), 2)
            lines.append(
                f"| {row['chip']} | {batch} x {length}, {heads} | {row['us']:.1f} | {told / row['us'] * 1e6:.2f} |"
            )
    lines += [
        "",
        "XLA's products of grouped rows, bfloat16, loads drawn at random; *outer* is the sum over the rows of a group. "
        "*Over* are its cycles without waits by those of the matrix units, *share* is that of the peak, *model* what "
        "`zoo plan` says by what the schedule says.",
        "",
        "| chip | rows, groups, inputs x outputs | | tiles | us | over | share | model |",
        "|---|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["kind"] in ("grouped", "outer"):
            count, groups, inputs, outputs = row["case"]
            tiles = [int(size) for size in row["tiling"].split(",")]
            told = (outer_seconds if row["kind"] == "outer" else grouped_seconds)(
                named[row["chip"]], count, (groups, inputs, outputs), tiles, 2
            )
            name = f"{count}, {groups}, {inputs} x {outputs}"
            kind = "outer" if row["kind"] == "outer" else ""
            lines.append(
                f"| {row['chip']} | {name} | {kind} | {row['tiling']} | {row['us']:.0f} | {row['over']:.2f} "
                f"| {row['share']:.0%} | {told / row['us'] * 1e6:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints and writes."""
    wanted = sys.argv[1].split(",") if len(sys.argv) > 1 else list(TOPOLOGIES)
    file = RESULTS / "kernels.json"
    rows = [row for row in json.loads(file.read_text())["rows"] if row["chip"] not in wanted] if file.exists() else []
    compiler = Compiler()
    try:
        for chip in wanted:
            new = [{"kind": "decode", "case": case, **decode(compiler, chip, case)} for case in DECODE]
            new += [{"kind": "put", "case": case, **put(compiler, chip, case)} for case in PUT]
            for kind in ("grouped", "outer"):
                for case in GROUPED:
                    try:
                        found = grouped(compiler, chip, case, kind == "outer")
                    except ValueError as error:
                        print(chip, kind, case, error, file=sys.stderr)
                        continue
                    new.append({"kind": kind, "case": case, **found})
            rows += [{"chip": chip, **row} for row in new]
    finally:
        compiler.close()
    rows.sort(key=lambda row: list(TOPOLOGIES).index(row["chip"]))
    facts = {name: version(name) for name in ("jax", "libtpu")} | {"date": str(datetime.date.today())}
    file.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    text = page(facts, rows)
    file.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

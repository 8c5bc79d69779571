"""Attention beside the best there is: on TPU by the compiler's own schedule, its mask processing, and on this CPU.

    make bench-attention                              measure all, and write benchmarks/results/attention.{json,md}
    make bench-attention ARGS="chips --chips v5e"     a part of it: chips, masks or cpu

No TPU is needed: libtpu compiles for the chips, and tpu_static.py executes the scalar core of the schedule that it
makes, with a model of HBM behind the copies. Its times are deterministic. On v5e they were within some percent of
measured ones; elsewhere they serve to compare programs on the same chip, and no more.
"""

import argparse
import contextlib
import datetime
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CASES = {
    "causal 4K, 8:8, 128": {"length": 4096, "heads": 8, "kv_heads": 8, "size": 128, "window": 0},
    "causal 4K, 32:8, 128": {"length": 4096, "heads": 32, "kv_heads": 8, "size": 128, "window": 0},
    "causal 4K, 4:4, 64": {"length": 4096, "heads": 4, "kv_heads": 4, "size": 64, "window": 0},
    "causal 4K, 4:4, 256": {"length": 4096, "heads": 4, "kv_heads": 4, "size": 256, "window": 0},
    "causal 16K, 1:1, 128": {"length": 16384, "heads": 1, "kv_heads": 1, "size": 128, "window": 0},
    "window 4096 16K, 1:1, 128": {"length": 16384, "heads": 1, "kv_heads": 1, "size": 128, "window": 4096},
}
SPLASH = {
    "forward": [{"block": 1024, "compute": 512}, {"block": 1024, "compute": 256}],
    "backward": [{"block": 1024, "compute": 1024}, {"block": 1024, "compute": 512}],
}
"""Of blocks of 512 to 4096 the fastest on every chip."""

# Chips, each in a process of its own ----------------------------------------------------------------------------------


def ours(case: dict[str, int], backward: bool, kind: str) -> Any:
    """A program for tpu_static: a function and its arguments, the schedule as numbers."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flaxzoo.layers.kernels import blocks, pairs, tpu, tpu_backward, tpu_forward, tpu_parts
    from flaxzoo.layers.kernels.problem import Operands, Problem
    from flaxzoo.layers.masks import Causal, Window

    length, heads, kv_heads, size = (case[name] for name in ("length", "heads", "kv_heads", "size"))
    mask = Causal() & Window(case["window"]) if case["window"] else Causal()
    traced = pairs.trace(mask.visible)
    problem = Problem(traced, None, size**-0.5, jnp.bfloat16, causal=True, mask_sides=[])
    shapes = [jax.ShapeDtypeStruct((1, n, length, size), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]

    def operands(q: Any, k: Any, v: Any) -> Operands:
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        return Operands(q, k, v, [], [], None, None)

    chosen, sizes = tpu.CHIPS.get(kind, tpu.USUAL), pairs.Sizes(1, heads, length, length)
    found = blocks.classify(traced, [], sizes, chosen.block_q, chosen.block_k, kv_heads=kv_heads, transposed=backward)
    schedule = np.asarray(tpu_parts.schedule(found))

    def forward(schedule: Any, q: Any, k: Any, v: Any) -> Any:
        setattr(tpu_forward, "schedule", lambda _: schedule)  # noqa: B010
        out, lse = tpu.forward(problem, operands(q, k, v), chosen=chosen)
        return jnp.swapaxes(out, 1, 2), lse

    def gradients(schedule: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, g: Any) -> Any:
        setattr(tpu_backward, "schedule", lambda _: schedule)  # noqa: B010
        delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), axis=-1)
        found = tpu.backward(problem, operands(q, k, v), lse, delta, jnp.swapaxes(g, 1, 2), chosen=chosen)
        return [jnp.swapaxes(x, 1, 2) for x in found[:3]]

    if not backward:
        return forward, (schedule, *shapes)
    lse = jax.ShapeDtypeStruct((1, heads, length), jnp.float32)
    return gradients, (schedule, *shapes, shapes[0], lse, shapes[0])


def splash(case: dict[str, int], backward: bool, block: int, compute: int) -> Any:
    """The kernel of JAX for the same."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, kv_heads, size = (case[name] for name in ("length", "heads", "kv_heads", "size"))
    one = masks.CausalMask((length, length))
    if case["window"]:
        one = masks.LocalMask((length, length), (case["window"] - 1, 0), 0)
    group = heads // kv_heads
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
    sizes: Any = dict.fromkeys(names, block) | {"block_kv_compute": compute, "block_kv_dkv_compute": compute}
    make: Any = kernels.make_splash_mqa_single_device if group > 1 else kernels.make_splash_mha_single_device
    kernel = make(
        masks.MultiHeadMask([one] * (group if group > 1 else heads)),
        block_sizes=kernels.BlockSizes(**sizes, use_fused_bwd_kernel=True),
    )

    def forward(q: Any, k: Any, v: Any) -> Any:
        if group == 1:
            return kernel(q, k, v)
        return jax.vmap(kernel)(q.reshape(kv_heads, group, length, size), k, v).reshape(q.shape)

    shapes = [jax.ShapeDtypeStruct((n, length, size), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
    if not backward:
        return forward, tuple(shapes)
    return lambda q, k, v, g: jax.vjp(forward, q, k, v)[1](g), (*shapes, shapes[0])


def chip(connection: Any, name: str, cases: list[str]) -> None:
    """Sends a row for each case and pass, then None."""
    import tpu_static

    dump = tempfile.mkdtemp(prefix="attention_")
    try:
        tpu_static.setup_env(dump)
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name]).devices
        read_slices_of_operands(tpu_static)

        def measure(program: Any, backward: bool) -> dict[str, Any]:
            function, arguments = program
            found = tpu_static.analyze(function, arguments, CHIPS[name], dump, devices, None, False)
            wanted = {n: k for n, k in found["kernels"].items() if not backward or "fwd" not in n}
            left_out = sum(k["us"] for n, k in found["kernels"].items() if n not in wanted)
            (kernel,) = sorted(wanted.values(), key=lambda k: -k["us"])[:1]
            return {
                "us": sum(k["us"] for k in wanted.values()),
                "program_us": found["raw_us"] - left_out,
                "hbm_bytes": found["hbm_bytes_per_device"],
                "temp_bytes": found["memory"]["temp"],
                "units": {unit: round(share, 2) for unit, share in kernel.get("slot_util", {}).items()},
            }

        for case in cases:
            for mode, settings in SPLASH.items():
                backward = mode == "backward"
                mine = measure(ours(CASES[case], backward, devices[0].device_kind), backward)
                theirs = []
                for setting in settings:
                    with contextlib.suppress(Exception):  # blocks that do not fit
                        theirs.append(measure(splash(CASES[case], backward, **setting), backward) | setting)
                best = min(theirs, key=lambda row: row["us"])
                connection.send({"chip": name, "case": case, "pass": mode, "ours": mine, "splash": best})
    finally:
        shutil.rmtree(dump, ignore_errors=True)
        connection.send(None)


def read_slices_of_operands(tpu_static: Any) -> None:
    """Teaches the emulator copies of a part of an operand to SMEM: the rows of our schedule are streamed."""
    whole = tpu_static.Emulator.dma

    def dma(self: Any, operation: Any) -> Any:
        source, size = self.val(operation.args[0]), self.val(operation.args[1])
        if not operation.opc.split(".")[1].endswith("smem") or source is None or size is None:
            return whole(self, operation)
        for index, base in self.base.items():
            words = self.ow.get(index)
            for start in (base, base << 4) if words else ():
                offset = (source - start) * self.g // 4
                if 0 < offset < len(words):
                    argument = operation.args[0]
                    self.ow = self.ow | {index: words[offset : offset + tpu_static.u32(size) * self.g // 4]}
                    operation.args[0] = ("c", tpu_static.s32(start))
                    try:
                        whole(self, operation)
                    finally:
                        operation.args[0], self.ow = argument, self.ow | {index: words}
                    self.dma_src = hash((self.dma_src, source))
                    return None
        return whole(self, operation)

    tpu_static.Emulator.dma = dma


# Mask processing, and this CPU ----------------------------------------------------------------------------------------


def masks(connection: Any, quick: bool) -> None:
    """Seconds and bytes of the schedules of three masks, and splash's where it does not take many minutes."""
    import jax.numpy as jnp
    import numpy as np
    from flaxzoo.layers.kernels import blocks, pairs
    from flaxzoo.layers.masks import Causal, Documents, Window
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as their_masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as their_info

    for length in (2**15, 2**17, 2**20):
        ids = jnp.asarray(np.repeat(np.arange(1, 65), length // 64)[None], jnp.int32)
        ours = {"causal": Causal(), "window 4096": Causal() & Window(4096), "documents": Causal() & Documents(ids)}
        for name, mask in ours.items():
            began = time.perf_counter()
            function, sizes = pairs.trace(mask.visible), pairs.Sizes(1, 1, length, length)
            found = blocks.classify(function, function.side_values(sizes), sizes, 1024, 1024, kv_heads=1)
            row: dict[str, Any] = {"length": length, "mask": name, "seconds": time.perf_counter() - began}
            row["bytes"] = found.nbytes
            their: Any = their_masks.CausalMask((length, length))
            if name == "window 4096":
                their = their_masks.LocalMask((length, length), (4095, 0), 0)
            if name != "documents" and length <= (2**15 if quick else 2**17):
                began = time.perf_counter()
                info, _ = their_info.process_mask(their_masks.MultiHeadMask([their]), (1024, 1024))
                row["splash_seconds"] = time.perf_counter() - began
                row["splash_bytes"] = sum(x.nbytes for x in info if isinstance(x, np.ndarray))
            connection.send(row)
    connection.send(None)


def cpu(connection: Any, quick: bool) -> None:
    """Seconds and temporary bytes of ours and of `jax.nn.dot_product_attention`, in turns."""
    import jax
    import jax.numpy as jnp
    from flaxzoo.layers.kernels import attend
    from flaxzoo.layers.masks import Causal, Window

    functions = {
        "ours, causal": lambda q, k, v: attend(q, k, v, mask=Causal()),
        "ours, window 512": lambda q, k, v: attend(q, k, v, mask=Causal() & Window(512)),
        "jax.nn, causal": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
    }
    for length in (2048, 4096) if quick else (2048, 4096, 8192):
        q, k, v = (jax.random.normal(jax.random.key(i), (1, length, 8, 64)) for i in range(3))
        programs = {}
        for name, function in functions.items():
            gradient = jax.grad(lambda q, k, v, f=function: jnp.sum(f(q, k, v)), (0, 1, 2))
            for mode, one in (("forward", function), ("gradient", gradient)):
                programs[name, mode] = jax.jit(one).lower(q, k, v).compile()
        times: dict[Any, list[float]] = {key: [] for key in programs}
        for turn in range(4):
            for key in list(programs)[:: 1 - 2 * (turn % 2)]:
                began = time.perf_counter()
                jax.block_until_ready(programs[key](q, k, v))
                times[key].append(time.perf_counter() - began)
        for (name, mode), program in programs.items():
            seconds = statistics.median(times[name, mode][1:])
            temp = program.memory_analysis().temp_size_in_bytes
            connection.send({"length": length, "name": name, "mode": mode, "seconds": seconds, "temp_bytes": temp})
    connection.send(None)


# In the main process --------------------------------------------------------------------------------------------------


def gathered(function: Any, *arguments: Any) -> list[dict[str, Any]]:
    """What a function sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=function, args=(other, *arguments), daemon=True)
    process.start()
    other.close()
    rows = []
    while (row := mine.recv()) is not None:
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    process.join()
    return rows


def markdown(facts: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    """The page a reader sees."""
    lines = ["# Attention beside the best there is", "", f"Written by `make bench-attention`, {facts['date']}; "]
    lines[-1] += ", ".join(f"{name} {number}" for name, number in facts["versions"].items()) + "."
    if rows := found.get("chips"):
        lines += [
            "",
            "## TPU, by the compiler's schedule",
            "",
            "bfloat16, one sequence; heads as query:key/value, then",
        ]
        lines[-1] += (
            " head dim. Predicted microseconds of the kernels, and of the program around them; splash at its best"
        )
        lines += [
            "blocks. Temporary HBM in MiB.",
            "",
            "| chip | case | pass | ours | splash | ratio | program | temp | units |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for row in rows:
            a, b = row["ours"], row["splash"]
            busy = ", ".join(
                f"{unit} {share:.0%}" for unit, share in sorted(a["units"].items(), key=lambda x: -x[1])[:2]
            )
            ratio, program = a["us"] / b["us"], a["program_us"] / b["program_us"]
            lines.append(
                f"| {row['chip']} | {row['case']} | {row['pass']} | {a['us']:.0f} | {b['us']:.0f} | {ratio:.2f} "
                f"| {program:.2f} | {a['temp_bytes'] >> 20} : {b['temp_bytes'] >> 20} | {busy} |"
            )
        ratios = [row["ours"]["us"] / row["splash"]["us"] for row in rows]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        lines += ["", f"Geometric mean of the ratios {mean:.2f}, the largest {max(ratios):.2f}."]
    if rows := found.get("masks"):
        lines += [
            "",
            "## Mask schedules",
            "",
            "Blocks of 1024.",
            "",
            "| tokens | mask | ours | splash |",
            "|---|---|---|---|",
        ]
        for row in rows:
            theirs = "-"
            if "splash_seconds" in row:
                theirs = f"{row['splash_seconds']:.2f} s, {row['splash_bytes'] / 1024:,.0f} KiB"
            mine = f"{row['seconds']:.3f} s, {row['bytes'] / 1024:,.0f} KiB"
            lines.append(f"| {row['length']:,} | {row['mask']} | {mine} | {theirs} |")
    if rows := found.get("cpu"):
        lines += [
            "",
            f"## This CPU ({facts['cores']} cores)",
            "",
            "8 heads of 64, float32; medians of 3, in turns.",
            "",
        ]
        lines += ["| tokens | | pass | seconds | temporary MiB |", "|---|---|---|---|---|"]
        for row in rows:
            seconds, temp = f"{row['seconds']:.3f}", f"{row['temp_bytes'] / 2**20:,.0f}"
            lines.append(f"| {row['length']:,} | {row['name']} | {row['mode']} | {seconds} | {temp} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="chips, masks, cpu; all if none is named")
    parser.add_argument("--chips", default=",".join(CHIPS), help="of " + ", ".join(CHIPS))
    parser.add_argument("--quick", action="store_true", help="one case a chip, short lengths")
    arguments = parser.parse_args()
    parts = arguments.parts or ["chips", "masks", "cpu"]
    if unknown := set(parts) - {"chips", "masks", "cpu"}:
        parser.error(f"parts are chips, masks and cpu, got {', '.join(unknown)}")
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}  # for the children
    saved = RESULTS / "attention.json"
    found = json.loads(saved.read_text())["found"] if saved.exists() else {}
    if "chips" in parts:
        cases = list(CASES)[: 1 if arguments.quick else None]
        found["chips"] = [row for name in arguments.chips.split(",") for row in gathered(chip, name, cases)]
    found |= {name: gathered(part, arguments.quick) for name, part in (("masks", masks), ("cpu", cpu)) if name in parts}
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "libtpu")},
    }
    saved.write_text(json.dumps({"facts": facts, "found": found}, indent=1) + "\n")
    page = markdown(facts, found)
    (RESULTS / "attention.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()

"""Our training step beside a plain one: speed, compile time, peak memory; and our compile time by depth.

    make bench-train                      measure, print, and write benchmarks/results/train.{json,md}
    make bench-train ARGS="--check"       and fail where a target is missed

The run is `configs.runs.bench_cpu` at a constant learning rate, on one CPU device. Ours is what `zoo train` runs, with
its document masks and its guard against bad steps; plain.py has neither. Both start from the same parameters and see
the same batches, and every loss and gradient norm must agree.

Each variant is a process of its own, so that peak memory is its own, and they take turns, so that a busy machine slows
both. Numbers are medians. CPU seconds are user and system time of the process; wall seconds tell also how well the work
is spread over cores. By CPU seconds, which other programs disturb less, a target is met or not.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from processes import Child, Times, serve

RESULTS = Path(__file__).parent / "results"
PARAMETERS = "parameters.npz"
LAYERS = 8
DEPTHS = (8, 32, 64)
PHASES = ("trace", "lower", "compile")

# In processes of their own: functions (connection, layers, folder). JAX is imported in these alone. ------------------


def prepare(connection: Any, layers: int, folder: Path) -> None:
    """Writes the parameters that both start from, and sends what a batch looks like."""
    import jax
    import numpy as np
    from flaxzoo.train.distributed import mesh as meshes
    from flaxzoo.train.step import initial_state

    run = bench_run(layers)
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        params = jax.device_get(initial_state(run, mesh)["params"])
    np.savez(folder / PARAMETERS, **params)
    size = sum(x.size for x in params.values())
    connection.send({"shape": (run.batch, run.length), "vocab": run.model.vocab, "parameters": size})


def ours(connection: Any, layers: int, folder: Path) -> None:
    """Our step, on the mesh and with the strictness of `zoo train`."""
    import jax
    import jax.numpy as jnp
    from flaxzoo.train.distributed import mesh as meshes
    from flaxzoo.train.step import initial_state, make_step

    run = bench_run(layers)
    mesh, _ = meshes.make(run)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    integers, reals = (
        jax.ShapeDtypeStruct((run.batch, run.length), d, sharding=whole) for d in (jnp.int32, jnp.float32)
    )
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), integers) | {"weights": reals}
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(lambda: initial_state(run, mesh))
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
        serve(connection, lambda: make_step(run), state, batch, lambda: initial_state(run, mesh))


def plain(connection: Any, layers: int, folder: Path) -> None:
    """The step of plain.py."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import plain as model

    def initial_state() -> Any:
        with np.load(folder / PARAMETERS) as file:
            return model.initial_state(jax.tree.map(lambda name: jnp.asarray(file[name]), model.NAMES))

    run = bench_run(layers)
    batch = {name: jax.ShapeDtypeStruct((run.batch, run.length), jnp.int32) for name in ("tokens", "targets")}
    serve(
        connection, lambda: jax.jit(model.step, donate_argnums=0), jax.eval_shape(initial_state), batch, initial_state
    )


def bench_run(layers: int) -> Any:
    from flaxzoo.configs.runs import bench_cpu

    changes = {"model.layers": layers, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
    return bench_cpu().replace(**changes)


# In the main process --------------------------------------------------------------------------------------------------


def measure(steps: int, rounds: int) -> dict[str, Any]:
    """All numbers: compile times of `rounds` fresh processes, times of `steps` steps after a first one."""
    variants = {"ours": ours, "plain": plain}
    compiles: dict[str, list[dict[str, Times]]] = {}
    done: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = Child(prepare, LAYERS, folder).first
        jobs = [(name, LAYERS) for name in variants] + [("ours", depth) for depth in DEPTHS if depth != LAYERS]
        for turn in range(rounds):
            for variant, depth in jobs[:: 1 - 2 * (turn % 2)]:
                child = Child(variants[variant], depth, folder)
                compiles.setdefault(f"{variant} {depth}", []).append(child.first)
                child.end()
                say(f"compile round {turn + 1}/{rounds}: {variant}, {depth} layers, {total(child.first, 'wall'):.1f} s")
        children = {name: Child(function, LAYERS, folder) for name, function in variants.items()}
        for step in range(steps + 1):
            batch = random_batch(step, facts["vocab"], facts["shape"])
            for name in list(children)[:: 1 - 2 * (step % 2)]:
                done[name].append(children[name].ask(batch))
            a, b = done["ours"][-1], done["plain"][-1]
            say(f"step {step}/{steps}: " + ", ".join(f"{n} {done[n][-1]['cpu']:.1f} CPU s" for n in done))
            for quantity in ("loss", "gradient_norm"):
                if abs(a[quantity] / b[quantity] - 1) > 1e-4:
                    raise SystemExit(f"not the same model: step {step}, {quantity} {a[quantity]} and {b[quantity]}")
        peaks = {name: child.end() for name, child in children.items()}
    return facts | {"compiles": compiles, "steps": {n: all_[1:] for n, all_ in done.items()}, "peak_bytes": peaks}


def random_batch(seed: int, vocab: int, shape: tuple[int, int]) -> dict[str, Any]:
    import numpy as np

    batch, length = shape
    tokens = np.random.default_rng(seed).integers(0, vocab, (batch, length + 1), dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    ones = np.ones_like(positions)
    documents = {"segments": ones, "positions": positions, "weights": ones.astype(np.float32)}
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]} | documents


def total(times: dict[str, Times], clock: str) -> float:
    return sum(times[phase][clock] for phase in PHASES)


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, the ratios that are targets, and whether each is met."""
    tokens = found["shape"][0] * found["shape"][1]
    step = {
        n: {c: statistics.median(s[c] for s in all_) for c in ("wall", "cpu")} for n, all_ in found["steps"].items()
    }
    speed = {n: {c: tokens / step[n][c] for c in ("wall", "cpu")} for n in step}
    compiles = {
        name: {p: {c: statistics.median(r[p][c] for r in all_) for c in ("wall", "cpu")} for p in PHASES}
        | {"total": {c: statistics.median(total(r, c) for r in all_) for c in ("wall", "cpu")}}
        for name, all_ in found["compiles"].items()
    }
    at = {name: times["total"] for name, times in compiles.items()}
    depths = [at[f"ours {depth}"] for depth in DEPTHS]
    clocks, peaks = ("wall", "cpu"), found["peak_bytes"]
    targets = {
        "speed, ours / plain": (">=", 1.0, {c: speed["ours"][c] / speed["plain"][c] for c in clocks}),
        "compile time, ours / plain": ("<=", 1.0, {c: depths[0][c] / at[f"plain {LAYERS}"][c] for c in clocks}),
        "peak memory, ours / plain": ("<=", 1.0, dict.fromkeys(clocks, peaks["ours"] / peaks["plain"])),
        "compile time by depth, longest / shortest": (
            "<=", 1.3, {c: max(d[c] for d in depths) / min(d[c] for d in depths) for c in clocks},
        ),
    }  # fmt: skip
    rows = {
        name: {"target": f"{sign} {bound}", "met": r["cpu"] >= bound if sign == ">=" else r["cpu"] <= bound} | r
        for name, (sign, bound, r) in targets.items()
    }
    return {"targets": rows, "step": step, "tokens_per_second": speed, "compile": compiles, "peak_bytes": peaks}


def markdown(facts: dict[str, Any], found: dict[str, Any]) -> str:
    """The page a reader sees."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        "# Training step, ours beside plain JAX",
        "",
        f"Written by `make bench-train`, {facts['date']}. {facts['model']}.",
        f"{facts['cpu']}, {facts['cores']} cores; {versions}.",
        f"Medians of {facts['steps']} steps and {facts['rounds']} compilations, in turns. Seconds: wall (CPU).",
        "",
        "| target | wanted | by CPU time | by wall time | |",
        "|---|---|---|---|---|",
    ]
    for name, t in found["targets"].items():
        met = "met" if t["met"] else "MISSED"
        lines.append(f"| {name} | {t['target']} | {t['cpu']:.2f} | {t['wall']:.2f} | {met} |")
    lines += ["", "| | seconds a step | tokens a second | peak memory |", "|---|---|---|---|"]
    for name, times in found["step"].items():
        speed, peak = pair(found["tokens_per_second"][name], 0), found["peak_bytes"][name] / 2**20
        lines.append(f"| {name} | {pair(times, 2)} | {speed} | {peak:.0f} MiB |")
    lines += ["", "| compile | trace | lower | compile | total |", "|---|---|---|---|---|"]
    for name, times in found["compile"].items():
        lines.append(f"| {name} layers | {' | '.join(pair(times[p], 2) for p in (*PHASES, 'total'))} |")
    return "\n".join([*lines, ""])


def pair(times: Times, digits: int) -> str:
    return f"{times['wall']:.{digits}f} ({times['cpu']:.{digits}f})"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each variant")
    parser.add_argument("--rounds", type=int, default=3, help="compilations of each variant and depth")
    parser.add_argument("--quick", action="store_true", help="2 steps, 1 round: to see that it works")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    arguments = parser.parse_args()
    steps, rounds = (2, 1) if arguments.quick else (arguments.steps, arguments.rounds)
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}  # for the children
    found = measure(steps, rounds)
    summary = summarise(found)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": f"{found['parameters'] / 1e6:.1f}M parameters, batch and length {found['shape']}, float32",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("jax", "jaxlib", "flax", "optax")},
        "steps": steps,
        "rounds": rounds,
    }
    RESULTS.mkdir(exist_ok=True)
    raw = {name: found[name] for name in ("steps", "compiles")}
    (RESULTS / "train.json").write_text(json.dumps({"facts": facts, "summary": summary, "raw": raw}, indent=1) + "\n")
    (RESULTS / "train.md").write_text(markdown(facts, summary))
    print(markdown(facts, summary))
    if arguments.check and not all(target["met"] for target in summary["targets"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

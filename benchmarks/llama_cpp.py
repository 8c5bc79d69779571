"""GGUF files that we write, read by llama.cpp: does it compute what we compute from them?

    pip install xllamacpp                               llama.cpp, built, with bindings
    python benchmarks/llama_cpp.py                      compare, print, and write benchmarks/results/llama_cpp.md
    python benchmarks/llama_cpp.py --file model.gguf    another file instead; nothing is written

Every tiny checkpoint under tests/truth is written in both formats, and both programs give the log-probabilities of the
next token after several lengths of text. llama.cpp rounds activations to those formats where it multiplies; we compute
in float32. A swapped row, a wrong norm, base of RoPE, window or activation would be off by the spread of the logits.
"""

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/llama_cpp.md"
LENGTHS = (3, 8, 24)
NOT_KNOWN = ("ministral", "stablelm", "stablelm_parallel")
"""What we do not write."""
NOTES = {
    "deepseek_v2": "not loaded: llama.cpp tells models without q_lora_rank by their 27 layers",
    "deepseek_v2_limited": "llama.cpp scores groups of experts by their best two, as in V3; V2 by their best one",
}
NOT_SAID = {"query_pre_attn_scalar", "sliding_window"}
TEXT = "The quick brown fox, aged 12345 days, doesn't jump over   the lazy dog.\n\tNaïve café; 你好 🤖"


class LlamaCpp:
    """A file in llama.cpp."""

    def __init__(self, path: Path):
        import xllamacpp  # pyright: ignore[reportMissingImports]

        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.n_gpu_layers = str(path), 512, 0
        parameters.warmup = False
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(parameters)

    def next(self, ids: list[int], count: int) -> dict[int, float]:
        """Log-probabilities of the most likely next tokens."""
        asked = {"prompt": ids, "n_predict": 1, "n_probs": count, "temperature": 1.0, "samplers": [], "seed": 1}
        answer = self._server.handle_completions({**asked, "cache_prompt": False})
        (token,) = (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]["logprobs"]["content"]
        return {one["id"]: one["logprob"] for one in token["top_logprobs"]}


def tokenizer(rows: int) -> Any:
    """Tokens that say nothing: llama.cpp wants some."""
    from tokenizers import Tokenizer, models, normalizers

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(rows - 3))]
    vocab = {name: index for index, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens(names[:3])
    return made


def difference(path: Path, ids: list[int], count: int) -> tuple[float, float]:
    """The largest difference of log-probabilities, and between what lengths of text they spread."""
    import jax
    from flaxzoo import zoo

    model, _ = zoo.load(path)
    logits, theirs = np.asarray(model(jax.numpy.asarray([ids], jax.numpy.int32))[0][0]), LlamaCpp(path)
    worst, spread = 0.0, 0.0
    for length in LENGTHS:
        ours = np.asarray(jax.nn.log_softmax(logits[length - 1]))
        found = theirs.next(ids[:length], count)
        worst = max(worst, *(abs(float(ours[token]) - value) for token, value in found.items()))
        spread = max(spread, max(found.values()) - min(found.values()))
    return worst, spread


def written(folder: Path, path: Path, quantization: str) -> dict[str, Any]:
    """Writes a checkpoint's file, and returns what had to be changed in its config for GGUF to say it."""
    from flaxzoo import zoo
    from flaxzoo.zoo.formats.gguf import save_gguf

    source: Any = zoo.open_source(folder)
    source.tokenizer = lambda: tokenizer(source.config["vocab_size"])
    try:
        save_gguf(source, path, quantization)
        return {}
    except ValueError as error:
        changes = {name: None for name in NOT_SAID if f"cannot say {name}=" in str(error)}
        changes |= {name: source.config["head_dim"] for name in changes if name == "query_pre_attn_scalar"}
        if not changes:
            raise
        source.config = source.config | changes
        save_gguf(source, path, quantization)
        return changes


def table() -> list[str]:
    lines = ["| checkpoint | F16 | Q8_0 | spread | changed, as GGUF cannot say it; notes |", "|---|---|---|---|---|"]
    ids = [int(x) for x in np.random.default_rng(0).integers(3, 150, max(LENGTHS))]
    with tempfile.TemporaryDirectory() as aside:
        for folder in sorted(one.parent for one in (ROOT / "tests/truth").glob("*/model.safetensors")):
            if folder.name in NOT_KNOWN:
                continue
            cells, changes, spread = [], {}, 0.0
            for quantization in ("F16", "Q8_0"):
                path = Path(aside) / f"{folder.name}-{quantization}.gguf"
                changes = written(folder, path, quantization)
                try:
                    worst, spread = difference(path, ids, 160)
                    cells.append(f"{worst:.4f}")
                except RuntimeError:
                    assert folder.name in NOTES
                    cells.append("")
            said = NOTES.get(folder.name, ", ".join(f"{name}={value}" for name, value in changes.items()))
            lines.append(f"| {folder.name} | {' | '.join(cells)} | {spread:.1f} | {said} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    file = parser.parse_args().file
    if file is not None:
        from flaxzoo.zoo.formats.gguf import GgufFile

        known = GgufFile(file).tokenizer()
        assert known is not None
        ids = known.encode(TEXT).ids[: max(LENGTHS)]
        worst, spread = difference(file, ids, 100)
        print(f"{file.name}: largest difference of the 100 most likely tokens {worst:.4f}, spread {spread:.1f}")
        return
    from importlib.metadata import version

    lines = table()
    head = f"""# GGUF files of ours in llama.cpp

Written by `python benchmarks/llama_cpp.py`, {datetime.date.today()}, with xllamacpp {version("xllamacpp")}.
The largest difference of log-probabilities of the next token after {", ".join(map(str, LENGTHS))} tokens, between
llama.cpp and this project from the same file, for the tiny checkpoints of tests/truth; and how far apart the
log-probabilities lie. llama.cpp rounds what it multiplies with matrices to their format, we compute in float32.

"""
    RESULT.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

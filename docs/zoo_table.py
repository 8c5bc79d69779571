"""Measures every family on its truth, and puts the tables into docs/zoo.md: `make docs-zoo`."""

import math
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flaxzoo import zoo
from flaxzoo.configs import MODELS
from flaxzoo.layers.block import Block
from flaxzoo.train.commands.show import cache_bytes, parameters_of
from flaxzoo.train.runs.progress import amount
from flaxzoo.zoo.decoder import Decoder

HERE = Path(__file__).parent
TRUTH = HERE.parent / "tests" / "truth"
# What the names of a family's models start with, where it is not its model_type and an underscore.
PREFIXES = {
    "gpt2": ("gpt2",),
    "llama": ("llama", "smollm2"),
    "gemma3_text": ("gemma3_",),
    "phi3": ("phi",),
    "qwen2": ("qwen2_5", "r1_distill_qwen"),
    "qwen3": ("qwen3_0", "qwen3_1", "qwen3_32b", "qwen3_4b", "qwen3_8b"),
    "qwen3_moe": ("qwen3_30b_a3b", "qwen3_235b_a22b"),
    "deepseek_v3": ("deepseek_v3",),
    "deepseek_v2": ("deepseek_v2", "deepseek_coder"),
}


def measured(folder: Path) -> tuple[float, bool]:
    """The largest difference of the logits to transformers' in float32, and whether saving gives back every bit."""
    source = zoo.open_source(folder)
    truth = np.load(folder / "truth.npz")
    model, _ = zoo.load(source, dtype=jnp.float32)
    valid = truth["attention_mask"] == 1
    logits = np.asarray(jax.jit(model)(jnp.asarray(truth["input_ids"]))[0])
    with tempfile.TemporaryDirectory() as place:
        zoo.save(zoo.load(source)[0], Path(place) / "out", config=source.config)
        again = zoo.open_source(Path(place) / "out")
        same = again.tensors == source.tensors and again.config == source.config
        same = same and all(np.array_equal(again.read(name), source.read(name)) for name in source.tensors)
    return float(np.abs(logits - truth["logits"])[valid].max()), same


def mixer(block: Block, learned: bool) -> str:
    """What mixes the tokens of a block, in words."""
    spec = block.mixer
    heads, kv_heads = getattr(spec, "heads", 0), getattr(spec, "kv_heads", 0)
    plain = "MHA" if heads == kv_heads else "MQA" if kv_heads == 1 else "GQA"
    words = [plain if kv_heads else type(spec).__name__]
    words += ["window"] if getattr(spec, "window", None) else []
    words += ["no positions"] if getattr(spec, "rope", True) is None and not learned else []
    extras = {"sinks": "sinks", "qk_norm": "QK-norm", "soft_cap": "soft cap"}
    words += [word for field, word in extras.items() if getattr(spec, field, None)]
    experts = getattr(block.ffn, "experts", 0)
    return " ".join(words) + (f", {experts} experts" if experts else "")


def kind(decoder: Decoder) -> str:
    """The mixers of a model, and their shares in the pattern of its layers."""
    learned = decoder.max_positions > 0
    words = [mixer(block, learned) for block in decoder.block]
    shares = {word: f"{words.count(word)} of {len(words)} " if len(set(words)) > 1 else "" for word in words}
    first = [f"first {mixer(block, learned)}" for block in decoder.first]
    return ", ".join(dict.fromkeys((*first, *(share + word for word, share in shares.items()))))


def billions(size: int) -> str:
    """A number of parameters as its field writes it: 8.03B."""
    return amount(size).replace("G", "B")


def families() -> list[str]:
    """The rows of the table of families."""
    folders: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(TRUTH.glob("*/model.safetensors")):
        folders[zoo.open_source(path.parent).config["model_type"]].append(path.parent)
    heading = "| family | parameters | attention | largest difference of logits | out and in | cache a token |"
    rows = [heading, "|---|---|---|---|---|---|"]
    for family, places in sorted(folders.items()):
        names = [name for name in MODELS if name.startswith(PREFIXES.get(family, (f"{family}_",)))]
        models = {name: MODELS[name]() for name in names}
        sizes = sorted(sum(known.size for known in parameters_of(model).values()) for model in models.values())
        kinds = [kind(model) for model in models.values()] or [kind(zoo.load(places[0])[0].spec)]
        caches = sorted(cache_bytes(model) / 1024 for model in models.values())
        ends = dict.fromkeys(f"{size:g}" for size in (*caches[:1], *caches[-1:]))
        found = [measured(place) for place in places]
        row = (
            family,
            ", ".join(dict.fromkeys(map(billions, sizes))) or "-",
            "; ".join(dict.fromkeys(kinds)),
            f"{max(difference for difference, _ in found):.1e}",
            "bitwise" if all(same for _, same in found) else "DIFFERS",
            " to ".join(ends) + " KiB" if ends else "-",
        )
        rows.append(f"| {' | '.join(row)} |")
    return rows


def models() -> list[str]:
    """The rows of the table of models."""
    rows = ["| model | parameters | layers | cache a token, bfloat16 | |", "|---|---|---|---|---|"]
    for name, made in MODELS.items():
        model, doc = made(), (made.__doc__ or "").splitlines()[0]
        size = sum(math.prod(known.shape) for known in parameters_of(model).values())
        cache = f"{cache_bytes(model) / 1024:g} KiB"
        rows.append(f"| `{name}` | {size:,} | {model.layers} | {cache} | {doc} |")
    return rows


def main() -> None:
    """Replaces what stands between the marks."""
    page = HERE / "zoo.md"
    text = page.read_text()
    for mark, rows in (("families", families()), ("models", models())):
        table = f"<!-- {mark} -->\n" + "\n".join(rows) + f"\n<!-- end of {mark} -->"
        text, times = re.subn(f"<!-- {mark} -->.*<!-- end of {mark} -->", lambda _, new=table: new, text, flags=re.S)
        assert times == 1, mark
    page.write_text(text)


if __name__ == "__main__":
    main()

"""Makes `gguf/<model>/text.json`: what transformers writes and how it scores text, from the pretrained GGUF files.

    python tests/zoo/formats/gguf/fetch.py .real
    python -m venv /tmp/truth && /tmp/truth/bin/pip install torch==2.13.0 transformers==5.24.0 gguf accelerate jinja2
    /tmp/truth/bin/python tests/truth/make_real.py .real

Nothing of ours takes part: transformers reads the file itself, config, weights and tokenizer, and applies the template
in it. Everything is computed in float32. Greedy text is cut where the most likely token and the second are so close
that rounding may decide. The texts have no digits: transformers, unlike llama.cpp, reads SmolLM2's tokenizer without
its rule for them.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).parent
FILES = {
    "smollm2-135m-instruct-q4_1": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma-3-270m-q4_k_m": "gemma-3-270m-q4_k_m.gguf",
}
TALK = ("What is the capital of France?", "And of Italy?", "Write one sentence about each of them.")
PROMPTS = ("The capital of France is", "Once upon a time, there was a little girl", "def add(a, b):\n")
ENGLISH = "The old man walked slowly along the river, and the dog followed him all the way home."
TEXTS = {
    "english": ENGLISH,
    "disorder": " ".join(sorted(ENGLISH.split())),
    "german": "Der alte Mann ging langsam am Fluss entlang, und der Hund folgte ihm den ganzen Weg nach Hause.",
    "longer": (
        "It was a bright cold day in spring, and the clocks were striking noon. A woman in a green coat crossed the "
        "square, looked up at the tower, and hurried on. Nobody noticed the letter that fell from her pocket, except "
        "for a boy who sold newspapers at the corner. He picked it up, read the name on the envelope, and ran after "
        "her through the crowd; but she was gone. So he went home, and laid the letter on the kitchen table, where his "
        "mother found it in the evening."
    ),
}
LENGTH = 64
"""Of the windows texts are scored in; they move by half of it."""
NEW, SURE = 48, 1e-2
"""Tokens of an answer at most; the least difference of logits that decides."""


def greedy(model: Any, ids: list[int]) -> tuple[list[int], bool, float]:
    """The most likely tokens one after another, whether the last one ends the text, and the least margin."""
    ends, found, least = torch.tensor(model.config.eos_token_id).reshape(-1).tolist(), [], float("inf")
    cache, rest = None, torch.tensor([ids])
    while len(found) < NEW and not (found and found[-1] in ends):
        out = model(rest, past_key_values=cache, use_cache=True)
        (first, second), (token, _) = (x.tolist() for x in out.logits[0, -1].topk(2))
        if first - second < SURE:
            break
        least = min(least, first - second)
        found.append(token)
        cache, rest = out.past_key_values, torch.tensor([[token]])
    return found, found[-1] in ends, least


def nll(model: Any, prefix: int, ids: list[int], bos: bool) -> float:
    """Of all ids, in nats. The model reads LENGTH tokens at once, and windows move by half of it.

    Each window starts with `prefix` if this is a BOS that the tokenizer adds, otherwise the first alone.
    """
    total, scored = 0.0, 0
    while scored < len(ids):
        end = min(len(ids), LENGTH if scored == 0 else scored + LENGTH // 2)
        row = [prefix, *ids[max(0, end - LENGTH) : end]] if bos or end <= LENGTH else ids[end - LENGTH - 1 : end]
        logs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
        total -= float(logs.gather(1, torch.tensor(row[1:])[:, None])[-(end - scored) :].double().sum())
        scored = end
    return total


def write(name: str, path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def told(ids: list[int]) -> dict[str, Any]:
        found, ended, margin = greedy(model, ids)
        text = tokenizer.decode(found[:-1] if ended else found)
        return {"ids": ids, "new_ids": found, "text": text, "ended": ended, "margin": round(margin, 4)}

    talk, messages = [], []
    for question in TALK if tokenizer.chat_template else ():
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        talk.append({"question": question} | told(tokenizer(text, add_special_tokens=False)["input_ids"]))
        messages.append({"role": "assistant", "content": talk[-1]["text"]})
    added = tokenizer("")["input_ids"]
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = {}
    for key, text in TEXTS.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts[key] = {"text": text, "ids": [prefix, *ids], "nll": nll(model, prefix, ids, added == [prefix])}
    found = {
        "by": f"transformers {transformers.__version__}, torch {torch.__version__}, float32",
        "talk": talk,
        "prompts": [{"prompt": one} | told(tokenizer(one)["input_ids"]) for one in PROMPTS],
        "window": LENGTH,
        "scores": texts,
    }
    text = re.sub(
        r"\[[\s\d,]*\]", lambda ids: re.sub(r"\s+", " ", ids[0]), json.dumps(found, ensure_ascii=False, indent=1)
    )
    (HERE / "gguf" / name / "text.json").write_text(text + "\n")


def main() -> None:
    with torch.inference_mode():
        for name, file in FILES.items():
            write(name, Path(sys.argv[1]).resolve() / file)


if __name__ == "__main__":
    main()

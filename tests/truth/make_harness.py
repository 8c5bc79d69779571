"""Makes `harness/`: answers of the Hugging Face backend of lm-evaluation-harness with small tokenizers of five kinds.

    python -m venv /tmp/truth
    /tmp/truth/bin/pip install torch==2.13.0 transformers==5.24.0 lm_eval==0.4.13 accelerate
    /tmp/truth/bin/python tests/truth/make_harness.py

The model is the one in `llama/`, in float32, which reads LENGTH tokens at once. For each tokenizer, `harness/<name>/`
holds tokenizer.json, tokenizer_config.json and answers.json: requests with their answers, null where the backend fails.
The tests need neither torch nor lm-eval.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).parent
LENGTH, VOCAB = 24, 120
TEXT = (
    "The quick brown fox jumps over the lazy dog. A model reads a window of tokens at once, and a text that is longer "
    "goes through it window by window. How likely is the next word, given all that came before it? "
)
SHORT = "the lazy dog reads"
PAIRS = [
    ("The quick brown fox", " jumps over the lazy dog."),
    ("The quick brown fox ", "jumps"),  # the space goes with the continuation
    ("A model reads a wind", "ow of tokens"),  # a token across the boundary
    ("", "How likely is it?"),
    ("", "{prefix}How likely is it?"),
    ("{prefix}", " window by window"),
    ("{prefix}The next", " word"),
    ("given all that came", " before"),
    ("given all that came", " before it? "),
    (TEXT, " window"),  # longer than LENGTH
    (TEXT, " that is longer goes through it"),
    ("a", "\n"),
    ("a", "q"),
    ("a", "qu"),
    ("one token", ""),
    (" ", "jumps over"),
]
TEXTS = [SHORT, TEXT, TEXT[: len(TEXT) // 2], "", "{prefix}" + SHORT, "a"]
UNTIL = [
    ("The quick brown", {"max_gen_toks": 8}),
    ("The quick brown", {"until": ["e"], "max_gen_toks": 16}),
    ("The quick brown", {"until": "o", "max_gen_toks": 16, "do_sample": False}),
    ("{prefix}The quick", {"until": ["th", "{prefix}"], "max_new_tokens": 12, "temperature": 0.0}),
    (TEXT, {"until": ["\n\n"], "max_gen_toks": 10}),
    ("a", {"until": [" "], "max_gen_toks": 20}),
    ("", {"max_gen_toks": 6}),
    ("too long", {"max_gen_toks": LENGTH}),
]


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(TEXT + "\n"))
    letters = sorted({letter for piece, _ in alphabet for letter in piece})
    return _trained(tokenizer, special, letters)


def metaspace(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=special[0]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _trained(tokenizer, special, sorted({*TEXT.replace(" ", "▁"), "\n"}))


def _trained(tokenizer: Tokenizer, special: list[str], letters: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _adding(tokenizer: Tokenizer, template: str, names: list[str]) -> Tokenizer:
    ids = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


END, START, STOP, S, E = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"
TOKENIZERS: dict[str, tuple[Tokenizer, dict[str, str]]] = {
    "no_bos": (byte_level([END]), {"eos_token": END}),  # as GPT-2 and Qwen
    "bos_not_added": (
        byte_level(["<|im_start|>", "<|im_end|>"]),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    ),
    "bos_added": (_adding(byte_level([S, E]), f"{S} $A", [S]), {"bos_token": S, "eos_token": E}),  # as Llama 3, Gemma
    "metaspace": (_adding(metaspace(["<unk>", S, E]), f"{S} $A", [S]), {"bos_token": S, "eos_token": E}),  # as Llama 2
    "bos_and_eos_added": (_adding(byte_level([S, E]), f"{S} $A {E}", [S, E]), {"bos_token": S, "eos_token": E}),
}


def answers(backend: HFLM, prefix: str) -> dict[str, Any]:
    def filled(value: Any) -> Any:
        return json.loads(json.dumps(value).replace("{prefix}", prefix))

    def each(method: Any, requests: list[Any]) -> list[dict[str, Any]]:
        rows = []
        for request in requests:
            arguments = request if isinstance(request, list) else [request]
            try:
                (answer,) = method([SimpleNamespace(args=tuple(arguments), task_name="")], disable_tqdm=True)
            except Exception as error:
                print(f"{type(error).__name__} for {request}: {error}", file=sys.stderr)
                answer = None
            rows.append({"request": request, "answer": answer})
        return rows

    backend.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
    return {
        "loglikelihood": each(backend.loglikelihood, filled(PAIRS)),
        "loglikelihood_rolling": each(backend.loglikelihood_rolling, filled(TEXTS)),
        "generate_until": each(backend.generate_until, filled(UNTIL)),
    }


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama", dtype=torch.float32).eval()
    for name, (tokenizer, special) in TOKENIZERS.items():
        folder = HERE / "harness" / name
        folder.mkdir(parents=True, exist_ok=True)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        fast.pad_token = special["eos_token"]
        model.generation_config.eos_token_id = fast.eos_token_id
        model.generation_config.bos_token_id = fast.bos_token_id
        backend = HFLM(model, tokenizer=fast, max_length=LENGTH, batch_size=1, device="cpu")
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(special) + "\n")
        results = answers(backend, backend.tok_decode([backend.prefix_token_id], skip_special_tokens=False))
        text = ",\n".join(
            f'"{kind}": [\n ' + ",\n ".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]"
            for kind, rows in results.items()
        )
        (folder / "answers.json").write_text("{\n" + text + "}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        main()

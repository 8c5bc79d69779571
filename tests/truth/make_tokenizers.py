"""What transformers and SentencePiece make of tokenizer files; the tests compare it with what we read.

python -m venv /tmp/truth && /tmp/truth/bin/pip install transformers==5.24.0 sentencepiece==0.2.3
/tmp/truth/bin/python tests/truth/make_tokenizers.py
"""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent / "tokenizers"
TEXT = ["The cats' tails weren't long; they'll grow.", "hello world <x> [Y]"] * 3
PROBES = ("hello <x> world [Y] cats", "a<x>b[Y]c", "The cats")
FIRST_ID = 295  # the tokenizer's own tokens end before it
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
GPT2 = CONFIG | {"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>"}


def token(content: str, **flags: bool) -> dict[str, Any]:
    """A token as `added_tokens_decoder` declares it."""
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, **plain, "special": True, **flags}


def declared(x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    """`added_tokens_decoder` with two tokens."""
    return {"tokenizer_config.json": CONFIG | {"added_tokens_decoder": {str(FIRST_ID): x, str(FIRST_ID + 1): y}}}


FILES: dict[str, dict[str, Any]] = {
    "decoder": declared(token("<x>"), token("[Y]")),
    "strips": declared(token("<x>", lstrip=True), token("[Y]", rstrip=True, special=False)),
    "word": declared(token("<x>", single_word=True), token("[Y]")),
    "additional": {"tokenizer_config.json": CONFIG | {"additional_special_tokens": ["<x>"], "pad_token": "[Y]"}},
    "map": {
        "tokenizer_config.json": CONFIG,
        "special_tokens_map.json": {
            "pad_token": token("[Y]", lstrip=True),
            "additional_special_tokens": ["<x>"],
        },
    },
    "added": {"tokenizer_config.json": CONFIG, "added_tokens.json": {"<x>": FIRST_ID, "[Y]": FIRST_ID + 1}},
    "ends": {"tokenizer_config.json": CONFIG | {"add_bos_token": True, "add_eos_token": True}},
    "prefix": {"tokenizer_config.json": GPT2 | {"add_prefix_space": True}},
    "no prefix": {"tokenizer_config.json": GPT2 | {"add_prefix_space": False}},
}
"""Files beside tokenizer.json, by the name of the case."""
PIECES = {
    "llama": {},
    "gemma": {"add_dummy_prefix": False, "bos_id": 2, "eos_id": 1, "pad_id": 0, "unk_id": 3},
    "no_bytes": {"byte_fallback": False, "vocab_size": 120},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "removes": {"remove_extra_whitespaces": True},
}
"""Options of SentencePiece's trainer, by the name of the file; the last two are refused."""
PIECE_PROBES = ("the cats there", "  two  spaces ", "def f(x):\n\treturn", "ß 🤖 你好", "", "▁ a")


def write(name: str, folder: Path) -> None:
    """Writes the folder of a case."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for file, content in FILES[name].items():
        (folder / file).write_text(json.dumps(content))


def main() -> None:
    """Writes the files of SentencePiece, and the ids that both libraries give."""
    import sentencepiece  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]

    ids: dict[str, Any] = {}
    for name in FILES:
        with tempfile.TemporaryDirectory() as folder:
            write(name, Path(folder))
            tokenizer = AutoTokenizer.from_pretrained(folder)
            ids[name] = {text: tokenizer(text)["input_ids"] for text in PROBES}
    lines = ["The cats' tails weren't long; they'll grow. naive café 12345", "abc abcd bcd the then there these"]
    lines += ["  leading  double  spaces", "def f(x):\n    return x ** 2", "你好世界 Ελληνικά"]
    plain = {"model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "normalization_rule_name": "identity"}
    plain |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "pad_id": -1}
    for name, options in PIECES.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 3), model_writer=model, **plain | options
        )
        (FOLDER / f"{name}.model").write_bytes(model.getvalue())
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        ids[f"{name}.model"] = {text: processor.encode(text) for text in PIECE_PROBES}
    (FOLDER / "ids.json").write_text(json.dumps(ids, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

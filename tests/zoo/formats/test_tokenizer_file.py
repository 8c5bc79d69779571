"""What tokenizer files say about themselves: the ids of transformers and SentencePiece, and no text cut or padded."""

import contextlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_checkpoint import TEMPLATE, checkpoint, tokenizer_of_bytes
from flaxzoo import zoo
from flaxzoo.train.data.tokenizer import load_tokenizer
from flaxzoo.zoo.evaluation.harness import HarnessBackend
from flaxzoo.zoo.evaluation.windows import adds_prefix, prefix_token
from flaxzoo.zoo.formats.gguf.tokenizer_out import write_tokenizer
from flaxzoo.zoo.formats.hub import PATTERNS
from flaxzoo.zoo.formats.tokenizer_file import prepare_tokenizer, read_folder_tokenizer
from flaxzoo.zoo.text_encoding import added_ids, encode, encode_batch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

TRUTH = Path(__file__).parents[2] / "truth"
_spec = importlib.util.spec_from_file_location("make_tokenizers", TRUTH / "make_tokenizers.py")
assert _spec is not None
assert _spec.loader is not None
cases: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
IDS = json.loads((TRUTH / "tokenizers" / "ids.json").read_text(encoding="utf-8"))
LONG = "The cats' tails weren't long; they'll grow. hello world, hello cats"


def saved(folder: Path, name: str = "ends") -> Tokenizer:
    cases.write(name, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", cases.FILES)
def test_folder_as_transformers(name: str, tmp_path: Path) -> None:
    cases.write(name, tmp_path)
    tokenizer = read_folder_tokenizer(tmp_path)
    assert tokenizer is not None
    assert {text: tokenizer.encode(text).ids for text in cases.PROBES} == IDS[name]


@pytest.mark.parametrize("name", ["llama", "gemma", "no_bytes"])
def test_sentencepiece_model_alone(name: str, tmp_path: Path) -> None:
    shutil.copy(TRUTH / "tokenizers" / f"{name}.model", tmp_path / "tokenizer.model")
    tokenizer = read_folder_tokenizer(tmp_path)
    assert tokenizer is not None
    begin = tokenizer.token_to_id("<s>")
    for text, ids in IDS[f"{name}.model"].items():
        assert tokenizer.encode(text).ids == [begin, *ids]
        if name != "no_bytes":
            assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("▁", " ")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    tokenizer = read_folder_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("the cats").ids[-1] == tokenizer.token_to_id("</s>")
    assert begin not in tokenizer.encode("the cats").ids


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.model", "unigram.model", "not a BPE .*AutoTokenizer.from_pretrained"),
        ("tokenizer.model", "removes.model", "it removes spaces .*AutoTokenizer.from_pretrained"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "cannot be read as a SentencePiece BPE: .*AutoTokenizer"),
        ("tokenizer.model", b"", "it has no pieces"),
        ("vocab.json", b"{}", "has its tokenizer in vocab.json, .*AutoTokenizer.from_pretrained"),
    ],
)
def test_other_kinds_name_the_way_out(file: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    data = content if isinstance(content, bytes) else (TRUTH / "tokenizers" / content).read_bytes()
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_folder_tokenizer(tmp_path)
    assert file in PATTERNS


def test_damaged_sentencepiece_models(tmp_path: Path) -> None:
    """A file that is cut off or changed is a ValueError, or another tokenizer, and never anything else."""
    data = (TRUTH / "tokenizers" / "no_bytes.model").read_bytes()
    for at in range(0, len(data), 41):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]):
            (tmp_path / "tokenizer.model").write_bytes(damaged)
            with contextlib.suppress(ValueError):
                read_folder_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder .* must be an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"295": {}}}, "a token must be a string, or an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"297": {"content": "<x>"}}}, "next free id is 295"),
        ("tokenizer_config.json", {"additional_special_tokens": [5]}, "a token must be a string, .* got 5"),
        ("tokenizer_config.json", {"pad_token": {"content": "<x>", "lstrip": 1}}, "lstrip of the token '<x>'"),
        ("added_tokens.json", {"<x>": "one"}, "must hold ids of tokens, got '<x>': 'one'"),
    ],
)
def test_damaged_companions(file: str, content: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_folder_tokenizer(tmp_path)


def test_tokens_without_a_row_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases.write("decoder", tmp_path)
    tokenizer = read_folder_tokenizer(tmp_path, rows=cases.FIRST_ID + 1)
    assert tokenizer is not None
    assert tokenizer.get_vocab_size() == cases.FIRST_ID + 1
    assert "'[Y]' with the id 296, beyond the 296 rows of the embedding: left out" in caplog.text


def limited(tokenizer: Tokenizer, longest: int = 16, padded: int = 64) -> Tokenizer:
    """The tokenizer with all that a saved tokenizer may do to a text."""
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding(length=padded)
    tokenizer.model.dropout = 0.5
    return tokenizer


def test_a_prepared_tokenizer_is_a_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = saved(tmp_path)
    tokenizer = limited(saved(tmp_path))
    prepared = prepare_tokenizer(tokenizer, "mine")
    assert prepared.encode(LONG).ids == plain.encode(LONG).ids
    assert len(tokenizer.encode(LONG).ids) == 64
    assert "mine asks for truncation to 16 tokens and padding and dropout of merges (0.5)" in caplog.text
    assert prepare_tokenizer(prepared) is prepared


def test_no_entry_obeys_truncation_padding_or_dropout(tmp_path: Path) -> None:
    """Loading a folder, saving, converting to either format, and the tokenizer of a run's data."""
    folder = Path(shutil.copytree(TRUTH / "llama", tmp_path / "folder"))
    model = zoo.load(folder)[0]
    small = Tokenizer(
        models.BPE(
            {c: i for i, c in enumerate(["<s>", "</s>", *sorted({*"Ġhe", *LONG[:40]} - {" "}), "he"])}, [("h", "e")]
        )
    )
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    small.add_special_tokens(["<s>", "</s>"])
    assert small.get_vocab_size() <= model.spec.vocab
    ids = small.encode(LONG).ids
    assert len(ids) > 16
    limited(small).save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    zoo.save(model, tmp_path / "saved", tokenizer=limited(small), config=config)
    zoo.convert(folder, tmp_path / "converted")
    zoo.convert(folder, tmp_path / "model.gguf")
    for source in ("folder", "saved", "converted", "model.gguf"):
        tokenizer = zoo.load(tmp_path / source)[1]
        assert tokenizer is not None
        assert tokenizer.encode(LONG).ids == ids, source
    for source in ("saved", "converted"):
        assert Tokenizer.from_file(str(tmp_path / source / "tokenizer.json")).truncation is None
    small.add_special_tokens([AddedToken("<eos>", special=True)])
    small.save(str(tmp_path / "own.json"))
    assert load_tokenizer(tmp_path / "own.json").encode(LONG).ids == ids


LINE = "ten tokens"
OPTIONS: Any = {"sampling": zoo.GREEDY, "max_tokens": 4}
ENCODING_FUNCTIONS: dict[str, Callable[[Any, Tokenizer], Any]] = {
    "evaluation.harness.HarnessBackend": lambda model, own: HarnessBackend(model, own, prefix=257).loglikelihood(
        [(LINE, " and so on")]
    ),
    "evaluation.score.Scorer.text": lambda model, own: zoo.Scorer(model).text(own, [LINE], start=257).to_dict(),
    "evaluation.windows.adds_prefix": lambda _, own: adds_prefix(own, 257),
    "evaluation.windows.prefix_token": lambda _, own: prefix_token(own, None, ["<|im_end|>"]),
    "formats.gguf.tokenizer_out.write_tokenizer": lambda _, own: write_tokenizer(own, 272, {"eos_token_id": 258}),
    "generation.chat.Conversation": lambda model, own: list(
        zoo.Conversation(model, own, zoo.ChatTemplate(TEMPLATE), stop=[258], sampling=zoo.GREEDY).say(
            LINE, max_tokens=4
        )
    ),
    "generation.generate.generate": lambda model, own: zoo.generate(model, own, [LINE], **OPTIONS),
    "generation.generate.complete": lambda model, own: zoo.complete(model, own, [LINE], **OPTIONS)[0].ids,
    "generation.generate.stream": lambda model, own: "".join(zoo.stream(model, own, LINE, **OPTIONS)),
    "text_encoding.encode": lambda _, own: encode(own, LINE, add_special_tokens=True),
    "text_encoding.encode_batch": lambda _, own: encode_batch(own, [LINE, "a"]),
    "text_encoding.added_ids": lambda _, own: added_ids(own),
    "text_model.TextModel": lambda model, own: [
        (text := zoo.TextModel(model, own, (258,), None, "float32")).prefix,
        text.generate([LINE], **OPTIONS),
    ],
}
"""All public functions that encode text with a tokenizer of the caller."""
OTHER_FUNCTIONS = {
    *("end_tokens.separator_id", "end_tokens.special_ids", "end_tokens.known_end_ids", "formats.save.save"),
    *("formats.save.ModelSource", "formats.sentencepiece.add_special_tokens", "formats.source.token_of"),
    *("formats.text_ends.end_ids", "formats.text_ends.named_special_tokens", "formats.tokenizer_file.put_around"),
    *("formats.tokenizer_file.prepare_tokenizer", "generation.stream.split_stop", "generation.stream.TokenDecoder"),
    "generation.stream.TextStream",
}
"""Public functions with a tokenizer that only look up or decode tokens, or whose tokenizers are tested above."""


def functions_of_a_tokenizer() -> Iterator[str]:
    for info in pkgutil.walk_packages(zoo.__path__, "flaxzoo.zoo."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != info.name:
                continue
            methods = {f"{name}.{key}": method for key, method in vars(value).items()} if inspect.isclass(value) else {}
            for full, function in ({name: value} | methods).items():
                full = full.removesuffix(".__init__")
                if not inspect.isfunction(function) or "._" in full:
                    continue
                annotations = [str(p.annotation) for p in inspect.signature(function).parameters.values()]
                if any("tokenizers.Tokenizer" in text and "Callable" not in text for text in annotations):
                    yield f"{info.name}.{full}".removeprefix("flaxzoo.zoo.")


def test_each_function_that_encodes_is_tested() -> None:
    assert {*functions_of_a_tokenizer()} == {*ENCODING_FUNCTIONS, *OTHER_FUNCTIONS}


@pytest.mark.usefixtures("quick_compiler")
def test_no_function_obeys_truncation_padding_or_dropout(tmp_path: Path) -> None:
    """Whatever function gets a tokenizer, it reads whole texts, and the caller's tokenizer is unchanged."""
    tokenizer = tokenizer_of_bytes("<s>", "<|im_end|>")
    model = zoo.load(checkpoint(tmp_path / "model", tokenizer))[0]
    own = limited(Tokenizer.from_str(tokenizer.to_str()), 6, 12)
    before = own.to_str()
    for name, function in ENCODING_FUNCTIONS.items():
        assert function(model, own) == function(model, tokenizer), name
    assert own.to_str() == before

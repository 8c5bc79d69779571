import hashlib
import itertools
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flaxzoo.configs.run import Data
from flaxzoo.train import data as text
from flaxzoo.train.data.tokens import stream

SIZES: dict[str, Any] = {"vocab": 300, "length": 16, "batch": 8, "seed": 3}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """200 documents of 20 to 60 bytes."""
    file = tmp_path / "corpus.jsonl"
    records = [{"text": f"document {i}:" + f" word{i % 7} é" * (1 + i % 5) + "\r\n"} for i in range(200)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def load(source: Path | tuple[str, ...], **changes: Any) -> text.Batches:
    names = (str(source),) if isinstance(source, Path) else source
    sizes = SIZES | {name: changes.pop(name) for name in list(changes) if name in SIZES or name == "own"}
    cache, progress = changes.pop("cache", None), changes.pop("progress", None)
    return text.load(Data(source=names, **changes), cache=cache, progress=progress, **sizes)


def first(batches: text.Batches, count: int, state: dict | None = None) -> list[text.Batch]:
    iterator = batches.train()
    if state:
        iterator.set_state(state)
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def same(left: list[text.Batch], right: list[text.Batch]) -> bool:
    return all(
        np.array_equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in a.keys() | b.keys()
    )


def documents(tokens: np.ndarray, batches: text.Batches) -> list[str]:
    assert tokens[0] == tokens[-1] == batches.separator
    cuts = np.flatnonzero(tokens == batches.separator)
    parts = [tokens[a + 1 : b].tolist() for a, b in itertools.pairwise(cuts)]
    return [batches.tokenizer.decode(part, skip_special_tokens=False) for part in parts]


def test_every_document_is_trained_on_or_held_out(corpus: Path):
    batches = load(corpus)
    written = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    trained = documents(np.asarray(batches.stores[0].tokens), batches)
    held = list(batches.heldout_texts[0])
    assert 7 <= len(held) <= 13
    assert batches.heldout_bytes / (batches.heldout_bytes + batches.stores[0].bytes) == pytest.approx(0.05, abs=0.007)
    assert sorted(trained + held) == sorted(written)
    assert trained == [document for document in written if document not in held]
    assert batches.documents == len(trained) == 200 - len(held)
    assert batches.stores[0].bytes == sum(len(document.encode()) for document in trained)
    assert batches.heldout_bytes == sum(len(document.encode()) for document in held)
    assert batches.train_tokens == len(batches.stores[0].tokens) - 1
    assert batches.stores[0].tokens.dtype == np.uint16


def test_an_epoch_has_every_target_once_then_another_order(corpus: Path):
    batches = load(corpus, batch=1)
    count = math.ceil(batches.train_tokens / 16)
    tokens = np.asarray(batches.stores[0].tokens)
    epochs = first(batches, 2 * count)
    orders = []
    for epoch in (epochs[:count], epochs[count:]):
        rows = {tuple(batch["targets"][0][batch["weights"][0] > 0].tolist()) for batch in epoch}
        wanted = [tuple(tokens[i + 1 : i + 17].tolist()) for i in range(0, batches.train_tokens, 16)]
        assert sorted(rows) == sorted(set(wanted))
        assert sum(batch["weights"].sum() for batch in epoch) == batches.train_tokens
        orders.append([batch["tokens"].tolist() for batch in epoch])
    assert orders[0] != orders[1]


def test_batches_have_the_promised_arrays(corpus: Path):
    batch = first(load(corpus), 1)[0]
    assert set(batch) == {"tokens", "targets", "segments", "positions", "weights"}
    assert all(array.shape == (8, 16) for array in batch.values())
    assert all(array.dtype == (np.float32 if name == "weights" else np.int32) for name, array in batch.items())


@pytest.mark.parametrize("weights", [(), (0.75, 0.25)])
@pytest.mark.parametrize(
    "parts", [[(0, 1, 2, 3), (4, 5, 6, 7)], [(0, 1, 6), (2, 3), (4, 5, 7), (2, 3)]], ids=["2", "4"]
)
def test_processes_share_out_the_batch_of_one(corpus: Path, parts: list[tuple[int, ...]], weights: tuple[float, ...]):
    """Each reads its own rows, which may be any."""
    other = corpus.with_name("other.txt")
    other.write_text("another text\n" * 500)
    sources = (str(corpus), str(other))
    whole = load(sources, weights=weights)
    expected, heldout = first(whole, 30), list(whole.heldout())
    for own in parts:
        part = load(sources, weights=weights, own=own)
        assert same(first(part, 30), [{name: x[[*own]] for name, x in batch.items()} for batch in expected])
        assert same(list(part.heldout()), [{name: x[[*own]] for name, x in batch.items()} for batch in heldout])


def test_going_on_is_exact_on_any_number_of_processes(corpus: Path):
    whole = load(corpus)
    iterator = whole.train()
    for _ in range(37):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    rest = first(whole, 45)[37:]
    assert state["step"] == 37
    assert same(first(whole, 8, state), rest)
    halves = [load(corpus, own=tuple(range(4 * p, 4 * p + 4))) for p in range(2)]
    for p, half in enumerate(halves):
        own = [{name: array[4 * p : 4 * p + 4] for name, array in batch.items()} for batch in rest]
        assert same(first(half, 8, state), own)
    with pytest.raises(ValueError, match="batch is 4 and was 8"):
        load(corpus, batch=4).train().set_state(state)
    with pytest.raises(ValueError, match=r"order is .* and was .*give \{'step': 37\}"):
        load(corpus, seed=4).train().set_state(state)
    first(load(corpus, seed=4), 1, {"step": 37})


def test_the_same_everywhere(corpus: Path, tmp_path: Path):
    here = load(corpus, cache=tmp_path / "one")
    there = load(corpus, cache=tmp_path / "two")
    assert here.order == there.order
    assert same(first(here, 20), first(there, 20))
    assert not same(first(here, 20), first(load(corpus, seed=-1), 20))


def test_heldout_batches_cover_the_heldout_text(corpus: Path):
    batches = load(corpus, heldout=0.3, batch=64)
    found = list(batches.heldout())
    assert same(found, list(batches.heldout()))
    targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in found])
    wanted = np.concatenate(list(stream(batches.heldout_texts[0], batches.tokenizer)))
    assert targets.tolist() == wanted[1:].tolist()
    assert [batch["tokens"].shape for batch in found] == [(64, 16)] * math.ceil((len(wanted) - 1) / 1024)
    assert not found[-1]["weights"][-1].any()


def test_heldout_bytes_are_capped_and_shared(corpus: Path):
    assert load(corpus, heldout_bytes=101).heldout_bytes in (100, 101)
    twice = load((str(corpus), str(corpus)), weights=(3.0, 1.0), heldout_bytes=200)
    assert [sum(len(t.encode()) for t in texts) for texts in twice.heldout_texts] == [
        pytest.approx(150, abs=1),
        pytest.approx(50, abs=1),
    ]
    none = load(corpus, heldout=0.0)
    assert (none.heldout_bytes, list(none.heldout()), none.documents) == (0, [], 200)


def test_a_mixture_keeps_its_weights(tmp_path: Path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * (5000 if name == "a" else 500))
    batches = load((str(tmp_path / "a.txt"), str(tmp_path / "b.txt")), weights=(0.3, 0.7), heldout=0.0)
    letter = batches.tokenizer.encode("b").ids[0]
    rows = np.concatenate([(batch["tokens"] == letter).any(axis=1) for batch in first(batches, 50)])
    assert rows.mean() == pytest.approx(0.7, abs=0.01)


def test_one_line_tells_what_is_trained_on(corpus: Path):
    line = load(corpus).describe()
    assert "\n" not in line
    held = len(load(corpus).heldout_texts[0])
    assert f"corpus.jsonl: {200 - held} documents, 0.01 MB" in line
    assert f"of {held} documents" in line
    (corpus.parent / "folder").mkdir()
    (corpus.parent / "folder" / "a.jsonl").write_text('{"text": ""}\n{"text": "some words"}\n{"text": null}\n')
    (corpus.parent / "folder" / "b.md").write_text("no")
    line = load(corpus.parent / "folder").describe()
    assert "; left out: 2 empty documents, b.md (another kind of file);" in line


def test_the_second_time_nothing_is_tokenized(corpus: Path, tmp_path: Path):
    calls: list[tuple[int, int | None]] = []
    batches = load(corpus, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == batches.stores[0].bytes + batches.heldout_bytes
    assert all(total is None or done <= total for done, total in calls)
    calls.clear()
    assert load(corpus, progress=lambda done, total: calls.append((done, total))).order == batches.order
    assert not calls
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    assert load(corpus).documents + len(load(corpus).heldout_texts[0]) == 201


def test_a_long_text_is_tokenized_in_pieces(tmp_path: Path):
    (tmp_path / "long.txt").write_bytes(b"".join(b"line %d\r\n" % i for i in range(60_000)))
    batches = load(tmp_path / "long.txt")
    (trained,) = documents(np.asarray(batches.stores[0].tokens), batches)
    (held,) = batches.heldout_texts[0]
    assert (trained + held).encode() == (tmp_path / "long.txt").read_bytes()
    assert held.startswith("line 57")


def test_a_given_tokenizer(corpus: Path, tmp_path: Path):
    file = tmp_path / "mine.json"
    load(corpus).tokenizer.save(str(file))
    assert load(corpus, tokenizer=str(file)).order == load(corpus).order
    with pytest.raises(ValueError, match=r"got 300 ids .* model of 299; set --model\.vocab 300"):
        load(corpus, tokenizer=str(file), vocab=299)


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": null}\n'])
def test_no_text_at_all(tmp_path: Path, content: str):
    for name in ("none.txt", "none.jsonl") if not content else ("none.jsonl",):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="must hold some text to train on"):
            load(tmp_path / name)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]


def test_half_a_surrogate_pair_is_an_error(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "some \\ud83e here"}\n')
    with pytest.raises(ValueError, match="half a surrogate pair near 'some .*ud83e alone"):
        load(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0, 2.0)}, "a weight for each source, got 2 weights, 1 sources"),
        ({"weights": (0.0,)}, "weights must be above 0"),
        ({"heldout": 1.0}, "below 1, got 1.0"),
        ({"heldout_bytes": -1}, "at least 0, got -1"),
        ({"own": (7, 8)}, r"numbered from 0, got \(7, 8\) in a batch of 8"),
    ],
)
def test_values_that_do_not_fit(corpus: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load(corpus, **changes)


def test_an_unwritable_cache(corpus: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(text.CacheError, match=r"cannot write the cache entry .*\$FLAXZOO_CACHE"):
        load(corpus, cache=tmp_path / "file")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"{i} " for i in range(40_000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(text.CacheError, match="too large.*free some space"):
            load(tmp_path / "a.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(tmp_path / "a.txt").documents == 1


def test_a_killed_process_and_two_at_once(corpus: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    program = (
        "import sys; from pathlib import Path; from flaxzoo.train import data as text\n"
        "from flaxzoo.configs.run import Data\n"
        "import flaxzoo.train.data.tokens as tokens, hashlib, os\n"
        "if sys.argv[3]: tokens.stream = lambda *_, **__: os._exit(9)\n"
        "b = text.load(Data(source=(sys.argv[1],)), vocab=300, length=16, batch=8, seed=3, cache=Path(sys.argv[2]))\n"
        "print(b.order, hashlib.sha256(next(b.train())['tokens'].tobytes()).hexdigest())\n"
    )

    def start(kill: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(corpus), str(cache), kill]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start("kill") as killed:
        assert killed.wait() == 9
    assert list(cache.rglob("*.part"))
    with start("") as one, start("") as two:
        orders = {process.communicate()[0].strip() for process in (one, two)}
        assert (one.returncode, two.returncode) == (0, 0)
    batches = load(corpus, cache=cache)
    assert orders == {f"{batches.order} {hashlib.sha256(first(batches, 1)[0]['tokens'].tobytes()).hexdigest()}"}
    assert not list(cache.rglob("*.part"))

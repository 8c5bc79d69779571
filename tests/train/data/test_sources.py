import gzip
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from flaxzoo.train.data.shakespeare import VALIDATION
from flaxzoo.train.data.sources import open_source
from flaxzoo.train.data.split import Part, Sample, capped, split
from hypothesis import given
from hypothesis import strategies as st


def read(name: object, field: str = "text") -> list[str]:
    return list(open_source(str(name), field, Path("/nonexistent")).documents())


def write_jsonl(path: Path, records: list[dict]) -> None:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_every_kind_of_file(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \xf0\x9f\xa6\x93\r\n")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "three"}, {"text": None}, {"text": "four\u2028"}])
    write_jsonl(tmp_path / "c.jsonl.gz", [{"text": "five", "other": 1}])
    pq.write_table(pa.table({"n": [1, 2], "text": ["six", None]}), tmp_path / "d.parquet")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "README.md").write_text("no")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "e.txt").write_text("seven")
    everything = ["one\r\ntwo 🦓\r\n", "three", "", "four\u2028", "five", "six", "", "seven"]
    assert read(tmp_path) == everything
    assert read(tmp_path / "**" / "*.txt") == [everything[0], "seven"]
    assert read(tmp_path / "c.jsonl.gz") == ["five"]


def test_reading_is_lazy(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 3 + "broken")
    documents = open_source(str(tmp_path / "a.jsonl"), "text", tmp_path).documents()
    assert list(itertools.islice(documents, 3)) == ["fine"] * 3
    with pytest.raises(ValueError, match=r"a\.jsonl:4 must be a JSON object"):
        next(documents)


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": "y", "id": 3}\n',
            r"a\.jsonl:3 has no field 'text', it has body, id;.*--data",
        ),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: field 'text' must hold text, got int"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1 must be a JSON object, got list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1 must be UTF-8"),
        ("a.jsonl.gz", b"not gz", r"cannot read .*a\.jsonl\.gz"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], r"cannot read .*a\.jsonl\.gz"),
        ("a.txt", b"caf\xe9", r"a\.txt:1 must be UTF-8, got byte 0xe9 at 3.*iconv"),
        ("a.parquet", b"not parquet", r"cannot read .*a\.parquet"),
        ("a.csv", b"text\nx\n", r"must end in \.txt.*got .*a\.csv"),
    ],
)
def test_broken_files(tmp_path: Path, file: str, data: bytes, message: str):
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / file)


def test_parquet_fields(tmp_path: Path):
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no field 'text', it has n, body"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="field 'n' must hold text, got int64"):
        read(tmp_path / "a.parquet", "n")
    assert read(tmp_path / "a.parquet", "body") == ["x"]
    assert open_source(str(tmp_path / "a.parquet"), "body", tmp_path).size > 0


def test_nothing_there(tmp_path: Path):
    with pytest.raises(ValueError, match="no file, folder or glob matches 'shakespear'; did you mean 'shakespeare'"):
        read("shakespear")
    with pytest.raises(ValueError, match="must hold .txt, .* files, got no files"):
        read(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match="got .csv"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no file, folder or glob"):
        read(tmp_path / "*.txt")


def test_fingerprint_follows_the_files(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    prints = [open_source(str(file), "text", tmp_path).fingerprint]
    assert open_source(str(file), "text", tmp_path).fingerprint == prints[0]
    prints.append(open_source(str(file), "body", tmp_path).fingerprint)
    file.write_text("three")
    prints.append(open_source(str(file), "text", tmp_path).fingerprint)
    assert len(set(prints)) == 3


def test_shakespeare(cache: Path):
    source = open_source("shakespeare", "ignored", cache)
    train, validation = (list(source.documents(s)) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (39, len(VALIDATION))
    held, total = (sum(len(text.encode()) for text in texts) for texts in (validation, train + validation))
    assert 0.045 < held / total < 0.055
    assert any("To be, or not to be" in text for text in train)
    assert any("If music be the food of love" in text for text in validation)


def test_tfds_dataset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class TinyPoems(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")
        name = "tiny_poems"

        def _info(self):
            features = tfds.features.FeaturesDict({"verse": tfds.features.Text(), "year": np.int32})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(300), "valid": self._generate_examples(2)}

        def _generate_examples(self, count=0):
            yield from ((i, {"verse": f"verse {i} é", "year": i}) for i in range(count))

    tfds.disable_progress_bar()
    TinyPoems(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("tfds:tiny_poems", "tfds:tiny_poems:1.2.0"):
        source = open_source(name, "verse", tmp_path)
        assert sorted(source.documents()) == sorted(f"verse {i} é" for i in range(300))
        assert sorted(source.documents("validation")) == ["verse 0 é", "verse 1 é"]
        assert "1.2.0" in source.fingerprint
    with pytest.raises(ValueError, match="has no field 'text', it has (verse, year|year, verse);"):
        open_source("tfds:tiny_poems", "text", tmp_path)
    with pytest.raises(ValueError, match="field 'year' must hold text"):
        open_source("tfds:tiny_poems", "year", tmp_path)
    with pytest.raises(ValueError, match="no dataset 'tiny_shakespear'.*did you mean tiny_shakespeare"):
        open_source("tfds:tiny_shakespear", "text", tmp_path)
    info = tmp_path / "tiny_poems" / "1.2.0" / "dataset_info.json"
    info.write_text(re.sub(r'"fileFormat": ".*?"', '"fileFormat": "tfrecord"', info.read_text()))
    with pytest.raises(ValueError, match="as array_record or parquet .*, got tfrecord in .*tiny_poems"):
        open_source("tfds:tiny_poems", "verse", tmp_path)


class Memory:
    name, fingerprint, size, has_validation = "memory", "memory", 0, False
    left_out = ()

    def __init__(self, texts: list[str]):
        self.texts = texts

    def documents(self, split: str = "train"):
        return iter(self.texts)


@given(st.lists(st.text(max_size=20), max_size=30), st.floats(0, 0.99))
def test_split_loses_and_doubles_nothing(texts: list[str], heldout: float):
    parts = list(split(Memory(texts), heldout))
    assert "".join(part.text for part in parts) == "".join(texts)
    assert all(part.size == len(part.text.encode()) and (part.text or not part.held) for part in parts)


@pytest.mark.parametrize("heldout", [0.01, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("count", [8, 80, 400, 1000])
def test_many_documents_are_held_out_whole_and_evenly(heldout: float, count: int):
    texts = [f"{i}\n" * 100 for i in range(count)]
    parts = list(split(Memory(texts), heldout))
    held = [part.text for part in parts if part.held]
    size = sum(map(len, held)) / sum(map(len, texts))
    assert size == pytest.approx(heldout, rel=0.5)
    assert size == pytest.approx(heldout, abs=max(heldout / 8, 1 / 300))
    if count > 5 / heldout:
        assert [part.text for part in parts] == texts
    if count < 3 / heldout:
        assert len(held) == count
        assert all(part.text.endswith("\n") for part in parts)


@pytest.mark.parametrize(
    "sizes",
    [[50_000] + [100] * 500, [100] * 500 + [50_000], [10, 100_000, 10], [1, 2, 3], [2**i for i in range(17)],
     [0, 0, 0, 40, 0, 60] * 50, [*range(1, 300)], [*range(300, 0, -1)]],
)  # fmt: skip
@pytest.mark.parametrize("heldout", [0.05, 0.2])
def test_held_out_text_is_a_share_of_the_text_whatever_the_sizes(sizes: list[int], heldout: float):
    texts = [f"{number:06d}" * (size // 6) + "x" * (size % 6) for number, size in enumerate(sizes)]
    parts = list(split(Memory(texts), heldout))
    held = sum(part.size for part in parts if part.held)
    assert held == pytest.approx(heldout * sum(sizes), abs=heldout / 8 * sum(sizes) + 1 + len(sizes) * (sum(sizes) < 9))
    assert "".join(part.text for part in parts) == "".join(texts)


def test_copies_of_a_document_are_all_trained_on_or_all_held_out():
    texts = [f"document {number % 200} " * 5 for number in range(1000)]
    parts = list(split(Memory(texts), 0.1))
    held, trained = ({part.text for part in parts if part.held is side} for side in (True, False))
    assert held
    assert not held & trained
    assert [part.held for part in split(Memory(texts[::-1]), 0.1)] == [part.held for part in parts[::-1]]


def test_a_line_is_kept_whole_where_lines_are_short():
    text = "".join(f"line {i}\r\n" for i in range(100))
    head, tail = split(Memory([text]), 0.1)
    assert (head.held, tail.held) == (False, True)
    assert head.text + tail.text == text
    assert tail.text.startswith("line 9")
    head, tail = split(Memory(["a\n" + "x" * 998]), 0.1)
    assert len(tail.text) == 100


@given(st.lists(st.text(min_size=1, max_size=9), max_size=40), st.integers(0, 200))
def test_sample_is_capped_to_the_byte(texts: list[str], limit: int):
    sample = Sample(limit)
    for text in texts:
        sample.add(Part(text, len(text.encode()), True))
    kept = sample.texts()
    assert max(map(len, kept), default=0) <= limit
    total = sum(len(text.encode()) for text in texts)
    parts = capped(kept, limit)
    assert min(total, limit) - 3 <= sum(len(text.encode()) for text in parts) <= limit
    for smaller in (limit // 2, limit // 5):  # a shorter sample is a prefix
        other = Sample(smaller)
        for text in texts:
            other.add(Part(text, len(text.encode()), True))
        assert capped(other.texts(), smaller) == capped(kept, smaller)


def test_a_damaged_dataset_is_named(tmp_path: Path):
    open_source("shakespeare", "text", tmp_path)
    (file,) = tmp_path.rglob("*train.array_record*")
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 2000] = bytes(2000)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"cannot read the records from 0 on of split 'train' in {file.parent}"):
        list(open_source("shakespeare", "text", tmp_path).documents())

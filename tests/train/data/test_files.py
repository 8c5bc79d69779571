"""Which files a folder, a glob or a path names, and files that are damaged or of an unusual kind."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaxzoo.train.data.files import find_files


def names(source: object, root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in find_files(str(source), "text").paths]


def read(source: object) -> list[str]:
    return list(find_files(str(source), "text").documents())


def test_a_folder_is_read_whole_or_says_what_it_leaves_out(tmp_path: Path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "deep" / "deeper", data / "empty", data / ".git", elsewhere):
        folder.mkdir(parents=True)
    for file in (data / "a.txt", data / "deep" / "deeper" / "b.txt", data / ".git" / "c.txt", elsewhere / "d.txt"):
        file.write_text(file.name)
    (data / "README.md").write_text("no")
    (data / ".hidden.txt").write_text("no")
    (data / "linked").symlink_to(elsewhere)
    (data / "deep" / "loop").symlink_to(data)
    (data / "same.txt").symlink_to(data / "a.txt")
    found = find_files(str(data), "text")
    assert [str(path.relative_to(data)) for path in found.paths] == ["a.txt", "deep/deeper/b.txt", "linked/d.txt"]
    told = "\n".join(found.left_out)
    for name in ("empty (an", ".git (hidden", "README.md (another", ".hidden.txt (hidden", "deep/loop (a link"):
        assert name in told
    assert f"{data / 'same.txt'} (the same file as {data / 'a.txt'})" in told
    assert len(found.left_out) == 6


def test_a_dangling_link_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    for source in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(ValueError, match=r"b\.txt is a link to a file that does not exist"):
            find_files(str(source), "text")


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    entries = Path.iterdir

    def iterdir(self: Path):
        if self.name == "closed":
            raise PermissionError(13, "Permission denied")
        return entries(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for source in (tmp_path, tmp_path / "**" / "*.txt"):
        with pytest.raises(ValueError, match="cannot read the folder .*closed: Permission denied"):
            find_files(str(source), "text")


@pytest.mark.parametrize("folder", ["run[1]", "a*b", "what?", "[", "[!a]"])
def test_globs_below_folders_with_special_characters(tmp_path: Path, folder: str):
    (tmp_path / folder / "deep").mkdir(parents=True)
    (tmp_path / "run1").mkdir()
    for file in (tmp_path / folder / "a[2].txt", tmp_path / folder / "deep" / "b.txt", tmp_path / "run1" / "c.txt"):
        file.write_text("x")
    assert names(tmp_path / folder / "*.txt", tmp_path) == [f"{folder}/a[2].txt"]
    assert names(tmp_path / folder / "**" / "*.txt", tmp_path) == [f"{folder}/a[2].txt", f"{folder}/deep/b.txt"]
    assert names(tmp_path / folder / "a[2].txt", tmp_path) == [f"{folder}/a[2].txt"]


def test_markdown_is_read_where_it_is_named(tmp_path: Path):
    (tmp_path / "a.md").write_text("# text")
    assert read(tmp_path / "a.md") == read(tmp_path / "*.md") == ["# text"]
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "b.txt").write_text("b")
    assert find_files(str(tmp_path / "*.txt"), "text").left_out == (f"{tmp_path / 'folder.txt'} (a folder)",)


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["a", None, "b"], pa.string_view()),
        pa.array(["a", None, "b"], pa.large_string()),
        pa.array(["a", None, "b"]).dictionary_encode(),
        pa.array(["a", None, "b"], pa.large_string()).dictionary_encode(),
    ],
    ids=["view", "large", "dictionary", "large_dictionary"],
)
def test_every_kind_of_text_in_parquet(tmp_path: Path, texts: pa.Array):
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "", "b"]


def test_a_shard_of_nulls_and_fields_of_one_name(tmp_path: Path):
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["", ""]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet must have one field 'text', got 2"):
        read(tmp_path / "a.parquet")


LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 100_000, "must be a JSON object"),
        (b'{"text": ' + b"[" * 100_000, "must be a JSON object"),
        (b'{"n": ' + b"1" * 5000 + b', "text": "x"}', "must be a JSON object"),
        (b'{"text": "caf\xe9"}', "must be UTF-8, got byte 0xe9 at 13 of the line.*iconv"),
        ('{"text": "x"}'.encode("utf-16"), "must be UTF-8"),
        (b'{"text": "x"', "must be a JSON object"),
    ],
    ids=["deep", "deep_field", "digits", "latin1", "utf16", "cut"],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, message: str):
    (tmp_path / "a.jsonl").write_bytes(LINES + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:3 {message}"):
        read(tmp_path / "a.jsonl")


def test_damaged_gzip_names_file_and_line(tmp_path: Path):
    data = "".join(json.dumps({"text": f"{number * 7919}"}) + "\n" for number in range(20_000)).encode()
    packed = bytearray(gzip.compress(data))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    packed[len(packed) // 2 : len(packed) // 2 + 40] = bytes(range(200, 240))
    (tmp_path / "b.jsonl.gz").write_bytes(packed)
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=re.escape(f"{name}.jsonl.gz:") + r"\d+"):
            read(tmp_path / f"{name}.jsonl.gz")


def test_byte_order_marks_are_dropped(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES + b"\xef\xbb\xbf" + LINES)
    assert read(tmp_path / "a.jsonl") == ["one", "two"] * 2

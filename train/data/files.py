"""Text files as a source: .txt (a document each), .jsonl, .jsonl.gz and .parquet (a document a record)."""

import difflib
import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
TEXT_ENDINGS = (".txt", ".md")
"""Files read whole. In a folder, .md files are left out, since they often describe the data."""


@dataclass(frozen=True)
class Files:
    """The documents of some files, in the order of their paths.

    A .txt file is read whole, the others record by record. Line endings stay as they are; a byte order mark goes.
    """

    name: str
    paths: tuple[Path, ...]
    field: str
    left_out: tuple[str, ...] = ()
    """Files and folders that the name covers and that are not read, with reasons."""

    has_validation = False

    @property
    def fingerprint(self) -> str:
        """The files' paths, sizes and times of change."""
        stats = [(str(path.resolve()), path.stat()) for path in self.paths]
        return json.dumps([self.field, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]])

    @property
    def size(self) -> int:
        """About how many bytes of text there are."""
        return sum(_text_size(path, self.field) for path in self.paths)

    def documents(self, split: str = "train") -> Iterator[str]:
        """Every document, lazily. Raises ValueError that names the file, and the line where there is one."""
        assert split == "train"
        for path in self.paths:
            try:
                if path.name.endswith(TEXT_ENDINGS):
                    yield path.read_bytes().decode("utf-8-sig")
                elif path.name.endswith(".parquet"):
                    yield from _parquet(path, self.field)
                else:
                    yield from _jsonl(path, self.field)
            except UnicodeDecodeError as error:
                line = error.object[: error.start].count(b"\n") + 1
                raise ValueError(
                    f"{path}:{line} must be UTF-8, got byte 0x{error.object[error.start]:02x} at {error.start}; "
                    "convert it, e.g. with `iconv -f latin1 -t utf-8`"
                ) from error
            except (OSError, EOFError, pyarrow.ArrowException) as error:
                raise ValueError(f"cannot read {path}: {error}") from error


def find_files(name: str, field: str) -> Files:
    """The files that a path, a folder (searched through) or a glob names.

    Args:
        name: the path, folder or glob; `~` is the home folder and `**` any depth.
        field: the field of a record that holds the text.

    Raises:
        ValueError: nothing matches, or a file has an ending that is not known.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        search = Search(path)
        paths = [file for file in search.files if file.name.endswith(ENDINGS)]
        others = [file for file in search.files if not file.name.endswith(ENDINGS)]
        if not paths:
            endings = ", ".join(sorted({file.suffix or file.name for file in others})) or "no files"
            raise ValueError(f"the folder {name} must hold {', '.join(ENDINGS)} files, got {endings}")
        left_out = [*search.left_out, *(f"{file.relative_to(path)} (another kind of file)" for file in others)]
        return _files(name, paths, field, left_out)
    matches = [path] if path.is_file() else _glob(path)
    folders = [f"{match} (a folder)" for match in matches if match.is_dir()]
    paths = [match for match in matches if not match.is_dir()]
    if not paths:
        near = difflib.get_close_matches(name, ["shakespeare"], cutoff=0.7)
        raise ValueError(
            f"no file, folder or glob matches {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" (searched from {Path.cwd()}). A source is 'shakespeare', a path, or 'tfds:NAME'"
        )
    for file in paths:
        if not file.name.endswith((*ENDINGS, *TEXT_ENDINGS)):
            raise ValueError(f"a file of text must end in {', '.join(ENDINGS)} or .md, got {file}")
    return _files(name, paths, field, [] if "**" in name else folders)


def _files(name: str, paths: Iterable[Path], field: str, left_out: Iterable[str]) -> Files:
    """Files in the order of their paths, each once, whatever the number of links to it."""
    kept: dict[Path, Path] = {}
    left_out = [*left_out]
    for path in sorted(paths):
        if not path.is_file():
            raise ValueError(f"{path} is a link to a file that does not exist; remove it or restore {path.resolve()}")
        real = path.resolve()
        if real in kept:
            left_out.append(f"{path} (the same file as {kept[real]})")
        else:
            kept[real] = path
    return Files(name, tuple(kept.values()), field, tuple(left_out))


class Search:
    """The files below a folder, through links to folders too.

    Attributes:
        files: files, dangling links included, in no order.
        left_out: hidden files and folders, links that lead back to a folder above them, and empty folders.

    Raises ValueError if a folder cannot be read.
    """

    def __init__(self, root: Path):
        self.root = root
        self.files: list[Path] = []
        self.left_out: list[str] = []
        self._search(root, ())

    def _search(self, folder: Path, above: tuple[Path, ...]) -> None:
        real = folder.resolve()
        if real in above:
            self.left_out.append(f"{folder.relative_to(self.root)} (a link to a folder above it)")
            return
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise ValueError(
                f"cannot read the folder {folder}: {error.strerror or error}; make it readable or move it elsewhere"
            ) from error
        if not entries and above:
            self.left_out.append(f"{folder.relative_to(self.root)} (an empty folder)")
        for entry in entries:
            if entry.name.startswith("."):
                self.left_out.append(f"{entry.relative_to(self.root)} (hidden)")
            elif entry.is_dir():
                self._search(entry, (*above, real))
            else:
                self.files.append(entry)


def _glob(path: Path) -> list[Path]:
    """What a glob matches. Leading folders that exist are taken literally, whatever characters are in their names."""
    base = Path(path.anchor)
    parts = [part for part in path.parts if part != path.anchor]
    while len(parts) > 1 and (base / parts[0]).is_dir():
        base /= parts.pop(0)
    if "**" in parts:
        Search(base)  # glob skips unreadable folders silently
    pattern = str(Path(glob.escape(str(base)), *parts))
    return sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207, Path.glob takes no absolute pattern


def _text_size(path: Path, field: str) -> int:
    if path.name.endswith(".parquet"):
        try:
            groups = pyarrow.parquet.read_metadata(path).to_dict()["row_groups"]
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        columns = [column for group in groups for column in group["columns"] if column["path_in_schema"] == field]
        return sum(column["total_uncompressed_size"] for column in columns)
    return path.stat().st_size * (3 if path.name.endswith(".gz") else 1)


def _jsonl(path: Path, field: str) -> Iterator[str]:
    number = 0
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of_line(line, field, f"{path}:{number}")
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"cannot read {path}:{number + 1}: {error}; the file is damaged or cut short") from error


def _text_of_line(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} must be UTF-8, got byte 0x{line[error.start]:02x} at {error.start} of the line; convert the "
            "file, e.g. with `iconv -f latin1 -t utf-8`"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: also of integers with thousands of digits
        raise ValueError(f"{where} must be a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(record).__name__}")
    if field not in record:
        raise missing_field(where, field, record)
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} must hold text, got {type(text).__name__}")
    return text or ""


def _parquet(path: Path, field: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as table:
        schema = table.schema_arrow
        if field not in schema.names:
            raise missing_field(str(path), field, schema.names)
        if (count := schema.names.count(field)) > 1:
            raise ValueError(f"{path} must have one field {field!r}, got {count} of that name; rename the others")
        kind = schema.field(field).type
        value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        texts = pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view
        if not pyarrow.types.is_null(value) and not any(is_text(value) for is_text in texts):
            raise ValueError(f"{path}: field {field!r} must hold text, got {kind}")
        number = 0
        try:
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0):
                    number += 1
                    yield text.as_py() or ""
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"cannot read record {number + 1} of {path}: {error}") from error


def missing_field(where: str, field: str, fields: Iterable[str]) -> ValueError:
    """The error for a record without the field that was asked for."""
    names = [str(name) for name in fields]
    return ValueError(
        f"{where} has no field {field!r}, it has {', '.join(names) or 'none'}; name the one with text: "
        "--data.text-field NAME"
    )

"""Text files as a source: .txt (a document each), .jsonl, .jsonl.gz and .parquet (a document a record)."""

import difflib
import glob
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Files:
    """The documents of some files, in the order of their paths.

    A .txt file is read whole, the others record by record. Line endings stay as they are; a byte order mark goes.
    """

    name: str
    paths: tuple[Path, ...]
    field: str

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
                if path.name.endswith(".txt"):
                    yield path.read_bytes().decode("utf-8-sig")
                elif path.name.endswith(".parquet"):
                    yield from _parquet(path, self.field)
                else:
                    yield from _jsonl(path, self.field)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} must be UTF-8, got byte 0x{error.object[error.start]:02x} at {error.start}; "
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
        inside = [found for found in path.rglob("*") if found.is_file() and not _hidden(found.relative_to(path))]
        paths = [found for found in inside if found.name.endswith(ENDINGS)]
        if not paths:
            endings = ", ".join(sorted({found.suffix or found.name for found in inside})) or "no files"
            raise ValueError(f"the folder {name} must hold {', '.join(ENDINGS)} files, got {endings}")
        return Files(name, tuple(sorted(paths)), field)
    matches = [path] if path.is_file() else [Path(found) for found in _glob(path)]
    paths = sorted(found for found in matches if found.is_file())
    if not paths:
        near = difflib.get_close_matches(name, ["shakespeare"], cutoff=0.7)
        raise ValueError(
            f"no file, folder or glob matches {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" (searched from {Path.cwd()}). A source is 'shakespeare', a path, or 'tfds:NAME'"
        )
    for found in paths:
        if not found.name.endswith(ENDINGS):
            raise ValueError(f"a file of text must end in {', '.join(ENDINGS)}, got {found}")
    return Files(name, tuple(paths), field)


def _glob(path: Path) -> list[str]:
    return glob.glob(str(path), recursive=True)  # noqa: PTH207, for Path.glob takes no absolute pattern


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number} must be UTF-8: {error.reason}") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} must be a JSON object: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number} must be a JSON object, got {type(record).__name__}")
            if field not in record:
                raise missing_field(f"{path}:{number}", field, record)
            text = record[field]
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{path}:{number}: field {field!r} must hold text, got {type(text).__name__}")
            yield text or ""


def _parquet(path: Path, field: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as table:
        schema = table.schema_arrow
        if field not in schema.names:
            raise missing_field(str(path), field, schema.names)
        kind = schema.field(field).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"{path}: field {field!r} must hold text, got {kind}")
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0):
                yield text.as_py() or ""


def missing_field(where: str, field: str, fields: Iterable[str]) -> ValueError:
    """The error for a record without the field that was asked for."""
    names = [str(name) for name in fields]
    return ValueError(
        f"{where} has no field {field!r}, it has {', '.join(names) or 'none'}; name the one with text: "
        "--data.text-field NAME"
    )

"""Sources: a string names some text, which is then read document by document."""

import contextlib
import difflib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants, registered
from tensorflow_datasets.core.utils import tqdm_utils

from .cache import filled
from .files import find_files, missing_field
from .shakespeare import Shakespeare

VALIDATION_SPLITS = ("validation", "valid", "val", "dev")


@runtime_checkable
class Source(Protocol):
    """Documents to read, in an order that never changes."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the text may have changed."""
        ...

    @property
    def size(self) -> int:
        """About how many bytes of text there are."""
        ...

    @property
    def has_validation(self) -> bool:
        """Whether it has a validation split of its own."""
        ...

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the name covers and is not read, with reasons."""
        ...

    def documents(self, split: Literal["train", "validation"] = "train") -> Iterator[str]:
        """The documents of a split, lazily."""
        ...


class TfdsSource:
    """A prepared TFDS dataset, read at random access: ArrayRecord or parquet, for TensorFlow is not needed then."""

    left_out: tuple[str, ...] = ()

    def __init__(self, name: str, builder: tfds.core.DatasetBuilder, field: str):
        self.name = name
        self.builder = builder
        self.field = field
        splits = builder.info.splits
        if "train" not in splits:
            raise ValueError(f"{name} must have a split 'train', got {', '.join(splits) or 'none'}")
        self.splits = {"train": "train"}
        if own := [split for split in VALIDATION_SPLITS if split in splits]:
            self.splits["validation"] = own[0]

    @property
    def fingerprint(self) -> str:
        """Name, version and sizes of the dataset."""
        info = self.builder.info
        splits = sorted((name, split.num_examples, split.num_bytes) for name, split in info.splits.items())
        return f"{info.full_name} {splits} {self.field}"

    @property
    def size(self) -> int:
        """About how many bytes of text there are."""
        return sum(self.builder.info.splits[split].num_bytes for split in self.splits.values())

    @property
    def has_validation(self) -> bool:
        """Whether there is a split of that name."""
        return "validation" in self.splits

    def documents(self, split: Literal["train", "validation"] = "train") -> Iterator[str]:
        """The documents of a split, lazily."""
        builder: Any = self.builder
        start = 0
        try:
            records = builder.as_data_source(split=self.splits[split])
            for start in range(0, len(records), 256):
                for record in records.__getitems__(range(start, min(start + 256, len(records)))):
                    text = record[self.field]
                    yield text.decode("utf-8") if isinstance(text, bytes) else str(text)
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            raise ValueError(
                f"cannot read the records from {start} on of split {self.splits[split]!r} in {builder.data_dir}: "
                f"{error}; delete that folder, and the dataset is prepared again"
            ) from error


def open_source(name: str, field: str, cache: Path) -> Source:
    """The source that a string names.

    Args:
        name: 'shakespeare'; 'tfds:NAME', 'tfds:NAME/CONFIG' or 'tfds:NAME:VERSION'; a file, folder or glob.
        field: the field of a record that holds the text.
        cache: the folder that 'shakespeare' is prepared in. Other TFDS datasets are in $TFDS_DATA_DIR.

    Raises:
        ValueError: there is no such source, or the field does not hold text.
    """
    if name == "shakespeare":
        return TfdsSource(name, _shakespeare(cache), "text")
    if name.startswith("tfds:"):
        return TfdsSource(name, _builder(name.removeprefix("tfds:"), field), field)
    return find_files(name, field)


def _shakespeare(cache: Path) -> tfds.core.DatasetBuilder:
    def fill(aside: Path) -> None:
        shown = getattr(tqdm_utils, "_active", True)
        tfds.display_progress_bar(False)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads, and of the folder aside
                Shakespeare(data_dir=aside, file_format="array_record").download_and_prepare()
        finally:
            tfds.display_progress_bar(shown)

    folder = filled(cache / "tfds" / f"shakespeare-{Shakespeare.VERSION}", fill)
    return Shakespeare(data_dir=folder, file_format="array_record")


def _check_field(name: str, builder: tfds.core.DatasetBuilder, field: str) -> None:
    features: Any = builder.info.features
    if field not in features:
        raise missing_field(f"tfds:{name}", field, features)
    if not isinstance(features[field], tfds.features.Text):
        raise ValueError(f"tfds:{name}: field {field!r} must hold text, got {features[field]}")


def _builder(name: str, field: str) -> tfds.core.DatasetBuilder:
    """A TFDS dataset by name, downloaded and prepared where it is not yet."""
    where: dict[str, Any] = {"data_dir": os.environ["TFDS_DATA_DIR"]} if os.environ.get("TFDS_DATA_DIR") else {}
    try:
        builder = tfds.builder(name, **where)
        _check_field(name, builder, field)
        if not builder.is_prepared():
            builder = tfds.builder(name, file_format="array_record", **where)
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        base = name.split("/")[0].split(":")[0]
        near = difflib.get_close_matches(base, registered.list_imported_builders(), cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        folder = where.get("data_dir", constants.DATA_DIR)
        raise ValueError(f"TFDS has no dataset {name!r}, and none is prepared in {folder}{hint}") from error
    except (OSError, AssertionError) as error:  # AssertionError: of a version there is not
        raise ValueError(f"cannot download or prepare the TFDS dataset {name!r}: {error}") from error
    except ImportError as error:
        raise ValueError(
            f"preparing the TFDS dataset {name!r} needs {error.name}, which is not installed here; prepare it where it "
            "is, with `tfds build --file_format=array_record`, and name the folder in $TFDS_DATA_DIR"
        ) from error
    form = builder.info.file_format
    if form not in (tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.PARQUET):
        raise ValueError(
            f"a TFDS dataset must be prepared as array_record or parquet to be read without TensorFlow, got "
            f"{form and form.value} in {builder.data_dir}; remove that folder to prepare it anew, or convert it with "
            "`python -m tensorflow_datasets.scripts.convert_format` where TensorFlow is installed"
        )
    return builder

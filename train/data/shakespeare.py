"""Shakespeare's works as a TFDS dataset, from the file beside this one."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

FILE = Path(__file__).with_name("shakespeare.jsonl.gz")
VALIDATION = ("john", "lovers complaint", "twelfth night")
"""A history, a poem and a comedy, 5% of the bytes; none shares characters or verses with another work."""


class Shakespeare(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """42 plays and poems, 5 MB: splits train (39 works) and validation (3), features title and text."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The plays and poems of William Shakespeare, one work an example.",
            features=tfds.features.FeaturesDict({"title": tfds.features.Text(), "text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {"train": self._generate_examples(False), "validation": self._generate_examples(True)}

    def _generate_examples(self, validation: bool) -> Iterator[tuple[str, dict[str, str]]]:
        with gzip.open(FILE, "rt", encoding="utf-8", newline="\n") as lines:
            for work in map(json.loads, lines):
                if (work["title"] in VALIDATION) == validation:
                    yield work["title"], work

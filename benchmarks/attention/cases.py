"""What is measured: chips, and attention of one sequence in bfloat16."""

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
"""What JAX calls them."""
CHIPS = tomllib.loads((Path(__file__).parents[2] / "train" / "plan" / "chips.toml").read_text())
PEAK = {name: CHIPS[kind]["tflops"] for name, kind in KINDS.items()}
"""Peak bfloat16 TFLOP/s of a JAX device."""
WINDOW = 4096
DOCUMENT = 2048
"""Tokens of a document in the mean; documents have many lengths."""


@dataclass(frozen=True)
class Case:
    """Attention of `length` queries to as many keys."""

    mask: Literal["causal", "window", "documents"]
    length: int
    heads: int
    kv_heads: int
    size: int = 128
    value_size: int = 0
    """0: `size`."""
    searched_at: int = 0
    """The settings are those found at this length, so that a search takes minutes; 0: at `length`."""

    @property
    def values(self) -> int:
        """Head dim of values."""
        return self.value_size or self.size

    @property
    def name(self) -> str:
        """As in the results."""
        dims = f"{self.size}/{self.values}" if self.value_size else str(self.size)
        mask = f"window {WINDOW}" if self.mask == "window" else self.mask
        return f"{mask} {self.length >> 10}K, {self.heads}:{self.kv_heads}, {dims}"

    @property
    def document_lengths(self) -> np.ndarray:
        """Lengths of the documents that are packed into the sequence."""
        count = self.length // DOCUMENT
        cuts = np.random.default_rng(0).choice(np.arange(1, self.length), count - 1, replace=False)
        return np.diff([0, *np.sort(cuts), self.length])

    @property
    def document_ids(self) -> np.ndarray:
        """The document of each position, from 1."""
        lengths = self.document_lengths
        return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that see each other, of one head."""
        if self.mask == "window":
            return int(np.minimum(np.arange(1, self.length + 1), WINDOW).sum())
        lengths = self.document_lengths.astype(int) if self.mask == "documents" else np.array([self.length])
        return int((lengths * (lengths + 1) // 2).sum())

    def flops(self, which: Pass) -> int:
        """Of the products of visible pairs: two forward (q k, and weights v), five backward."""
        sizes = self.size + self.values if which == "forward" else 3 * self.size + 2 * self.values
        return 2 * self.heads * self.visible * sizes


CASES = {
    case.name: case
    for case in (
        Case("causal", 4096, 32, 8),
        Case("documents", 32768, 2, 2),
        Case("window", 16384, 4, 2, size=256),
        Case("causal", 4096, 4, 4, size=192, value_size=128),
        Case("causal", 4096, 4, 4, size=64),
        Case("causal", 131072, 1, 1, searched_at=32768),
    )
}
"""Heads are few where sequences are long: time grows linearly with them, and so does that of finding it."""


def searched(case: Case) -> Case:
    """The case at which the settings for this one are searched."""
    return dataclasses.replace(case, length=case.searched_at, searched_at=0) if case.searched_at else case


def geometric_mean(ratios: list[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))

"""Batches: rows shuffled and mixed by global number, so that any number of processes sees the same ones."""

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer

from .cache import digest
from .packing import Row, Rows, empty_row
from .split import capped
from .tokenizer import Ends, ends, ids
from .tokens import Store, heldout_stream

Batch = Row
"""tokens, targets, segments, positions: int32 [B, T]; weights: float32 [B, T]; of B rows this process has its own."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The text of a run in batches.

    Global batch s has the rows [sB, (s+1)B) of one endless order of rows. A process reads those of them that its
    devices hold, so the batch is the same however many processes there are.

    Attributes:
        tokenizer: ids to text and back.
        stores: the tokenized sources.
        weights: share of each source in a batch; if empty, an epoch has every row of every source once.
        heldout_texts: texts to evaluate on, by source.
        length: tokens in a row (T).
        batch: rows in a global batch (B).
        seed: seed of the order of rows.
        own: rows of a batch that this process reads; all if empty.
        special_tokens: text that spells a special token is that token.
    """

    tokenizer: Tokenizer
    stores: tuple[Store, ...]
    weights: tuple[float, ...]
    heldout_texts: tuple[tuple[str, ...], ...]
    length: int
    batch: int
    seed: int
    own: tuple[int, ...] = ()
    special_tokens: bool = False

    def __post_init__(self) -> None:
        if not all(0 <= row < self.batch for row in self.own):
            raise ValueError(f"the rows of a batch are numbered from 0, got {self.own} in a batch of {self.batch}")

    @property
    def rows_read(self) -> tuple[int, ...]:
        """Which rows of a batch are read here, ascending."""
        return self.own or tuple(range(self.batch))

    @property
    def separator(self) -> int:
        """The id of the token after each document."""
        return self.ends.end

    @functools.cached_property
    def ends(self) -> Ends:
        """The ids before and after each document."""
        return ends(self.tokenizer)

    @property
    def documents(self) -> int:
        """Documents trained on."""
        return sum(store.documents for store in self.stores)

    @property
    def train_tokens(self) -> int:
        """Targets in an epoch, over all sources."""
        return sum(len(store.tokens) - 1 for store in self.stores)

    @property
    def heldout_bytes(self) -> int:
        """Exact bytes (UTF-8) of the held-out text: bits per byte = sum of nll / ln 2 / heldout_bytes."""
        return sum(len(text.encode()) for texts in self.heldout_texts for text in texts)

    def describe(self) -> str:
        """One line: sources, documents, tokens, what is held out."""
        size = sum(store.bytes for store in self.stores)
        heldout = sum(store.heldout_bytes for store in self.stores)
        left_out = _listed([item for store in self.stores for item in store.left_out])
        return (
            f"{' + '.join(_shown(store.name) for store in self.stores)}: {_count(self.documents, 'document')}, "
            f"{size / 1e6:,.2f} MB, {self.train_tokens:,} tokens of {ids(self.tokenizer):,} "
            f"({size / self.train_tokens:.2f} bytes each); held out {heldout / 1e6:,.2f} MB, evaluated on "
            f"{self.heldout_bytes / 1e6:,.2f} MB of {_count(sum(map(len, self.heldout_texts)), 'document')}"
            f"{f'; left out: {left_out}' if left_out else ''}; special tokens in the text are "
            f"{'tokens' if self.special_tokens else 'plain text'}"
        )

    def train(self) -> "TrainIterator":
        """An endless iterator over this process's part of each batch; state is saved and restored exactly."""
        return TrainIterator(self)

    def heldout(self) -> "Iterable[Batch]":
        """This process's part of every held-out batch, in order; the last one is padded with rows of weight 0.

        Can be iterated again and again. There is none where nothing is held out.
        """
        return _Heldout(self, self._heldout_rows)

    @functools.cached_property
    def _heldout_rows(self) -> list[Rows]:
        streams = [
            heldout_stream(texts, self.tokenizer, special_tokens=self.special_tokens)
            for texts in self.heldout_texts
            if texts
        ]
        return [Rows(stream, self.length, self.ends) for stream in streams]

    def rows(self) -> grain.MapDataset:
        """The endless global order of rows: shuffled anew each epoch, mixed by the weights."""
        parts = [grain.MapDataset.source(Rows(store.tokens, self.length, self.ends)) for store in self.stores]
        if not self.weights:
            return grain.MapDataset.concatenate(parts).seed(self._seed(0)).shuffle().repeat()
        shuffled = [part.seed(self._seed(index)).shuffle().repeat() for index, part in enumerate(parts)]
        return grain.MapDataset.mix(shuffled, self.weights)

    def _seed(self, index: int) -> int:
        return int(digest(self.seed, index)[:8], 16)  # grain takes 32 bits

    @property
    def order(self) -> str:
        """A digest of the order of rows, which tokens, weights, length and seed determine."""
        return digest([store.digest for store in self.stores], list(self.weights), self.length, self.seed)


class TrainIterator(Iterator[Batch]):
    """Iterator over the batches of a run; threads read ahead."""

    def __init__(self, batches: Batches):
        """From step 0 on."""
        self._batches = batches
        rows: Any = batches.rows()
        batch = batches.batch
        own = batches.rows_read

        def part(step: int) -> Batch:
            return _stacked([rows[step * batch + row] for row in own])

        steps = grain.MapDataset.range(sys.maxsize // batch).map(part)
        self._iterator = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Plain data: the number of the next batch, and what must be the same for it to mean the same.

        It is the same in every process, whatever their number.
        """
        step: Any = self._iterator.get_state()
        return {"step": step["next_index"], "batch": self._batches.batch, "order": self._batches.order}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume at the batch that `get_state` named.

        Raises:
            ValueError: it was taken with another batch, text, tokenizer, mixture, length or seed. A state of "step"
                alone is not compared.
        """
        own = self.get_state() | {"step": state["step"]}
        other = {name: (own[name], value) for name, value in state.items() if own[name] != value}
        if other:
            changed = ", ".join(f"{name} is {now!r} and was {then!r}" for name, (now, then) in other.items())
            raise ValueError(
                f"to go on exactly, the batch and the order (text, tokenizer, weights, length, seed) must be as they "
                f"were, but {changed}; to take batch {state['step']} of the new order, give {{'step': {state['step']}}}"
            )
        self._iterator.set_state({"next_index": state["step"]})

    def close(self) -> None:
        """Stop the threads that read ahead."""
        self._iterator.close()


@dataclass(frozen=True)
class _Heldout:
    batches: Batches
    sources: Sequence[Rows]

    def __len__(self) -> int:
        return -(-sum(map(len, self.sources)) // self.batches.batch)

    def __iter__(self) -> Iterator[Batch]:
        batches = self.batches
        rows = [(rows, index) for rows in self.sources for index in range(len(rows))]
        for step in range(len(self)):
            wanted = (step * batches.batch + row for row in batches.rows_read)
            yield _stacked([rows[n][0][rows[n][1]] if n < len(rows) else empty_row(batches.length) for n in wanted])


def _stacked(rows: Sequence[Row]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _shown(name: str) -> str:
    """A file name that UTF-8 can write, whatever its bytes."""
    return name.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")


def _listed(items: Sequence[str]) -> str:
    """Up to five items by name, and the number of the rest."""
    rest = f" and {len(items) - 5:,} more" if len(items) > 5 else ""
    return ", ".join(map(_shown, items[:5])) + rest


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shared_heldout(stores: Sequence[Store], weights: Sequence[float], limit: int) -> tuple[tuple[str, ...], ...]:
    """Held-out text of each source, `limit` bytes in all at most, in proportion to the weights, else to the sizes."""
    shares = list(weights) or [store.bytes for store in stores]
    return tuple(
        tuple(capped(list(store.heldout), int(limit * share / sum(shares))))
        for store, share in zip(stores, shares, strict=True)
    )

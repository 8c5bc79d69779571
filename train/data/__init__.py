"""Text to batches of tokens. `load` is the entry point."""

from pathlib import Path

from ...configs.run import Data
from .batches import Batch, Batches, TrainIterator, shared_heldout
from .cache import CacheError, cache_folder
from .sources import Source, open_source
from .tokenizer import ids, load_tokenizer, separator, trained_tokenizer
from .tokens import Progress, token_store

__all__ = ["Batch", "Batches", "CacheError", "Progress", "TrainIterator", "load", "load_tokenizer", "separator"]


def load(
    data: Data,
    *,
    vocab: int,
    length: int,
    batch: int,
    seed: int,
    cache: Path | None = None,
    own: tuple[int, ...] = (),
    verify: bool = False,
    progress: Progress | None = None,
) -> Batches:
    """The text that `data` names, in batches of tokens. Tokens are cached, so that text is tokenized once.

    Args:
        data: where the text comes from and how it becomes tokens.
        vocab: size of the model's vocabulary (V), which is the largest number of ids a tokenizer may have.
        length: tokens in a row (T).
        batch: rows in a global batch (B).
        seed: seed of the order of rows.
        cache: the cache folder; by default $FLAXZOO_CACHE, else ~/.cache/flaxzoo.
        own: rows of a batch that this process reads; all if empty.
        verify: compare the checksums of cached tokens, as a run that resumes does.
        progress: told the bytes of text tokenized and about how many there are, source by source.

    Raises:
        ValueError: no such source, field or tokenizer; no text; values that do not fit together.
        CacheError: the cache cannot be written.
    """
    folder = cache_folder(cache)
    sources = [open_source(name, data.text_field, folder) for name in data.source]
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
        if ids(tokenizer) > vocab:
            raise ValueError(
                f"the tokenizer's vocabulary must fit the model's, got {ids(tokenizer)} ids in {data.tokenizer} and a "
                f"model of {vocab}; set --model.vocab {ids(tokenizer)}"
            )
    else:
        shares = _shares(sources, data.weights)
        tokenizer = trained_tokenizer(
            sources,
            shares,
            vocab=vocab,
            heldout=data.heldout,
            cache=folder,
            special_tokens=data.special_tokens,
            progress=progress,
        )
    stores = tuple(
        token_store(
            source,
            tokenizer,
            heldout=data.heldout,
            heldout_bytes=data.heldout_bytes,
            cache=folder,
            special_tokens=data.special_tokens,
            verify=verify,
            progress=progress,
        )
        for source in sources
    )
    return Batches(
        tokenizer=tokenizer,
        stores=stores,
        weights=data.weights,
        heldout_texts=shared_heldout(stores, data.weights, data.heldout_bytes),
        length=length,
        batch=batch,
        seed=seed,
        own=own,
        special_tokens=data.special_tokens,
    )


def _shares(sources: list[Source], weights: tuple[float, ...]) -> list[float]:
    parts = weights or tuple(source.size for source in sources)
    return [part / max(1, sum(parts)) for part in parts]

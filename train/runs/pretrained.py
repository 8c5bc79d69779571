"""Pretrained weights that a run starts from: the parameters, the tokenizer, and what belongs to them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from tokenizers import Tokenizer

from ... import zoo
from ...configs.run import Run
from ...zoo.decoder import Decoder
from ...zoo.families import registry
from ...zoo.formats.hugging_face import CheckpointFolder
from ...zoo.formats.load import is_run
from ...zoo.formats.source import Source, token_of
from ...zoo.formats.tokenizer_file import read_tokenizer_file, tokenizer_of
from ...zoo.parameters import Parameters, split
from ..data.tokenizer import ids
from .folder import Folder


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that a run starts from."""

    place: str | Source
    """What `zoo.load` reads."""
    model: Decoder
    tokenizer: Tokenizer
    described: Source | CheckpointFolder | None
    """Config, chat template and companions; None for the folder of a run that started from nothing."""

    def parameters(self, mesh: Mesh, progress: Callable[[int, int], None] | None = None) -> Parameters:
        """In float32, as they are trained, each tensor read onto the shards it belongs to."""
        return split(zoo.load(self.place, dtype=jnp.float32, mesh=mesh, progress=progress)[0])


def open_pretrained(run: Run) -> Pretrained:
    """The weights of a run that has some, open and not yet read.

    Raises ValueError where they are not there, are those of another model, or come without a tokenizer that fits it.
    """
    name = run.weights
    if is_run(name):
        folder = Folder(Path(name))
        tokenizer = read_tokenizer_file(folder.tokenizer)
        found = Pretrained(name, folder.run().model, tokenizer, folder.described)
    else:
        source = zoo.open_source(name, ignore=run.ignore, text_only=run.text_only)
        tokenizer = tokenizer_of(source)
        if tokenizer is None:
            raise ValueError(f"{name} has no tokenizer: put its tokenizer.json beside the weights")
        found = Pretrained(source, registry.read(source.config), tokenizer, source)
    _check_model(run, found.model)
    if (size := ids(tokenizer)) > run.model.vocab:
        raise ValueError(
            f"every token must have a row in the embedding, and that of {name} has {run.model.vocab}, which is not "
            f"enough for {token_of(tokenizer, size - 1)!r} with the id {size - 1}: take it out of the tokenizer"
        )
    return found


def _check_model(run: Run, wanted: Decoder) -> None:
    ours, theirs = run.model.flat(), wanted.flat()
    other = [name for name in dict.fromkeys((*theirs, *ours)) if ours.get(name) != theirs.get(name)]
    if other:
        lines = "".join(f"\n  model.{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in other)
        raise ValueError(
            f"the model must be that of the weights {run.weights}, and differs from it:{lines}\nleave these settings "
            f"as they are there; `zoo train {run.weights}` and configs.get_run({run.weights!r}) take its model"
        )

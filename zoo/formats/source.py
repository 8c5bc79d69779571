"""What weights come from, whatever the format: a configuration, named tensors and a tokenizer."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """As `Source.read` gives it; `ml_dtypes.bfloat16` and the float8 types too."""


@runtime_checkable
class Source(Protocol):
    """A checkpoint on disk, in the terms of Hugging Face.

    Making one checks everything that can be checked without reading a tensor, so that a damaged or hostile file is a
    ValueError that names the file before memory is spent on it.
    """

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, as in a Hugging Face `config.json`."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor by its Hugging Face name, e.g. "model.layers.0.mlp.up_proj.weight"."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, on the host. It may be a read-only view of the file."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that comes with the weights, or None where none does."""
        ...


def floating(dtype: Any) -> np.dtype:
    """A dtype that parameters can have. Raises ValueError where it is not of floating point."""
    made = np.dtype(dtype)
    if not jnp.issubdtype(made, jnp.floating):
        raise ValueError(f"parameters are of floating point, and dtype={made.name} is not")
    return made


def check_fits(name: str, tensor: np.ndarray, dtype: np.dtype) -> None:
    """Raises ValueError where a number of the tensor would become infinite in float16."""
    if dtype == np.float16 and tensor.dtype != np.float16:
        largest = float(np.max(np.abs(tensor), initial=0))
        if float(np.finfo(np.float16).max) < largest < np.inf:
            raise ValueError(f"float16 holds magnitudes up to 65504, and {name} has {largest:g}; take bfloat16")


def token_of(tokenizer: Tokenizer, number: Any) -> str | None:
    """The token of an id that a file names; None where it is no id: -1 often stands for none."""
    return tokenizer.id_to_token(number) if type(number) is int and 0 <= number < 2**32 else None


Progress = Callable[[int, int], None]
"""Is told how many bytes of how many are done."""


class WithProgress:
    """A source that tells `progress` of every tensor that is read, in bytes of what the source holds."""

    def __init__(self, source: Source, progress: Progress):
        self._source, self._progress = source, progress
        self._sizes = {name: math.prod(t.shape) * t.dtype.itemsize for name, t in source.tensors.items()}
        self._done, self._total = 0, sum(self._sizes.values())
        self.config, self.tensors = source.config, source.tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> np.ndarray:
        """One tensor of the source."""
        tensor = self._source.read(name)
        self._done += self._sizes.pop(name, 0)  # one that is read again is not counted again
        self._progress(self._done, self._total)
        return tensor

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the source."""
        return self._source.tokenizer()


def widest(dtypes: Iterable[Any]) -> np.dtype:
    """The smallest dtype that holds what all of these hold."""
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(functools.reduce(jnp.promote_types, dtypes))

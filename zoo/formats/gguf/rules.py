"""How tensors in GGUF relate to those in Hugging Face checkpoints: rules that are read in both directions."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from ..source import TensorInfo, widest
from .config import Config


@runtime_checkable
class Tensors(Protocol):
    """Named tensors, read one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by name."""
        ...

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor, or the part of it at an index of its first dimension."""
        ...


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor of one side that is made of tensors of the other when it is read."""

    name: str
    info: TensorInfo
    of: tuple[str, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Change:
    """What happens to the numbers on the way, and back."""

    to_hf: Callable[[np.ndarray, Config], np.ndarray]
    to_gguf: Callable[[np.ndarray, Config], np.ndarray]
    shape: Callable[[tuple[int, ...], Config], tuple[int, ...]] = lambda shape, config: shape
    """The shape on the other side; raises ValueError for shapes that cannot be changed."""


def _turn(x: np.ndarray, _: Config) -> np.ndarray:
    return x.swapaxes(-1, -2)


def _turned(shape: tuple[int, ...], _: Config) -> tuple[int, ...]:
    if len(shape) < 2:
        raise ValueError(f"a matrix is expected, got shape {shape}")
    return (*shape[:-2], shape[-1], shape[-2])


SAME = Change(lambda x, _: x, lambda x, _: x)
TURNED = Change(_turn, _turn, _turned)
"""GPT-2 stores matrices as (in, out) in Hugging Face checkpoints, and so do the experts of GPT-OSS."""
ONE_MORE = Change(
    lambda x, _: (x.astype(np.float32) - np.float32(1)).astype(x.dtype),
    lambda x, _: x.astype(np.float32) + np.float32(1),
)
"""Gemma's norms multiply by 1 + w, which GGUF stores, where Hugging Face has w."""


def paired(heads: str) -> Change:
    """Rows of a head's two halves, which RoPE rotates against each other, lie alternately in GGUF.

    Args:
        heads: the config field with the number of heads.
    """

    def to_hf(x: np.ndarray, config: Config) -> np.ndarray:
        return x.reshape(config[heads], -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    def to_gguf(x: np.ndarray, config: Config) -> np.ndarray:
        return x.reshape(config[heads], 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    def shape(shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
        if config[heads] < 1 or shape[0] % (2 * config[heads]):
            raise ValueError(f"{config[heads]} heads of even size are expected, got {shape[0]} rows")
        return shape

    return Change(to_hf, to_gguf, shape)


@runtime_checkable
class Rule(Protocol):
    """Tensors of a GGUF file and the tensors of a Hugging Face checkpoint that they are.

    Where a rule speaks of tensors that a checkpoint does not have, it yields nothing.
    """

    def to_hf(self, file: Tensors, config: Config) -> Iterator[ConvertedTensor]:
        """The Hugging Face tensors, from those of a GGUF file."""
        ...

    def to_gguf(self, checkpoint: Tensors, config: Config) -> Iterator[ConvertedTensor]:
        """The tensors of a GGUF file, from those of a Hugging Face checkpoint."""
        ...

    def at(self, gguf: str, hf: str) -> "Rule":
        """The rule with a prefix before the names of either side."""
        ...


@dataclass(frozen=True)
class Pair:
    """One tensor here, one there."""

    gguf: str
    hf: str
    change: Change = SAME
    written: bool = True
    """False for a layout that files had once."""

    def to_hf(self, file: Tensors, config: Config) -> Iterator[ConvertedTensor]:
        """See Rule."""
        return self._made(file, config, self.gguf, self.hf, self.change.to_hf)

    def to_gguf(self, checkpoint: Tensors, config: Config) -> Iterator[ConvertedTensor]:
        """See Rule."""
        return self._made(checkpoint, config, self.hf, self.gguf, self.change.to_gguf) if self.written else iter(())

    def _made(
        self, tensors: Tensors, config: Config, old: str, new: str, change: Callable[[np.ndarray, Config], np.ndarray]
    ) -> Iterator[ConvertedTensor]:
        if (info := tensors.tensors.get(old)) is not None:
            shape = _shape(old, lambda: self.change.shape(info.shape, config))
            yield ConvertedTensor(new, TensorInfo(shape, info.dtype), (old,), lambda: change(tensors.read(old), config))

    def at(self, gguf: str, hf: str) -> "Pair":
        """See Rule."""
        return replace(self, gguf=gguf + self.gguf, hf=hf + self.hf)


@dataclass(frozen=True)
class Stacked:
    """The same matrix of all experts: stacked in GGUF, one tensor each, named with {expert}, in Hugging Face."""

    gguf: str
    hf: str

    def to_hf(self, file: Tensors, config: Config) -> Iterator[ConvertedTensor]:
        """See Rule."""
        if (info := file.tensors.get(self.gguf)) is None:
            return
        if len(info.shape) < 2:
            raise ValueError(f"{self.gguf} holds a tensor for each expert, got shape {info.shape}")
        for expert in range(info.shape[0]):

            def read(expert: int = expert) -> np.ndarray:
                return file.read(self.gguf, expert)

            name = self.hf.replace("{expert}", str(expert))
            yield ConvertedTensor(name, TensorInfo(info.shape[1:], info.dtype), (self.gguf,), read)

    def to_gguf(self, checkpoint: Tensors, config: Config) -> Iterator[ConvertedTensor]:
        """See Rule."""
        names: list[str] = []
        while (name := self.hf.replace("{expert}", str(len(names)))) in checkpoint.tensors:
            names.append(name)
        if names:
            first = checkpoint.tensors[names[0]]
            info = TensorInfo((len(names), *first.shape), first.dtype)
            yield ConvertedTensor(
                self.gguf, info, tuple(names), lambda: np.stack([checkpoint.read(name) for name in names])
            )

    def at(self, gguf: str, hf: str) -> "Stacked":
        """See Rule."""
        return Stacked(gguf + self.gguf, hf + self.hf)


@dataclass(frozen=True)
class Joined:
    """Two tensors in GGUF that are one in Hugging Face."""

    gguf: tuple[str, str]
    hf: str
    shape: Callable[[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]
    """Of the one, from those of the two; raises ValueError for shapes that cannot be joined."""
    join: Callable[[np.ndarray, np.ndarray], np.ndarray]
    split: Callable[[np.ndarray, Config], tuple[np.ndarray, np.ndarray]]
    """Views of the one."""

    def to_hf(self, file: Tensors, config: Config) -> Iterator[ConvertedTensor]:
        """See Rule."""
        if not all(name in file.tensors for name in self.gguf):
            return
        first, second = self.gguf
        one, other = file.tensors[first], file.tensors[second]
        info = TensorInfo(_shape(first, lambda: self.shape(one.shape, other.shape)), widest((one.dtype, other.dtype)))

        def read() -> np.ndarray:
            return self.join(*(file.read(name).astype(info.dtype, copy=False) for name in self.gguf))

        yield ConvertedTensor(self.hf, info, self.gguf, read)

    def to_gguf(self, checkpoint: Tensors, config: Config) -> Iterator[ConvertedTensor]:
        """See Rule."""
        if (info := checkpoint.tensors.get(self.hf)) is None:
            return
        views = self.split(np.broadcast_to(np.zeros((), np.bool_), info.shape), config)  # takes no memory
        for index, (name, view) in enumerate(zip(self.gguf, views, strict=True)):

            def read(index: int = index) -> np.ndarray:
                return self.split(checkpoint.read(self.hf), config)[index]

            yield ConvertedTensor(name, TensorInfo(view.shape, info.dtype), (self.hf,), read)

    def at(self, gguf: str, hf: str) -> "Joined":
        """See Rule."""
        first, second = self.gguf
        return replace(self, gguf=(gguf + first, gguf + second), hf=hf + self.hf)


def _shape(name: str, shape: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return shape()
    except ValueError as error:
        raise ValueError(f"{name} does not fit the metadata: {error}") from error


def linear(gguf: str, hf: str, change: Change = SAME, bias: Change | None = None) -> tuple[Pair, Pair]:
    """The rules for a weight and for the bias there may be, which changes as the weight does unless said otherwise."""
    bias = change if bias is None else bias
    return Pair(f"{gguf}.weight", f"{hf}.weight", change), Pair(f"{gguf}.bias", f"{hf}.bias", bias)

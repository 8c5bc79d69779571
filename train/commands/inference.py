"""Flags of the commands that run a model: `zoo generate`, `zoo chat` and `zoo eval`."""

import dataclasses
import sys
from collections.abc import Collection
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from ... import zoo
from ...layers.spec import unknown
from ...zoo.decoder import Decoder
from ...zoo.text_model import DTYPES, TextModel
from ..distributed import mesh as meshes
from ..distributed import processes
from ..runs.compilation_cache import use_compilation_cache
from ..runs.status import bytes_shown
from .source import SourceFlags, located

SOURCE = "The folder of a run, a Hugging Face folder, a .gguf file, a hub name, or a named model."


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How tokens are sampled. A flag that is left out takes its value from generation_config.json, if it is there."""

    temperature: float | None = None
    """0 selects the most likely token each time; higher values vary more. Default: 0.8."""
    top_k: int | None = None
    """Sample from the N most likely tokens; 0: from all. Default: 0."""
    top_p: float | None = None
    """Sample from the most likely tokens that together have this probability. Default: 1."""
    min_p: float | None = None
    """Sample from tokens at least this fraction as likely as the most likely one. Default: 0."""
    repetition_penalty: float | None = None
    """Makes tokens that have occurred less likely; 1: off. Default: 1."""
    seed: int = 0
    """Random seed of sampling."""

    def over(self, defaults: zoo.Sampling) -> zoo.Sampling:
        """The sampling settings: the flags that were given, and for the others the defaults."""
        flags = dataclasses.asdict(self)
        return defaults.replace(**{name: x for name, x in flags.items() if name != "seed" and x is not None})

    def describe(self, defaults: zoo.Sampling, recommended: Collection[str]) -> str:
        """The settings in a line; `recommended` are the fields of `defaults` that generation_config.json sets."""
        sampling, plain = self.over(defaults), zoo.Sampling()
        shown = [f"temperature {sampling.temperature:g}"] if sampling.temperature else ["greedy"]
        for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            if (value := getattr(sampling, name)) != getattr(plain, name):
                shown.append(f"{name} {value:g}")
        used = any(getattr(self, name) is None for name in recommended)
        return ", ".join(shown) + (" (from generation_config.json)" if used else "")


@dataclass(frozen=True, kw_only=True)
class ModelFlags(SourceFlags):
    """Which weights are loaded, on which devices, and in which dtype."""

    step: int | None = None
    """The checkpoint of a run; the latest by default."""
    mesh: str = ""
    """Mesh axes and sizes to shard the model over, e.g. 'tensor=4'."""
    dtype: str = ""
    """float32, bfloat16 or float16; by default float32 for a run, for others the dtype they are stored in."""
    cache_dtype: str = ""
    """The dtype of the KV cache; int8 stores it quantized."""

    def open(self, source: str) -> TextModel:
        """The text model of a source."""
        if self.cache_dtype and self.cache_dtype not in ("int8", *DTYPES):
            raise unknown("cache_dtype", self.cache_dtype, ("int8", *DTYPES))
        use_compilation_cache()
        source = located(source)
        with bytes_shown("loading ") as progress:
            return zoo.open(
                source,
                step=self.step,
                mesh=self._mesh_of if self.mesh or jax.process_count() > 1 else None,
                dtype=self.dtype or None,
                progress=progress,
                ignore=self.ignore,
                text_only=self.text_only,
            )

    def _mesh_of(self, model: Decoder) -> Mesh:
        return meshes.for_parameters(model, self.mesh)


def note(text: str) -> None:
    """Writes a line to standard error, if that is a terminal."""
    if sys.stderr.isatty() and not processes.quiet():
        print(text, file=sys.stderr)

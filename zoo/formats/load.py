"""Weights in: a checkpoint of any kind as a model on its devices, tensor by tensor."""

import functools
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tokenizers import Tokenizer

from ...layers.sharding.collectives import with_layer
from ..decoder import Decoder, DecoderModel
from ..families.names import Part, units
from ..families.registry import find, read
from ..parameters import Description, Parameters, describe, merge, shardings
from .hugging_face import HuggingFaceFolder
from .json_file import read_json
from .selected import SelectedSource
from .source import Progress, Source, WithProgress, check_fits, floating, widest
from .tokenizer_file import tokenizer_of

KEPT = tuple(map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))
"""What parameters stay in where the caller gives no dtype."""

MANY = 100_000
"""Missing tensors that are listed, beside as many as there are."""

Loaded = tuple[DecoderModel, Tokenizer | None]


@dataclass(frozen=True)
class RunReader:
    """How the folder of a run is read: as a model, and as a source."""

    load: Callable[..., Loaded]
    open: Callable[[str | Path], Source]
    text: Callable[[str | Path], Any]
    """The config, companions and chat template of a run, as of a `CheckpointFolder`."""


TRAINING = "flaxzoo.train"
"""The package whose `RUN_READER` reads folders of runs, if the user imported it: this one does not import it."""


def load(
    source: str | Path | Source,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    ignore: Collection[str] = (),
    text_only: bool = False,
    progress: Progress | None = None,
) -> Loaded:
    """A model and its tokenizer from a checkpoint.

    Memory on the host stays at the model (where the devices are the host) and one tensor: each tensor is read, cut, put
    onto the shards it belongs to and transposed there.

    Args:
        source: a Hugging Face folder, a `.gguf` file, the folder of a run of `flaxzoo.train`, the name of a repository
            on the Hugging Face hub ("org/name", which needs the `hub` extra), or an open `Source`.
        dtype: of the parameters; by default each stays in the dtype it is stored in, so that nothing is lost and
            nothing grows. What a model computes in is said where it is called.
        mesh: to split the parameters over, as `flaxzoo.layers.sharding.AXES` says; one device by default.
        ignore: fields of the config, also inside `rope_parameters`, or keys of a GGUF file's metadata that are not
            known, and that change nothing. Those that were ignored are logged.
        text_only: load the text model of a multimodal checkpoint; what is left out is logged.
        progress: called after each tensor.

    Raises:
        ValueError: where the source is damaged, of an unknown family, has an option that is not supported, or lacks a
            tensor, has one too many, or one of another shape; all of these are listed at once. Also where the dtype is
            not of floating point, or cannot hold a number.
    """
    if isinstance(source, str | Path) and is_run(source):
        return runs_of(source).load(source, dtype=dtype, mesh=mesh)
    source = open_source(source, ignore=ignore, text_only=text_only)
    source = source if progress is None else WithProgress(source, progress)
    return model_of(source, dtype=dtype, mesh=mesh), tokenizer_of(source)


def open_source(source: str | Path | Source, *, ignore: Collection[str] = (), text_only: bool = False) -> Source:
    """The checkpoint at a path or of a name on the hub, open, with its config and tensors known but not read.

    Arguments and errors as of `load`. The config of what is returned does not have the ignored fields.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if is_run(path):
            return runs_of(path).open(path)
        if path.suffix == ".gguf":
            from .gguf import GgufFile  # which needs the `gguf` extra

            return GgufFile(path, ignore)
        return _folder(source, ignore, text_only)
    return SelectedSource(source, ignore=ignore, text_only=text_only) if ignore or text_only else source


def _folder(source: str | Path, ignore: Collection[str], text_only: bool) -> HuggingFaceFolder:
    """The folder at a path, or of a name on the hub."""
    path = Path(source)
    if not path.exists():
        from .hub import download, is_name  # which needs the `hub` extra

        if not is_name(str(source)):
            raise ValueError(f"{source} does not exist, and is not a name on the hub (org/name)")
        path = download(str(source))
    return HuggingFaceFolder(path, ignore=ignore, text_only=text_only)


def is_run(path: str | Path) -> bool:
    """Whether this is the folder of a run of `flaxzoo.train`: its config describes a run, and no `model_type`."""
    config = Path(path) / "config.json"
    return config.is_file() and read_json(config).get("kind") == "Run"


def runs_of(source: str | Path) -> RunReader:
    """How this folder of a run is read. Raises ValueError if `flaxzoo.train` is not imported."""
    if TRAINING not in sys.modules:
        raise ValueError(f"{source} is the folder of a run: `import flaxzoo.train` first, or use flaxzoo.train.load")
    return sys.modules[TRAINING].RUN_READER


def model_of(source: Source, *, dtype: Any = None, mesh: Mesh | None = None) -> DecoderModel:
    """The model of an open source; arguments and errors as of `load`."""
    dtype = None if dtype is None else floating(dtype)
    plan = LoadPlan(source)
    dtypes = plan.dtypes(dtype)
    places = shardings(plan.described, mesh) if mesh is not None else dict.fromkeys(plan.described, _one_device())
    parameters: Parameters = {}
    for unit in plan.units:
        tensors = [source.read(plan.real(name)) for name in unit.names]
        for part, view in zip(unit.parts, unit.cut(tensors), strict=True):
            name = part.parameter
            known = plan.described[name]
            check_fits(name, view, dtypes[name])
            parameters[name] = _put(parameters.get(name), view, part, known, places[name], dtypes[name])
        jax.block_until_ready([parameters[part.parameter] for part in unit.parts])  # the host may forget the tensors
    return merge(plan.abstract, parameters)


class LoadPlan:
    """How the tensors of a source become the parameters of its model.

    Raises ValueError where the config has no family or an option that is not supported, and with every tensor that is
    missing, misshapen or left over.
    """

    def __init__(self, source: Source):
        decoder = read(source.config)
        self.family, self.source, self.tensors = find(source.config), source, source.tensors
        self.abstract = decoder.abstract()
        self.described = describe(self.abstract)
        self.units = units(self.family.names, decoder, self.described)
        wanted = sum(unit.count for unit in self.units)
        if wanted > 2 * len(self.tensors) + MANY:  # a config may claim billions of experts: list no names of theirs
            raise ValueError(f"the config makes {wanted:,} tensors, and the checkpoint has {len(self.tensors):,}")
        self._bare = not any(name.startswith(self.family.prefix) for name in self.tensors)
        self._check(decoder)

    def real(self, name: str) -> str:
        """The name in the source of one in the table: a checkpoint without a head leaves out the family's prefix."""
        return name.removeprefix(self.family.prefix) if self._bare else name

    def dtypes(self, dtype: Any) -> dict[str, Any]:
        """What each parameter is kept in: `dtype`, or if that is None the widest that any of its tensors has.

        Those that are used in float32 whatever the model computes in, as routers are, are kept in it where a dtype is
        given.
        """
        stored: dict[str, set[np.dtype]] = {}
        for unit in self.units:
            kinds = {np.dtype(self.tensors[self.real(name)].dtype) for name in unit.names}
            odd = [k for k in kinds if not jnp.issubdtype(k, jnp.floating) or (dtype is None and k not in KEPT)]
            if odd:
                way_out = "; give a dtype" if jnp.issubdtype(odd[0], jnp.floating) else ""
                kept = ", ".join(kind.name for kind in KEPT)
                raise ValueError(f"{unit.names[0]} is stored as {odd[0]}, and parameters are kept as {kept}{way_out}")
            for part in unit.parts:
                stored.setdefault(part.parameter, set()).update(kinds)
        if dtype is None:
            return {name: widest(kinds) for name, kinds in stored.items()}
        return {name: np.dtype(np.float32 if self.described[name].exact else dtype) for name in stored}

    def _check(self, decoder: Decoder) -> None:
        shapes = {self.real(name): unit.shape for unit in self.units for name in unit.names}
        found = {name: info.shape for name, info in self.tensors.items()}
        missing = [f"missing {name} {list(shapes[name])}" for name in shapes if name not in found]
        other = [
            f"{name} has shape {list(found[name])}, the config makes it {list(shape)}"
            for name, shape in shapes.items()
            if name in found and found[name] != shape
        ]
        extra = [name for name in found if name not in shapes and not self._unused(name, decoder)]
        wrong = missing + other + [f"left over {name} {list(found[name])}" for name in extra]
        if wrong:
            lines = "".join(f"\n  {line}" for line in wrong[:40])
            more = f"\n  and {len(wrong) - 40} more" if len(wrong) > 40 else ""
            raise ValueError(
                f"the tensors do not fit the config of model_type {self.family.model_types[0]!r}:{lines}{more}"
            )

    def _unused(self, name: str, decoder: Decoder) -> bool:
        """Whether a tensor is known to be no part of the decoder."""
        depths = range(decoder.layers)
        buffers = {b.format(layer=i, layers=decoder.layers) for b in self.family.buffers for i in depths}
        return any(fnmatchcase(name, self.real(b)) for b in buffers) or self._copies(name, decoder)

    def _copies(self, name: str, decoder: Decoder) -> bool:
        """Whether this is a copy of the embedding that a tied model was saved with."""
        heads = [n for n, (_, ours, *_) in self.family.names.items() if ours == "head.table"]
        tables = [self.real(n) for n, (_, ours, *_) in self.family.names.items() if ours == "embedding.table"]
        if not decoder.tied or name not in map(self.real, heads) or tables[0] not in self.tensors:
            return False
        return self.tensors[name] == self.tensors[tables[0]] and bool(
            np.array_equal(self.source.read(name), self.source.read(tables[0]))
        )


def _one_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _put(
    buffer: jax.Array | None, view: np.ndarray, part: Part, known: Description, place: Any, dtype: Any
) -> jax.Array:
    """The parameter with this part of it in place; each device gets its share of the view alone."""
    stacked = part.layer is not None
    if isinstance(place, NamedSharding):
        inner = place.spec[1:] if stacked else place.spec
        source = NamedSharding(place.mesh, PartitionSpec(*(inner[i] for i in np.argsort(part.order))))
    else:
        source = place
    piece = jax.make_array_from_callback(view.shape, source, lambda index: view[index])
    if not stacked:
        return _turned(piece, part.order, dtype)
    if buffer is None:
        buffer = jnp.zeros(known.shape, dtype, device=place)
    return _written(buffer, piece, part.layer, part.order)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _turned(piece: jax.Array, order: tuple[int, ...], dtype: Any) -> jax.Array:
    return piece.transpose(order).astype(dtype)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _written(buffer: jax.Array, piece: jax.Array, layer: Any, order: tuple[int, ...]) -> jax.Array:
    """The stacked parameter with one layer filled in, in its own memory."""
    return with_layer(buffer, piece.transpose(order).astype(buffer.dtype), layer)

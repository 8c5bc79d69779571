"""Weights in: a checkpoint of any kind as a model on its devices, tensor by tensor."""

import functools
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tokenizers import Tokenizer

from .decoder import Decoder, DecoderModel
from .family import Family, find, read
from .hugging_face import HuggingFaceFolder
from .names import Part, Unit, units
from .parameters import Description, Parameters, describe, merge, shardings
from .source import Source

STORED = (jnp.float32, jnp.bfloat16, jnp.float16)
"""What parameters may be stored in where the caller gives no dtype."""

Progress = Callable[[int, int], None]
"""Is told how many bytes of how many are done."""

Loaded = tuple[DecoderModel, Tokenizer | None]
RUN_LOADERS: list[Callable[..., Loaded]] = []
"""What loads the folder of a run; `flaxzoo.train` puts it here when it is imported."""


def load(
    source: str | Path | Source,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    ignore: Collection[str] = (),
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
        ignore: fields of the config that are not known, and change nothing.
        progress: called after each tensor.

    Raises:
        ValueError: where the source is damaged, of an unknown family, has an option that is not supported, or lacks a
            tensor, has one too many, or one of another shape; all of these are listed at once.
    """
    if isinstance(source, str | Path) and is_run(source):
        if not RUN_LOADERS:
            raise ValueError(
                f"{source} is the folder of a run: `import flaxzoo.train` first, or use flaxzoo.train.load"
            )
        return RUN_LOADERS[0](source, dtype=dtype, mesh=mesh)
    source = open_source(source)
    return model_of(source, dtype=dtype, mesh=mesh, ignore=ignore, progress=progress), source.tokenizer()


def open_source(source: str | Path | Source) -> Source:
    """The checkpoint at a path or of a name on the hub, open, with its config and tensors known but not read."""
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if path.suffix == ".gguf":
        from .gguf import GgufFile  # pyright: ignore[reportMissingImports]

        return GgufFile(path)
    if path.exists():
        return HuggingFaceFolder(path)
    from .hub import download, is_name  # which needs the `hub` extra

    if is_name(str(source)):
        return HuggingFaceFolder(download(str(source)))
    raise ValueError(f"{source} does not exist, and is no name on the hub (org/name)")


def is_run(path: str | Path) -> bool:
    """Whether this is the folder of a run of `flaxzoo.train`."""
    return (Path(path) / "checkpoints").is_dir()


def model_of(
    source: Source,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    ignore: Collection[str] = (),
    progress: Progress | None = None,
) -> DecoderModel:
    """The model of an open source; arguments and errors as of `load`."""
    decoder, family = read(source.config, ignore=ignore), find(source.config)
    abstract = decoder.abstract()
    described = describe(abstract)
    names = _Names(family, source)
    wanted = units(family.names, decoder, described)
    names.check(wanted, decoder)
    dtypes = _dtypes(names, wanted, dtype)
    places = shardings(described, mesh) if mesh is not None else dict.fromkeys(described, _one_device())
    done, total = 0, sum(names.bytes(unit) for unit in wanted)
    parameters: Parameters = {}
    for unit in wanted:
        tensors = [source.read(names.real(name)) for name in unit.names]
        for part, view in zip(unit.parts, unit.cut(tensors), strict=True):
            name = part.parameter
            parameters[name] = _put(parameters.get(name), view, part, described[name], places[name], dtypes[name])
        jax.block_until_ready([parameters[part.parameter] for part in unit.parts])  # the host may forget the tensors
        done += names.bytes(unit)
        if progress is not None:
            progress(done, total)
    return merge(abstract, parameters)


class _Names:
    """The names of a source, which may leave out the family's prefix, as a checkpoint without a head does."""

    def __init__(self, family: Family, source: Source):
        self.family, self.source, self.tensors = family, source, source.tensors
        self._bare = not any(name.startswith(family.prefix) for name in self.tensors)

    def real(self, name: str) -> str:
        """The name in the source of one in the table."""
        return name.removeprefix(self.family.prefix) if self._bare else name

    def bytes(self, unit: Unit) -> int:
        """How much is read for a unit."""
        infos = [self.tensors[self.real(name)] for name in unit.names]
        return sum(int(np.prod(info.shape, dtype=np.int64)) * info.dtype.itemsize for info in infos)

    def check(self, wanted: list[Unit], decoder: Decoder) -> None:
        """Raises ValueError with every tensor that is missing, misshapen or left over."""
        shapes = {self.real(name): unit.shape for unit in wanted for name in unit.names}
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


def _dtypes(names: _Names, wanted: list[Unit], dtype: Any) -> dict[str, Any]:
    """What each parameter is kept in: `dtype`, or the widest that any of its tensors has."""
    found: dict[str, Any] = {}
    for unit in wanted:
        stored = [jnp.dtype(names.tensors[names.real(name)].dtype) for name in unit.names]
        for part in unit.parts:
            found[part.parameter] = functools.reduce(jnp.promote_types, stored, found.get(part.parameter, stored[0]))
            kinds = [k for k in stored if not jnp.issubdtype(k, jnp.floating)]
            if kinds or (dtype is None and found[part.parameter] not in STORED):
                raise ValueError(
                    f"{unit.names[0]} is stored as {(kinds or [found[part.parameter]])[0]}, and parameters are kept as "
                    f"{', '.join(jnp.dtype(s).name for s in STORED)}" + ("" if kinds else "; give a dtype")
                )
    return found if dtype is None else dict.fromkeys(found, jnp.dtype(dtype))


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
    return jax.lax.dynamic_update_slice_in_dim(buffer, piece.transpose(order)[None].astype(buffer.dtype), layer, 0)

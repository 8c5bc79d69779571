"""How arrays are split over a mesh: one table from axis letters to mesh axes, and the partitions that follow from it.

Meshes are explicit-mode (`jax.sharding.AxisType.Explicit`): the sharding of an array is part of its type. Only
parameters and the batch are placed by hand. Whatever is computed from them is placed by the rules of this folder, and
the same code runs without a mesh. `collectives.py` holds what moves data between devices.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

MESH_AXES = ("dcn", "pipeline", "data", "fsdp", "expert", "context", "tensor")
"""All mesh axes, slowest first: dcn spans slices or hosts, all others are within one."""

AXES: dict[str, tuple[str, ...]] = {
    "B": ("dcn", "data", "fsdp", "expert"),
    "T": ("context", "tensor"),
    "D": ("fsdp",),
    "V": ("tensor",),
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "E": ("expert",),
    "L": ("pipeline",),
}
"""The mesh axes that split each letter. Other letters are never split.

In one matmul a mesh axis splits one letter. Parameters, which D and E split at rest, are therefore gathered for use,
because B is split over the same axes. T is split over tensor only in the residual stream and its norms: in between,
tensor splits heads, features or the vocabulary.
"""

GATHERED = (*AXES["D"], *AXES["E"])
"""The mesh axes that split parameters only at rest."""


def partition(axes: str, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition at rest of a parameter with these axis letters ("D N H"); vectors are not split over fsdp."""
    letters = axes.split()
    names = [_present(AXES.get(letter, ()), mesh) if letter not in "BT" else () for letter in letters]
    if len(letters) - stacked(axes) <= 1:
        names = [tuple(name for name in each if name not in AXES["D"]) for each in names]
    return spec(*names)


def stacked(axes: str) -> int:
    """The number of leading letters that stack parameters of the same kind: of layers (L) and of experts (E)."""
    letters = axes.split()
    return next((index for index, letter in enumerate(letters) if letter not in "LE"), len(letters))


def batch_partition(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of tokens, B T, and of arrays that accompany them."""
    return spec(_present(AXES["B"], mesh), _present(("context",), mesh))


def stream_partition(mesh: Mesh | AbstractMesh, length: int) -> PartitionSpec:
    """The partition of the residual stream, B T D: that of tokens, and T over tensor too if it is divisible."""
    time = _present(AXES["T"], mesh)
    return spec(_present(AXES["B"], mesh), time) if length % shard_count(time, mesh) == 0 else batch_partition(mesh)


def _present(names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def spec(*entries: Any) -> PartitionSpec:
    """The partition with a mesh axis, a tuple of mesh axes or None for each dimension."""
    axes = (names_of(entry) for entry in entries)
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in axes))


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a partition."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def shard_count(entry: Any, mesh: Mesh | AbstractMesh) -> int:
    """The number of shards that an entry of a partition makes."""
    return math.prod(mesh.shape.get(name, 1) for name in names_of(entry))


def parameter_axes(name: str, variable: Any) -> str:
    """The axis letters of a parameter, with an L for each leading dimension that stacks layers."""
    axes = variable.get_metadata().get("axes")
    if axes is None:
        raise ValueError(f"parameter {name} has no axes: make it with flaxzoo.layers.sharding.parameter")
    return " ".join(["L"] * (len(variable.shape) - len(axes.split())) + axes.split())


def parameter(axes: str, value: Float[Array, "..."], inputs: int = 0, *, exact: bool = False) -> nnx.Param:
    """An NNX parameter with axis letters; `inputs` is how many of them are the input of a matrix, 0 for vectors.

    The input letters come first, or after a leading E that stacks the matrices of experts. An `exact` parameter stays
    float32 in a model that is cast to a narrower dtype.
    """
    assert value.ndim == len(axes.split()), (axes, value.shape)
    return nnx.Param(value, axes=axes, inputs=inputs, exact=exact)


def check_divides(name: str, axes: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError if a dimension of a parameter is not divisible by the mesh axis that splits it."""
    for letter, size, axis in zip(axes.split(), shape, partition(axes, mesh), strict=False):
        if size % shard_count(axis, mesh):
            fits = [n for n in range(1, max(mesh.size, 64) + 1) if size % n == 0]
            raise ValueError(
                f"mesh axis {axis}={mesh.shape[axis]} does not divide {letter}={size} of parameter {name} ({axes}); "
                f"{axis} may be {', '.join(map(str, fits))}"
            )


def spec_of(array: Array | jax.ShapeDtypeStruct) -> tuple[Any, ...]:
    """The partition in the type of an array, with one entry per dimension."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def used_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry that split a parameter also during use."""
    return tuple(name for name in names_of(entry) if name not in GATHERED)


def time_after(entry: Any, length: int, over: tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes that split T after `reduce_shard` along it, if `entry` did before."""
    names = (*names_of(entry), *over)
    return names if length % shard_count(names, jax.sharding.get_abstract_mesh()) == 0 else names_of(entry)


def shards(array: Array, dim: int) -> int:
    """The number of shards of a dimension of an array."""
    return shard_count(spec_of(array)[dim], jax.typeof(array).sharding.mesh)


def zeros(shape: tuple[int, ...], dtype: Any, spec: tuple[Any, ...]) -> Array:
    """Zeros with the partition `spec`."""
    return jnp.zeros(shape, dtype, out_sharding=split_as(*spec))


def zeros_like(tree: Any, *leading: int) -> Any:
    """Zeros with the shapes, dtypes and partitions of arrays (or shapes of arrays), after leading dimensions."""
    return jax.tree.map(lambda x: zeros((*leading, *x.shape), x.dtype, (*[None] * len(leading), *spec_of(x))), tree)


def split_as(*spec: Any) -> PartitionSpec | None:
    """The `out_sharding` of a result with these entries; None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else PartitionSpec(*spec)


def context_axis(array: Float[Array, "B T ..."]) -> str | None:
    """The mesh axis that splits T outside of the residual stream; None if none does."""
    names = names_of(spec_of(array)[1])
    return names[0] if names else None

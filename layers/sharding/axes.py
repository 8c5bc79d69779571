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
"""The mesh axes there are, slowest first: dcn is over slices or hosts, all others within one."""

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
"""The mesh axes that split each letter. Letters that are not here are never split.

A letter gives way where its axis splits another letter of the same product. So parameters, split by D and E at rest,
are gathered to be used: B is split over the same axes. And T is split over tensor in the residual stream and its norms
alone: between them, heads, features or the vocabulary are.
"""

GATHERED = (*AXES["D"], *AXES["E"])
"""The mesh axes that split parameters at rest alone."""


def partition(axes: str, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter with these axis letters ("D N H") is split at rest; vectors are not split over fsdp."""
    letters = axes.split()
    names = [_there(AXES.get(letter, ()), mesh) if letter not in "BT" else () for letter in letters]
    if len(letters) - stacked(axes) <= 1:
        names = [tuple(name for name in each if name not in AXES["D"]) for each in names]
    return spec(*names)


def stacked(axes: str) -> int:
    """How many leading letters only stack parameters that are alike: those of layers (L) and of experts (E)."""
    letters = axes.split()
    return next((place for place, letter in enumerate(letters) if letter not in "LE"), len(letters))


def batch_partition(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How tokens, B T, and what comes with them are split."""
    return spec(_there(AXES["B"], mesh), _there(("context",), mesh))


def stream_partition(mesh: Mesh | AbstractMesh, length: int) -> PartitionSpec:
    """How the residual stream, B T D, is split: as tokens are, and along T over tensor too, if that divides it."""
    time = _there(AXES["T"], mesh)
    return spec(_there(AXES["B"], mesh), time) if length % shard_count(time, mesh) == 0 else batch_partition(mesh)


def _there(names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def spec(*entries: Any) -> PartitionSpec:
    """A partition of arrays from a name, a tuple of names or nothing for each dimension."""
    each = (names_of(entry) for entry in entries)
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in each))


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a partition."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def shard_count(entry: Any, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts an entry of a partition splits."""
    return math.prod(mesh.shape.get(name, 1) for name in names_of(entry))


def parameter_axes(name: str, variable: Any) -> str:
    """The axis letters of a parameter, with an L for each leading dimension that stacks layers."""
    axes = variable.get_metadata().get("axes")
    if axes is None:
        raise ValueError(f"parameter {name} has no axes: make it with flaxzoo.layers.sharding.parameter")
    return " ".join(["L"] * (len(variable.shape) - len(axes.split())) + axes.split())


def parameter(axes: str, value: Float[Array, "..."], inputs: int = 0, *, exact: bool = False) -> nnx.Param:
    """An NNX parameter that knows its axis letters and, if it is a matrix, how many of them are its input.

    These are its first letters, or those after a leading E that stacks one matrix for each expert. One that is `exact`
    is used in float32, also in a model that is cast to compute in less.
    """
    assert value.ndim == len(axes.split()), (axes, value.shape)
    return nnx.Param(value, axes=axes, inputs=inputs, exact=exact)


def check_divides(name: str, axes: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError where a dimension of a parameter is not a multiple of the mesh axis that splits it."""
    for letter, size, axis in zip(axes.split(), shape, partition(axes, mesh), strict=False):
        if size % shard_count(axis, mesh):
            fits = [n for n in range(1, max(mesh.size, 64) + 1) if size % n == 0]
            raise ValueError(
                f"mesh axis {axis}={mesh.shape[axis]} does not divide {letter}={size} of parameter {name} ({axes}); "
                f"{axis} may be {', '.join(map(str, fits))}"
            )


def spec_of(array: Array | jax.ShapeDtypeStruct) -> tuple[Any, ...]:
    """The sharding of an array's type, one entry a dimension."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def used_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry that split a parameter also while it is used."""
    return tuple(name for name in names_of(entry) if name not in GATHERED)


def time_after(entry: Any, length: int, over: tuple[str, ...]) -> tuple[str, ...]:
    """What splits T after `reduce_shard` along it, where `entry` did before."""
    names = (*names_of(entry), *over)
    return names if length % shard_count(names, jax.sharding.get_abstract_mesh()) == 0 else names_of(entry)


def shards(array: Array, dim: int) -> int:
    """Into how many parts a dimension of an array is split."""
    return shard_count(spec_of(array)[dim], jax.typeof(array).sharding.mesh)


def zeros(shape: tuple[int, ...], dtype: Any, spec: tuple[Any, ...]) -> Array:
    """Zeros split as `spec` says."""
    return jnp.zeros(shape, dtype, out_sharding=split_as(*spec))


def zeros_like(tree: Any, *leading: int) -> Any:
    """Zeros with the shapes of arrays, after leading dimensions, and split as they are; shapes alone will do."""
    return jax.tree.map(lambda x: zeros((*leading, *x.shape), x.dtype, (*[None] * len(leading), *spec_of(x))), tree)


def split_as(*spec: Any) -> PartitionSpec | None:
    """The `out_sharding` of a result with these entries, or None where there is no mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else PartitionSpec(*spec)


def context_axis(array: Float[Array, "B T ..."]) -> str | None:
    """The mesh axis that splits T outside of the residual stream, where one does."""
    names = names_of(spec_of(array)[1])
    return names[0] if names else None

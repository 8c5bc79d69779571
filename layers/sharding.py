"""Where arrays live on a mesh: one table from axis letter to mesh axis, and an einsum that follows types.

Meshes are explicit-mode (`jax.sharding.AxisType.Explicit`): an array's sharding is part of its type. So only parameters
and the batch are placed by hand; everything computed from them is placed by the rules of this file, and the same code
runs with no mesh at all.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec, reshard
from jaxtyping import Array, Float

AXES = {"D": "fsdp", "V": "tensor", "F": "tensor", "N": "tensor", "K": "tensor", "E": "expert"}
"""The mesh axis that splits each letter of a parameter at rest. Letters that are not here are never split."""

BATCH = ("data", "fsdp")
"""The mesh axes that split the batch B."""

MESH_AXES = ("data", "fsdp", "tensor", "expert")
"""The mesh axes there are, slowest first."""

GATHERED = ("fsdp", "expert")
"""The mesh axes that split parameters at rest alone: to be used, they are gathered over these."""


def partition(axes: str, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter with these axis letters ("D N H") is split at rest; vectors are not split over fsdp."""
    letters = axes.split()
    names = [AXES.get(letter) for letter in letters]
    if len(letters) - stacked(axes) <= 1:
        names = [None if name == "fsdp" else name for name in names]
    return PartitionSpec(*(name if mesh.shape.get(name, 1) > 1 else None for name in names))


def stacked(axes: str) -> int:
    """How many leading letters only stack parameters that are alike: those of layers (L) and of experts (E)."""
    letters = axes.split()
    return next((place for place, letter in enumerate(letters) if letter not in "LE"), len(letters))


def batch_partition(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How arrays that start with the batch axis B are split."""
    names = tuple(name for name in BATCH if mesh.shape.get(name, 1) > 1)
    return PartitionSpec(names) if names else PartitionSpec()


def parameter_axes(name: str, variable: Any) -> str:
    """The axis letters of a parameter, with an L for each leading dimension that stacks layers."""
    axes = variable.get_metadata().get("axes")
    if axes is None:
        raise ValueError(f"parameter {name} has no axes: make it with flaxzoo.layers.sharding.parameter")
    return " ".join(["L"] * (len(variable.shape) - len(axes.split())) + axes.split())


def parameter(axes: str, value: Float[Array, "..."], inputs: int = 0) -> nnx.Param:
    """An NNX parameter that knows its axis letters and, if it is a matrix, how many of them are its input.

    These are its first letters, or those after a leading E that stacks one matrix for each expert.
    """
    assert value.ndim == len(axes.split()), (axes, value.shape)
    return nnx.Param(value, axes=axes, inputs=inputs)


def check_divides(name: str, axes: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError where a dimension of a parameter is not a multiple of the mesh axis that splits it."""
    for letter, size, axis in zip(axes.split(), shape, partition(axes, mesh), strict=False):
        if axis is not None and size % mesh.shape[axis]:
            fits = [n for n in range(1, max(mesh.size, 64) + 1) if size % n == 0]
            raise ValueError(
                f"mesh axis {axis}={mesh.shape[axis]} does not divide {letter}={size} of parameter {name} ({axes}); "
                f"{axis} may be {', '.join(map(str, fits))}"
            )


def spec_of(array: Array) -> tuple[Any, ...]:
    """The sharding of an array's type, one entry a dimension."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def gather(weight: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """A parameter made ready for use: cast, then gathered over fsdp and expert; still split over tensor."""
    weight = jnp.asarray(weight, dtype)
    spec = spec_of(weight)
    if not set(GATHERED) & set(spec):
        return weight
    return reshard(weight, PartitionSpec(*(None if axis in GATHERED else axis for axis in spec)))


def einsum(axes: str, x: Float[Array, "..."], y: Float[Array, "..."], **options: Any) -> Float[Array, "..."]:
    """`jnp.einsum` with axis letters ("B T D, D F -> B T F") whose result keeps the split of the letters it keeps.

    A contracted letter that is split is summed over its mesh axis.
    """
    inputs, result = axes.split("->")
    placed: dict[str, Any] = {}
    for letters, array in zip(inputs.split(","), (x, y), strict=True):
        for letter, axis in zip(letters.split(), spec_of(array), strict=True):
            placed[letter] = placed.get(letter) or axis
    spec = split_as(*(placed[letter] for letter in result.split()))
    return jnp.einsum(axes.replace(" ", ""), x, y, out_sharding=spec, **options)


def shards(array: Array, dim: int) -> int:
    """Into how many parts a dimension of an array is split."""
    axis = spec_of(array)[dim]
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    return math.prod(jax.typeof(array).sharding.mesh.shape[name] for name in names)


def zeros(shape: tuple[int, ...], dtype: Any, spec: tuple[Any, ...]) -> Array:
    """Zeros split as `spec` says."""
    return jnp.zeros(shape, dtype, out_sharding=split_as(*spec))


def split_as(*spec: Any) -> PartitionSpec | None:
    """The `out_sharding` of a result with these entries, or None where there is no mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else PartitionSpec(*spec)


def as_split(array: Array, like: Array) -> Array:
    """An array, split as another one of its shape is."""
    spec = split_as(*spec_of(like))
    return array if spec is None else reshard(array, spec)


def locally(function: Callable[..., Array], *arrays: Array) -> Array:
    """Calls `function` on each device's own part of the arrays; the result is split like the first of them."""
    specs = tuple(PartitionSpec(*spec_of(array)) for array in arrays)
    if all(axis is None for spec in specs for axis in spec):
        return function(*arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0])(*arrays)


def whole(array: Array) -> Array:
    """The array with all of its parts on every device."""
    return array if jax.sharding.get_abstract_mesh().empty else reshard(array, PartitionSpec())

"""Models as flat dictionaries of named arrays, the form that is optimised, saved and sharded."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..layers.sharding.axes import check_divides, parameter_axes, partition

Parameters = dict[str, jax.Array]
"""Arrays by dotted name, e.g. "stack.0.mixer.query.weight"; stacked layers lead with an L axis."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlatModel:
    """A model as a list of arrays, for functions that are called often.

    `jax.jit` flattens a list in microseconds, a module in more than a millisecond.
    """

    arrays: list[jax.Array]
    structure: Any = field(metadata={"static": True})

    @classmethod
    def of(cls, model: nnx.Module) -> "FlatModel":
        """The flat form of a model."""
        return cls(*jax.tree.flatten(model))

    @property
    def model(self) -> Any:
        """The model."""
        return jax.tree.unflatten(self.structure, self.arrays)

    @property
    def platform(self) -> str:
        """The platform of the devices that hold the arrays, e.g. "tpu"."""
        return next(iter(self.arrays[0].sharding.device_set)).platform

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """A context with the mesh of the arrays, if they are on one."""
        mesh = getattr(self.arrays[0].sharding, "mesh", None)
        return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()


@dataclass(frozen=True)
class Description:
    """Shape, dtype and axes of a parameter."""

    axes: str
    """Axis letters, e.g. "L D N H"."""
    shape: tuple[int, ...]
    dtype: Any
    inputs: int
    """The number of letters, after those that stack (L and E), that are the input of a matrix; 0 for vectors."""
    exact: bool = False
    """Whether it is used in float32, whatever dtype the model computes in."""

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _named(model: nnx.Module) -> list[tuple[str, Any]]:
    leaves = jax.tree.leaves_with_path(model, is_leaf=_is_variable)
    return [
        (".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path), leaf) for path, leaf in leaves
    ]


def describe(model: nnx.Module) -> dict[str, Description]:
    """Every parameter of a model (also an abstract one) by name, in the order of the model."""
    return {
        name: Description(
            parameter_axes(name, variable),
            variable.shape,
            variable.dtype,
            variable.get_metadata()["inputs"],
            variable.get_metadata()["exact"],
        )
        for name, variable in _named(model)
    }


def split(model: nnx.Module) -> Parameters:
    """The arrays of a model by name."""
    return {name: variable[...] for name, variable in _named(model)}


def merge(abstract: Any, parameters: Parameters) -> Any:
    """The model with these arrays; `abstract` is a model of the same spec. Raises ValueError if names differ."""
    names = [name for name, _ in _named(abstract)]
    if set(names) != set(parameters):
        missing, extra = sorted(set(names) - set(parameters)), sorted(set(parameters) - set(names))
        raise ValueError(f"parameters do not fit the model: missing {missing}, left over {extra}")
    return jax.tree.unflatten(jax.tree.structure(abstract), [parameters[name] for name in names])


def partitions(descriptions: dict[str, Description], mesh: Mesh | AbstractMesh) -> dict[str, PartitionSpec]:
    """The partition of each parameter at rest. Raises ValueError if a dimension is not divisible by its mesh axis."""
    for name, description in descriptions.items():
        check_divides(name, description.axes, description.shape, mesh)
    return {name: partition(description.axes, mesh) for name, description in descriptions.items()}


def shardings(descriptions: dict[str, Description], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each parameter at rest."""
    return {name: NamedSharding(mesh, spec) for name, spec in partitions(descriptions, mesh).items()}

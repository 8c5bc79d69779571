"""A model as a flat dictionary of named arrays, and back: the form that is optimised, saved and sharded."""

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
    """A model as a list, for functions that are called often: jit takes a list apart in microseconds, a module in more
    than a millisecond.
    """

    arrays: list[jax.Array]
    structure: Any = field(metadata={"static": True})

    @classmethod
    def of(cls, model: nnx.Module) -> "FlatModel":
        """A model taken apart."""
        return cls(*jax.tree.flatten(model))

    @property
    def model(self) -> Any:
        """The model."""
        return jax.tree.unflatten(self.structure, self.arrays)

    @property
    def platform(self) -> str:
        """What the arrays are on, e.g. "tpu"."""
        return next(iter(self.arrays[0].sharding.device_set)).platform

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """To compute on the mesh the arrays live on, if they live on one."""
        mesh = getattr(self.arrays[0].sharding, "mesh", None)
        return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()


@dataclass(frozen=True)
class Description:
    """What is known of a parameter without its values."""

    axes: str
    """Axis letters, e.g. "L D N H"."""
    shape: tuple[int, ...]
    dtype: Any
    inputs: int
    """How many letters, after those that stack (L and E), are the input of a matrix; 0 for vectors."""
    exact: bool = False
    """Whether it is used in float32, whatever the model computes in."""

    @property
    def size(self) -> int:
        """How many numbers it holds."""
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
    """The model of these arrays; `abstract` is a model of the same spec."""
    names = [name for name, _ in _named(abstract)]
    if set(names) != set(parameters):
        missing, extra = sorted(set(names) - set(parameters)), sorted(set(parameters) - set(names))
        raise ValueError(f"parameters do not fit the model: missing {missing}, left over {extra}")
    return jax.tree.unflatten(jax.tree.structure(abstract), [parameters[name] for name in names])


def partitions(descriptions: dict[str, Description], mesh: Mesh | AbstractMesh) -> dict[str, PartitionSpec]:
    """How each parameter is split at rest. Raises ValueError where a dimension is not a multiple of its mesh axis."""
    for name, known in descriptions.items():
        check_divides(name, known.axes, known.shape, mesh)
    return {name: partition(known.axes, mesh) for name, known in descriptions.items()}


def shardings(descriptions: dict[str, Description], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter lives at rest."""
    return {name: NamedSharding(mesh, spec) for name, spec in partitions(descriptions, mesh).items()}

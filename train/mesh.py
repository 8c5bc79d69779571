"""Device meshes from a line of text, and the batch on them."""

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxlib._jax import Device

from ..configs.run import Run
from ..layers.sharding import BATCH, MESH_AXES, batch_partition
from ..layers.spec import unknown
from ..zoo.decoder import Decoder
from ..zoo.parameters import describe, partitions


def parse(text: str) -> dict[str, int]:
    """The axes of 'fsdp=4,tensor=2', in the order of the text. Raises ValueError on anything else."""
    sizes: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, size = part.partition("=")
        if not equals or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(f"a mesh is written 'fsdp=4,tensor=2': each axis once, with a size; got {text!r}")
        if name not in MESH_AXES:
            raise unknown("mesh axis", name, MESH_AXES)
        sizes[name] = int(size)
    return sizes


def make(run: Run, devices: list[Device] | None = None) -> tuple[Mesh, str]:
    """The explicit-mode mesh a run trains on, and a line that says what it is.

    With no mesh in the run: fsdp over as many of the devices as batch and parameters divide by.

    Raises:
        ValueError: where there are too few devices, or a size does not divide the batch or a parameter.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse(run.mesh)
    if not sizes:
        sizes = {"fsdp": next(n for n in range(len(devices), 0, -1) if _fits(run, {"fsdp": n}, devices))}
    mesh = _mesh(sizes, devices)
    check(run, mesh)
    kind = devices[0].device_kind
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    idle = len(devices) - mesh.size
    return mesh, f"{text} on {mesh.size} x {kind}" + (f" ({idle} more left idle)" if idle else "")


def for_parameters(model: Decoder, text: str) -> Mesh:
    """The mesh that `text` describes, of the first devices. Raises ValueError as `make` does; there is no batch."""
    mesh = _mesh(parse(text), jax.devices())
    partitions(describe(model.abstract()), mesh)
    return mesh


def check(run: Run, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError where the mesh does not divide the batch or a parameter."""
    shards = math.prod(mesh.shape.get(name, 1) for name in BATCH)
    rows = run.batch // run.accumulate
    if rows % shards:
        fits = [n for n in range(1, rows + 1) if rows % n == 0]
        raise ValueError(
            f"the mesh splits the batch {shards} ways (data x fsdp), which does not divide {rows} sequences (batch "
            f"{run.batch} / accumulate {run.accumulate}); it may be split {', '.join(map(str, fits))} ways"
        )
    specs = partitions(describe(run.model.abstract()), mesh)
    used = {*BATCH, *(axis for spec in specs.values() for axis in spec)}
    for axis in mesh.axis_names:
        if axis not in used and mesh.shape[axis] > 1:
            raise ValueError(f"mesh axis {axis}={mesh.shape[axis]} would split nothing of this model; leave it out")


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, put on the mesh as its part of the global arrays."""
    sharding = NamedSharding(mesh, batch_partition(mesh))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def _mesh(sizes: dict[str, int], devices: list[Device]) -> Mesh:
    count = math.prod(sizes.values())
    if count > len(devices):
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh {text} needs {count} devices, there are {len(devices)}; lower a size, e.g. to 1")
    explicit = (jax.sharding.AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices[:count], axis_types=explicit)


def _fits(run: Run, sizes: dict[str, int], devices: list[Device]) -> bool:
    try:
        check(run, _mesh(sizes, devices))
    except ValueError:
        return False
    return True

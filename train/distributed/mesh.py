"""Device meshes from a line of text, and the batch on them."""

import bisect
import contextlib
import math
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxlib._jax import Device

from ...configs.run import Run
from ...layers.sharding import stages
from ...layers.sharding.axes import AXES, MESH_AXES, batch_partition, names_of, shard_count, stream_partition
from ...layers.spec import unknown
from ...zoo.decoder import Decoder
from ...zoo.parameters import Description, describe, partitions


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
        fitting = (n for n in range(len(devices), 0, -1) if _fits(run, {"fsdp": n}, devices))
        sizes = {"fsdp": next(fitting, len(devices))}
    mesh = _mesh(sizes, devices)
    check(run, mesh)
    kind = devices[0].device_kind
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    idle = len(devices) - mesh.size
    notes = [f"{idle} more left idle"] if idle else []
    if (parts := sizes.get(stages.AXIS, 1)) > 1:
        idle_time = f"{stages.bubble(parts, run.accumulate):.0%} of the time with accumulate={run.accumulate}"
        notes.append(f"its {parts} stages wait {idle_time}, less with more")
    if sizes.get("dcn", 1) > 1 and len(_slices(devices)) == 1:
        notes.append("dcn within one slice and host, as there are no others")
    return mesh, f"{text} on {mesh.size} x {kind}" + (f" ({', '.join(notes)})" if notes else "")


def for_parameters(model: Decoder, text: str, devices: list[Device] | None = None) -> Mesh:
    """The mesh that `text` describes, of the first devices. Raises ValueError as `make` does; there is no batch.

    With no text: one device or, where there are several processes, fsdp over as many as divide the parameters.
    """
    devices = jax.devices() if devices is None else devices
    described = describe(model.abstract())
    if parse(text).get(stages.AXIS, 1) > 1:
        raise ValueError(
            f"mesh axis {stages.AXIS} is for training, got {text!r}: a token would pass stage after stage, and all "
            f"but one would wait; split the model over fsdp or tensor"
        )

    def made(sizes: dict[str, int]) -> Mesh:
        mesh = _mesh(sizes, devices)
        partitions(described, mesh)
        return mesh

    if text or jax.process_count() == 1:
        return made(parse(text or "fsdp=1"))
    for count in range(len(devices), 1, -1):
        with contextlib.suppress(ValueError):
            return made({"fsdp": count})
    return made({"fsdp": len(devices)})


def check(run: Run, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError where the mesh does not divide the batch, its sequences or a parameter."""
    known = describe(run.model.abstract())
    rows = run.batch // run.accumulate
    batch, context = batch_partition(mesh)
    shards = shard_count(batch, mesh)
    if rows % shards:
        fits = [n for n in range(1, rows + 1) if rows % n == 0]
        raise ValueError(
            f"the mesh splits the batch {shards} ways ({' x '.join(names_of(batch))}), which does not divide {rows} "
            f"sequences (batch {run.batch} / accumulate {run.accumulate}); it may be split "
            f"{', '.join(map(str, fits))} ways"
        )
    parts = mesh.shape.get(stages.AXIS, 1)
    if parts > 1 and run.remat.endswith("_offload"):
        raise ValueError(
            f"stages keep on the chip what waits for its gradient, got remat={run.remat!r} with {stages.AXIS}={parts}; "
            f"set remat to {run.remat.removesuffix('_offload')!r}"
        )
    # The stages share the loss of what each of the other parts of T holds.
    time = (*names_of(stream_partition(mesh, 0)[1]), *([stages.AXIS] if parts > 1 else []))
    if run.length % shard_count(time, mesh):
        raise ValueError(
            f"the mesh splits each sequence {shard_count(time, mesh)} ways ({' x '.join(time)}), which does not "
            f"divide its length of {run.length} tokens; the nearest lengths that fit are "
            f"{', '.join(str(n) for n in _nearest(run.length, shard_count(time, mesh)))}"
        )
    specs = partitions(known, mesh)
    used = {*names_of(batch), *names_of(context)} - set(AXES["E"])
    used |= {name for spec in specs.values() for entry in spec for name in names_of(entry)}
    for axis in mesh.axis_names:
        if axis not in used and mesh.shape[axis] > 1:
            raise ValueError(f"mesh axis {axis}={mesh.shape[axis]} would split nothing of this model; leave it out")
    if parts > 1 and run.sample_every:
        _check_samples(known, mesh)
    if run.context != "ring" and not names_of(context):
        raise ValueError(f"context={run.context!r} is for a mesh with an axis context, got {run.mesh!r}; leave it out")


def _check_samples(known: dict[str, Description], mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError where `without_stages` does not divide a parameter."""
    sizes = _without_stages(mesh)
    try:
        partitions(known, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
    except ValueError as error:
        raise ValueError(
            f"samples are written with the axis {stages.AXIS} as a part of fsdp, and then {error}; with "
            f"sample_every=0 there are none"
        ) from error


def _nearest(length: int, parts: int) -> list[int]:
    """The multiples of `parts` around a length."""
    below = length // parts * parts
    return [each for each in (below, below + parts) if each]


def without_stages(mesh: Mesh) -> Mesh:
    """The devices of a mesh with its axis pipeline, if it has one, as a part of fsdp: to write samples on."""
    if stages.AXIS not in mesh.axis_names:
        return mesh
    names = [name for name in mesh.axis_names if name != stages.AXIS]
    names = names if "fsdp" in names else ["fsdp", *names]
    sizes = _without_stages(mesh)
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(stages.AXIS), names.index("fsdp"))
    explicit = (jax.sharding.AxisType.Explicit,) * len(names)
    return Mesh(devices.reshape([sizes[name] for name in names]), tuple(names), axis_types=explicit)


def _without_stages(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    sizes = dict(mesh.shape)
    return sizes | {"fsdp": sizes.pop(stages.AXIS) * sizes.get("fsdp", 1)}


def rows(mesh: Mesh, batch: int) -> tuple[int, ...]:
    """The rows of a batch that this process's devices hold, ascending: those it must read.

    They follow from the mesh alone: the devices of several processes may hold the same ones, and those of one process
    rows that are no neighbours.
    """
    held = NamedSharding(mesh, PartitionSpec(batch_partition(mesh)[0])).addressable_devices_indices_map((batch,))
    return tuple(sorted({row for index in held.values() if index for row in range(batch)[index[0]]}))


def place(
    batch: dict[str, np.ndarray], mesh: Mesh, own: tuple[int, ...] = (), size: int | None = None
) -> dict[str, jax.Array]:
    """A batch on the mesh: all of its rows, or the `own` ones of this process (see `rows`) of a batch of `size`."""
    sharding = NamedSharding(mesh, batch_partition(mesh))

    def placed(part: np.ndarray) -> jax.Array:
        count = len(part) if size is None else size

        def shard(index: Any) -> np.ndarray:
            first, end, _ = index[0].indices(count)
            begin = bisect.bisect_left(own, first) if own else first
            return part[(slice(begin, begin + end - first), *index[1:])]

        return jax.make_array_from_callback((count, *part.shape[1:]), sharding, shard)

    return {name: placed(part) for name, part in batch.items()}


def _mesh(sizes: dict[str, int], devices: list[Device]) -> Mesh:
    count, text = math.prod(sizes.values()), ",".join(f"{name}={size}" for name, size in sizes.items())
    if count > len(devices):
        more = f", or set JAX_NUM_CPU_DEVICES={count}" if devices[0].platform == "cpu" else ""
        raise ValueError(f"mesh {text} needs {count} devices, there are {len(devices)}; lower a size{more}")
    explicit = (jax.sharding.AxisType.Explicit,) * len(sizes)
    if sizes.get("dcn", 1) > 1:
        mesh = Mesh(_over_slices(sizes, devices), tuple(sizes), axis_types=explicit)
    else:
        try:
            mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices[:count], axis_types=explicit)
        except AssertionError as error:  # of a TPU's devices
            raise ValueError(
                f"mesh {text} takes {count} of {len(devices)} chips, which are no block of a slice; take all of them"
            ) from error
    idle = {device.process_index for device in devices} - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise ValueError(
            f"every process must have a device in the mesh, but {text} takes {count} of {len(devices)} devices, and "
            f"none of process {', '.join(map(str, sorted(idle)))}; choose a mesh of more devices, or start fewer "
            "processes"
        )
    return mesh


def _slices(devices: list[Device]) -> list[list[Device]]:
    """Devices by slice of a TPU pod or, where there is one slice, by process; a link between them is slow."""
    for name in ("slice_index", "process_index"):
        groups: dict[int, list[Device]] = {}
        for device in devices:
            groups.setdefault(getattr(device, name, 0), []).append(device)
        if len(groups) > 1:
            return [groups[key] for key in sorted(groups)]
    return [devices]


def _over_slices(sizes: dict[str, int], devices: list[Device]) -> np.ndarray:
    """The devices of a mesh whose axis dcn alone goes from slice to slice."""
    slow, groups = sizes["dcn"], _slices(devices)
    each = math.prod(sizes.values()) // slow
    place = list(sizes).index("dcn")
    if len(groups) == 1:
        inner = [size for name, size in sizes.items() if name != "dcn"]
        return np.moveaxis(np.array(devices[: slow * each]).reshape(slow, *inner), 0, place)
    if len(groups) < slow or min(map(len, groups[:slow])) < each:
        raise ValueError(
            f"mesh axis dcn={slow} is over slices or hosts, each with {each} devices for the other axes; "
            f"there are {len(groups)}, with {', '.join(str(len(group)) for group in groups)} devices"
        )
    chosen = [device for group in groups[:slow] for device in group[:each]]
    return create_hybrid_device_mesh(
        [1 if name == "dcn" else size for name, size in sizes.items()],
        [size if name == "dcn" else 1 for name, size in sizes.items()],
        chosen,
        process_is_granule=len({getattr(device, "slice_index", 0) for device in chosen}) == 1,
    )


def _fits(run: Run, sizes: dict[str, int], devices: list[Device]) -> bool:
    try:
        check(run, _mesh(sizes, devices))
    except ValueError:
        return False
    return True

"""TPU and GPU devices with their peak speeds and memory, and slices of them by name."""

import abc
import functools
import math
import os
import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, ClassVar

import jax

from ...layers.spec import unknown
from .hlo import Operation, Program

TOPOLOGIES = {"colab-v5e": "v5e:1x1", "colab-v6e": "v6e:1x1", "kaggle": "v5e:2x4"}
"""Slices that people have, by friendly names."""
GPUS = 8
"""That share a switch; beyond it, links are those of a network, which the table does not have."""


@dataclass(frozen=True, kw_only=True)
class Chip(abc.ABC):
    """A JAX device; `chips.toml` says where the numbers are from."""

    kind: str
    """`device_kind` of JAX."""
    name: str
    hbm_gib: float
    tflops: float
    hbm_gbps: float
    link_gbps: float
    trust: str
    """How accurate predicted times are."""
    devices: int = 1
    """JAX devices of a chip."""
    aliases: tuple[str, ...] = ()
    """Other names that JAX has reported for the device."""
    options: dict[str, bool | int | str] = field(default_factory=dict)
    """Compiler options for programs on several devices."""
    plan_options: dict[str, bool | int | str] = field(default_factory=dict)
    """Compiler options for plans only: they add estimates to the text of a program and change nothing else."""
    usd_hour: float | None = None
    watts: float | None = None

    compiler: ClassVar[str]
    """Name of the compiler."""
    reached: ClassVar[float] = 1.0
    """The share of the published speed of the HBM that copies are taken to reach."""
    verb: ClassVar[str] = "is predicted to take"
    """What precedes the time in the report."""
    sources: ClassVar[dict[str, str]]
    """Where each part of a time comes from."""

    def costs(self, usd_hour: float | None, watts: float | None) -> tuple[float | None, float | None]:
        """Price and power as given or, where they are not, as the table has them."""
        return self.usd_hour if usd_hour is None else usd_hour, self.watts if watts is None else watts

    @property
    def hbm(self) -> float:
        """Bytes that a program may use."""
        return self.hbm_gib * 2**30

    @property
    def hbm_speed(self) -> float:
        """Bytes a second that copies reach."""
        return self.reached * self.hbm_gbps * 1e9

    @property
    @abc.abstractmethod
    def example(self) -> str:
        """The sides of a slice."""

    @abc.abstractmethod
    def check_shape(self, shape: str) -> None:
        """Raises ValueError unless there are slices of this shape, e.g. "2x4"."""

    @abc.abstractmethod
    def seconds(self, op: Operation, program: Program) -> float | None:
        """Of an operation of XLA, by the compiler's estimate; None where there is none."""

    @abc.abstractmethod
    def attention_share(self, *, backward: bool) -> float:
        """The share of the peak that kernels of attention reach."""

    @abc.abstractmethod
    def kernel(self, op: Operation) -> str | None:
        """The name of what an operation calls that XLA did not make, and has no estimate of."""

    @abc.abstractmethod
    def sending(self, count: int, *, whole: bool) -> float:
        """Bytes a second that each of so many devices sends when all do, on a slice or the `whole` of one."""


@dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """A JAX device of a TPU, for whose programs the compiler estimates cycles."""

    clock_ghz: float
    wrap: int
    attention: tuple[float, float]
    """Shares of the peak, forward and backward."""
    decode: float
    """The share of the HBM's speed at which attention reads a cache."""
    grouped: tuple[float, float]
    """Cycles of products of grouped rows, and of groups with each other, beside those of the matrix units alone."""
    derate: float = 1.0
    """The share of its predicted speed that attention reaches."""

    compiler = "TPU compiler"
    reached = 0.9  # what XLA's own estimates take on v5e
    sources: ClassVar[dict[str, str]] = {
        "compute": "cycle estimates of the compiler",
        "untold": "no cycle estimate: results, read and written at HBM bandwidth",
        "attention": "shares of the peak, or of HBM bandwidth, in benchmarks/results",
        "experts": "grouped matmuls by their tiles, as in the schedules in benchmarks/results, at even loads",
    }

    @property
    def example(self) -> str:
        """The sides of a slice, of which large ones have three if they close to rings at four already."""
        return "2x2x1" if self.wrap == 4 else "2x4"

    def check_shape(self, shape: str) -> None:
        """Raises ValueError unless the shape has 2 or 3 sides and consists of whole hosts or of a part of one."""
        sides = [int(side) for side in shape.split("x")]
        if len(sides) not in (2, 3) or any(side % 2 and side > 1 for side in sides[:2]):
            raise ValueError(
                f"a host has 2x2 chips, so a slice has 2 or 3 sides of which the first two are 1 or even, e.g. "
                f"'{self.name}:{self.example}', got '{self.name}:{shape}'"
            )

    def seconds(self, op: Operation, program: Program) -> float | None:
        """Of an operation of XLA, by the compiler's cycles."""
        return None if op.cycles is None else op.cycles / self.clock_ghz / 1e9

    def kernel(self, op: Operation) -> str | None:
        """The name of a Pallas kernel, or of XLA's for grouped rows."""
        return op.kernel

    def attention_share(self, *, backward: bool) -> float:
        """Measured on schedules."""
        return self.attention[backward] * self.derate

    def sending(self, count: int, *, whole: bool) -> float:
        """Bytes a second that each of so many devices sends: two ways on a ring, one way on a line."""
        ring = count >= 4 and (whole or count % self.wrap == 0)
        return (2 if ring else 1) * self.link_gbps * 1e9


@dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """A GPU. Its compiler estimates bytes but no cycles, so times are roofline lower bounds."""

    target: str
    """What of it the compiler has to know beside its memory, as the fields of XLA's GpuDeviceInfoProto."""
    trust: str = (
        "a roofline lower bound, not a prediction; the one step that we ran on an H100 took 1.5 times its bound. "
        "Launches and latencies are not included; operands in the L2 cache can be faster"
    )

    compiler = "GPU compiler"
    verb = "takes at least"
    sources: ClassVar[dict[str, str]] = {
        "compute": "matmuls at the published peak, or bytes at HBM bandwidth, as the compiler counts them",
        "untold": "no compiler estimate: results, read and written at HBM bandwidth",
        "attention": "FLOPs of kernels at the published peak; loops of XLA over blocks as computation",
        "experts": "",
    }

    @property
    def hbm(self) -> float:
        """Bytes that a program may use: JAX allocates XLA_CLIENT_MEM_FRACTION of the memory, by default 0.75."""
        share = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75
        return float(share) * self.hbm_gib * 2**30

    @property
    def example(self) -> str:
        """How many there may be."""
        return f"{GPUS}"

    def check_shape(self, shape: str) -> None:
        """Raises ValueError unless the shape is a number of GPUs that can share a switch."""
        if not (shape.isdecimal() and int(shape) <= GPUS):
            raise ValueError(
                f"a topology of GPUs is a number of them behind one switch, '{self.name}:1' to '{self.name}:{GPUS}', "
                f"got '{self.name}:{shape}'"
            )

    def seconds(self, op: Operation, program: Program) -> float | None:
        """The least that any of the compiler's models says of a fusion's bytes and, but for products, its arithmetic.

        Products take the published peak: the models know no matrix units.
        """
        flops = program.flops(op)
        part = "memory_access_time_us" if flops else "exec_time_us"
        estimates = [model[part] for model in op.models if model[part] or part == "exec_time_us"]
        if not estimates and not flops:
            return None
        return max(flops / (self.tflops * 1e12), 1e-6 * min(estimates, default=0.0))

    def kernel(self, op: Operation) -> str | None:
        """The name of a Pallas kernel, or of what else a custom call calls: cuBLAS, cuDNN, Triton."""
        return op.kernel or (op.target if op.code.startswith("custom-call") else None)

    def attention_share(self, *, backward: bool) -> float:
        """All of the peak: times are the least."""
        return 1.0

    def sending(self, count: int, *, whole: bool) -> float:
        """Bytes a second that each of so many devices sends: over all its links, through the switch."""
        return self.link_gbps * 1e9

    def description(self) -> str:
        """The GPU as XLA's GpuTargetConfigProto, in text: what to compile for."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 }}
            gpu_device_info {{
              name: "{self.kind}" device_vendor: "NVIDIA Corporation"
              device_memory_size: {round(self.hbm_gib * 2**30)} memory_bandwidth: {round(self.hbm_gbps * 1e9)}
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
              {self.target}
            }}
        """


@functools.cache
def chips() -> dict[str, Chip]:
    """The chips of chips.toml that can be planned for, by device kind."""
    rows = {kind: row for kind, row in _table().items() if "name" in row and "target" in row}
    return {**tpus(), **{kind: Gpu(kind=kind, **row) for kind, row in rows.items()}}


@functools.cache
def tpus() -> dict[str, Tpu]:
    """The TPUs of chips.toml that can be planned for, by device kind."""
    rows = {kind: row for kind, row in _table().items() if "name" in row and "target" not in row}
    pairs: Any = {kind: {name: tuple(row[name]) for name in ("attention", "grouped")} for kind, row in rows.items()}
    return {kind: Tpu(kind=kind, **row | pairs[kind]) for kind, row in rows.items()}


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    rows = tomllib.loads((files(__package__ or "train") / "chips.toml").read_text(encoding="utf-8"))
    return {kind: row | {"aliases": tuple(row.get("aliases", ()))} for kind, row in rows.items()}


def canonical_kind(device_kind: str) -> str | None:
    """The row of chips.toml for what JAX reports as a `device_kind`; None for a device that has none."""
    return next((kind for kind, row in _table().items() if device_kind in (kind, *row["aliases"])), None)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a JAX device, by its `device_kind`; None for a device that is not in chips.toml."""
    kind = canonical_kind(device_kind)
    return None if kind is None else _table()[kind]["tflops"] * 1e12


def compiler_options() -> dict[str, Any]:
    """Compiler options of a step on the devices of the ambient mesh. Empty unless there are several TPU devices."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.size == 1:
        return {}
    chip = chips().get(canonical_kind(mesh.devices.flat[0].device_kind) or "")
    return {} if chip is None else chip.options


def slice_of(text: str) -> str:
    """The topology that `text` names, e.g. 'v6e:2x4' or 'h100:8'. Raises ValueError on a name that is not known."""
    topology = TOPOLOGIES.get(text, text)
    name, colon, shape = topology.partition(":")
    named = {chip.name: chip for chip in chips().values()}
    if name not in named or not colon:
        raise unknown("topology", text, [*TOPOLOGIES, *(f"{name}:{chip.example}" for name, chip in named.items())])
    if not all(side.isdecimal() and int(side) for side in shape.split("x")):
        raise ValueError(f"a topology is written 'v6e:2x4': a chip and the sides of a slice, got {text!r}")
    named[name].check_shape(shape)
    return topology


def chip_of(text: str) -> tuple[Chip, int]:
    """The chip of a topology, and how many JAX devices it has."""
    name, _, shape = slice_of(text).partition(":")
    chip = next(chip for chip in chips().values() if chip.name == name)
    return chip, chip.devices * math.prod(int(side) for side in shape.split("x"))

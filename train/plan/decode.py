"""What generation needs and takes on TPUs or GPUs: the program that draws tokens, as their compiler makes it."""

import math
import os
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from ...layers.moe.layer import MoE
from ...zoo.decoder import Decoder
from ...zoo.generation import session
from ...zoo.generation.sampling import Sampling
from ...zoo.generation.state import STRIDE
from ...zoo.parameters import FlatModel, describe, merge, partitions, shardings
from ..distributed import mesh as meshes
from .chips import Chip, chip_of, slice_of
from .hlo import Operation, Program
from .kernels import Kernels
from .plan import Memory, SlicePlan, bytes_held, compiled, devices_of
from .report import costs, memory_table, slice_json, time_table
from .time import Time, time_of

Dtype = Literal["float32", "bfloat16"]
CacheDtype = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Rows of tokens that grow by one at a time, each up to a length."""

    model: Decoder
    batch: int = 1
    length: int = 2048
    """Tokens of a row; times are those of a cache that is full."""
    mesh: str = ""
    """Axes and sizes; empty: tensor over as many devices as divide the model."""
    dtype: Dtype = "bfloat16"
    """Of parameters, and of what is computed."""
    cache_dtype: CacheDtype = "bfloat16"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1:
            raise ValueError(f"rows and their tokens are at least 1, got batch={self.batch}, length={self.length}")
        if 0 < self.model.max_positions < self.length:
            raise ValueError(f"rows come to {self.length} tokens, the model has {self.model.max_positions} positions")


@dataclass
class DecodePlan(SlicePlan):
    """A program that generates `STRIDE` tokens of each row, on a slice."""

    decoding: Decoding

    @property
    def seconds(self) -> float:
        """Time for one token of every row. Raises ValueError if a part of the program has no model."""
        return self.program_seconds / STRIDE

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s of a device."""
        return self.decoding.batch / self.seconds / self.devices

    @property
    def least(self) -> float:
        """Seconds that it takes to read parameters and caches once, at the published speed of the HBM.

        Not an embedding that is looked up alone, nor more experts than the rows choose if all choose others.
        """
        spec, rows = self.decoding.model, self.decoding.batch
        mixtures = [block.ffn for block in spec.all_blocks if isinstance(block.ffn, MoE) and block.ffn.unused(1)]
        sizes = {(mixture.experts, mixture.router.top_k) for mixture in mixtures}
        shares = [max(0, experts - rows * chosen) / (experts - chosen) for experts, chosen in sizes]
        idle = spec.unused() * max(shares, default=0)
        table = 0 if spec.tied else spec.vocab * spec.dim
        split = math.prod(size for axis, size in self.mesh.items() if axis in ("fsdp", "expert", "tensor"))
        experts = self.mesh.get("expert", 1)
        size = jnp.dtype(self.decoding.dtype).itemsize
        read = self.memory.parameters - size * (idle + table * experts) / split + self.memory.cache
        return read / (self.chip.hbm_gbps * 1e9)

    @property
    def largest_batch(self) -> int:
        """Rows that would fit, by arithmetic: caches and what is temporary grow with them."""
        fixed = self.memory.parameters + self.memory.tiles + self.memory.code
        row = (self.memory.cache + self.memory.temporary) / self.decoding.batch
        return max(0, int((self.memory.capacity - fixed) / row))


def plan_decoding(decoding: Decoding, topology: str) -> DecodePlan:
    """Compiles the program of a session that draws tokens for a slice, e.g. "v5e:2x4", and reads what it needs.

    Raises:
        ValueError: on a topology that does not exist, or a mesh that does not fit it or the model.
    """
    topology = slice_of(topology)
    chip, devices = chip_of(topology)[0], devices_of(topology)
    spec = decoding.model
    mesh = meshes.for_parameters(spec, decoding.mesh or f"tensor={_divides(spec, devices)}", devices)
    sizes = dict(mesh.shape)
    with jax.set_mesh(mesh):
        flat, caches, lowered = _lowered(decoding, mesh)
        memory = Memory(capacity=chip.hbm, parameters=bytes_held(flat), cache=bytes_held(caches))
        program = compiled(lowered, memory, chip)
    time = None if program is None else decoding_time(program, decoding, chip, sizes)
    return DecodePlan(decoding, topology=topology, chip=chip, mesh=sizes, memory=memory, time=time)


def decoding_time(program: Program, decoding: Decoding, chip: Chip, mesh: dict[str, int]) -> Time:
    """Of `STRIDE` tokens of each row: that many rounds of the loop that goes on until all rows are done."""
    # Rows are not split: every device computes them all, with its part of the parameters.
    split = math.prod(mesh.values()) // mesh.get("tensor", 1) // mesh.get("expert", 1)
    kernels = Kernels(decoding.model, chip, mesh, decoding.batch * split)
    rounds = [op for op in program.computations.get(program.entry, []) if op.code == "while"]

    def trip_count(op: Operation) -> float | None:
        return STRIDE if op in rounds else None

    return time_of(program, chip, mesh, kernels.decoding, trip_count)


def _divides(spec: Decoder, devices: list[Any]) -> int:
    """The most of the devices that the axis tensor may be over."""
    known = describe(spec.abstract())

    def fits(count: int) -> bool:
        try:
            partitions(known, jax.sharding.AbstractMesh((count,), ("tensor",)))
        except ValueError:
            return False
        return True

    return next(count for count in range(len(devices), 0, -1) if fits(count))


def _lowered(decoding: Decoding, mesh: Mesh) -> tuple[FlatModel, Any, Any]:
    """Parameters, caches, and the program of `zoo.Session.advance` for them; nothing is computed."""
    spec = decoding.model.unstacked()  # as `zoo.for_decoding` makes it
    known, abstract = describe(spec.abstract()), spec.abstract()
    places, dtype = shardings(known, mesh), jnp.dtype(decoding.dtype)
    parameters: Any = {
        name: jax.ShapeDtypeStruct(what.shape, jnp.float32 if what.exact else dtype, sharding=places[name])
        for name, what in known.items()
    }

    def placed(leaf: Any) -> Any:
        partition = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition))

    def shapes(function: Any) -> Any:
        return jax.tree.map(placed, jax.eval_shape(function))

    flat = FlatModel.of(jax.tree.map(placed, jax.eval_shape(partial(merge, abstract), parameters)))
    room = session.rounded(decoding.length)
    caches = shapes(partial(session.empty_caches, spec, decoding.batch, room, jnp.dtype(decoding.cache_dtype)))
    rest = shapes(
        lambda: (
            session.start(jax.random.key(0), decoding.batch, None, None),
            Sampling().traced(spec.vocab),
            jnp.zeros(2, jnp.int32),
            jnp.int32(STRIDE),
        )
    )
    advance = session.advance(mesh.devices.flat[0].platform)
    return flat, caches, advance.trace(flat, caches, *rest, log_probs=False, dtype=dtype).lower()


def command(
    decoding: Decoding, topology: str, *, as_json: bool, usd_hour: float | None = None, watts: float | None = None
) -> None:
    """Plans generation and prints the plan."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    with Console(stderr=True).status(f"compiling for {topology} ..."):
        found = plan_decoding(decoding, topology)
    if as_json:
        print(json_of(found, usd_hour=usd_hour, watts=watts))
    else:
        page(found, Console(), usd_hour=usd_hour, watts=watts)


def page(found: DecodePlan, console: Console, *, usd_hour: float | None = None, watts: float | None = None) -> None:
    """Prints a plan."""
    decoding, chips_ = found.decoding, math.prod(found.mesh.values())
    mesh = ",".join(f"{axis}={size}" for axis, size in found.mesh.items())
    rows = f"{decoding.batch} row{'s' * (decoding.batch > 1)}"
    what = f"{rows} of {decoding.length} tokens, {decoding.dtype}, caches {decoding.cache_dtype}"
    console.print(f"{found.topology}: {chips_} x {found.chip.kind}, mesh {mesh}, {what}", highlight=False)
    memory_table(found.memory, console)
    if found.time is None:
        console.print("\nA smaller batch, a shorter length or --cache-dtype int8 saves memory; more chips split it.")
        return
    console.print(f"By arithmetic, {found.largest_batch} rows would fit.")
    if found.time.unknown:
        console.print(f"\nNo time is reported: there is no model of {', '.join(found.time.unknown)}.")
        return
    console.print(
        f"\nA token of every row {found.chip.verb} {found.seconds * 1e3:.3g} ms: {1 / found.seconds:,.1f} tokens/s "
        f"a row, {found.tokens_per_second:,.1f} tokens/s a chip; bound by {found.time.bound}. To read parameters and "
        f"caches once takes {found.least * 1e3:.3g} ms ({found.least / found.seconds:.0%}).",
        soft_wrap=True,
    )
    console.print(f"Time of one call, which generates {STRIDE} tokens of each row:", highlight=False)
    time_table(found.time, found.chip, console)
    costs(found.chip, found.tokens_per_second, console, usd_hour, watts)
    console.print(f"Accuracy: {found.chip.trust}.", highlight=False, soft_wrap=True)


def json_of(found: DecodePlan, *, usd_hour: float | None = None, watts: float | None = None) -> str:
    """A plan as JSON; sizes in bytes, times in seconds."""
    job = asdict(found.decoding)
    del job["model"]
    if found.fits:
        job |= {"largest_batch_by_arithmetic": found.largest_batch, "tokens_at_a_time": STRIDE}

    def times() -> dict[str, float]:
        return {
            "token_seconds": found.seconds,
            "tokens_per_second_per_row": 1 / found.seconds,
            "tokens_per_second_per_chip": found.tokens_per_second,
            "least_token_seconds": found.least,
        }

    return slice_json(found, job, times, usd_hour=usd_hour, watts=watts)

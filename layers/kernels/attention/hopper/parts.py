"""What the forward and the backward kernels for Hopper GPUs share.

A block of rows, queries or keys, belongs to a thread block of three warpgroups. Two of them compute, with `ROWS` rows
each; the third copies the tiles of the other side, one after another, to slots of shared memory, from which both read
(FlashAttention-3, 2407.08608, section 3.1). Logits never leave the registers. A line of the schedule lists the tiles of
a block of rows: it visits all from the first to the last that is not empty, and evaluates the mask in all but the first
run of full ones.

Axis letters as in tpu/parts.py. Lengths are padded to whole blocks, and heads to a multiple of `WIDTH`, the columns of
a tile for copies and matrix units.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from ..blocks import FULL, Blocks, padded
from ..pair_function import Operation, Value, applied
from ..problem import Operands, Problem

ROWS = 64
"""Rows of a warpgroup."""
COMPUTING = 2
"""Warpgroups that compute."""
TILE = ROWS * COMPUTING
"""Rows of a thread block."""
SLOTS = 2
"""Tiles of each array in shared memory, loaded or in flight."""
WIDTH = 64
REGISTERS = 232, 40
"""Registers of a thread of the warpgroups that compute, and of the one that copies; 65,536 in all."""
LOG2_E = math.log2(math.e)
SUMS: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
"""Accumulators of the matrix units."""
LAYOUT = plgpu.Layout.WGMMA
"""The layout of pairs in the registers of a warpgroup: that of results of matrix units."""


def filled(x: Float[Array, "B length heads H"]) -> Float[Array, "B rows heads width"]:
    """Pads with zeros to whole blocks and tiles."""
    return padded(padded(x, 1, TILE), 3, WIDTH)


class Work:
    """A problem, its arrays in the layout of the kernels, and calls of kernels."""

    def __init__(self, problem: Problem, operands: Operands, interpret: Any):
        self.problem, self.operands, self.interpret = problem, operands, interpret
        self.q, self.k, self.v = (filled(x) for x in (operands.q, operands.k, operands.v))
        self.group = self.q.shape[2] // self.k.shape[2]
        """Query heads for each key/value head."""
        hoisted: list[tuple[Value | str, str | None, Any]] = [
            (value, value.side, side)
            for value, side in zip(problem.mask.hoisted, problem.mask_values(operands), strict=True)
        ]
        if operands.query_positions is not None:
            hoisted.append(("query", "query", operands.query_positions))
        self.names = [name for name, _, _ in hoisted]
        self.hoisted = [_padded_hoisted(side, jnp.asarray(array)) for _, side, array in hoisted]
        """Hoisted values of the mask, and positions of queries if they are an array."""

    def schedule(self, block: int, *, transposed: bool = False) -> Int32[Array, "B K rows 4"]:
        """The spans of blocks of `TILE` queries over tiles of `block` keys; transposed, of keys over queries."""
        other = (self.operands.q if transposed else self.operands.k).shape[1]
        hoisted = (block, TILE) if transposed else (TILE, block)
        return _schedule(self.problem.blocks(self.operands, *hoisted, transposed=transposed), -(-other // block))

    def call(self, kernel: Any, name: str, grid: tuple[int, int], out: Any, scratch: list[Any], *arrays: Array) -> Any:
        """Runs a kernel on `arrays` and the hoisted values, over heads and blocks of rows of each sequence."""
        return plgpu.kernel(
            kernel,
            out_type=out,
            scratch_types=scratch,
            grid=(*grid, self.q.shape[0]),
            grid_names=("head", "row", "batch"),
            num_threads=COMPUTING + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name=name,
            interpret=self.interpret,
        )(*arrays, *self.hoisted)

    def visible(self, pairs: "Pairs", hoisted: list[Any]) -> Array:
        """Which pairs are visible."""
        refs = dict(zip(self.names, hoisted, strict=True))

        def read(value: Value) -> Array:
            if value.leaf == "key":
                return pairs.places("key")
            if value.leaf == "query":
                if "query" in refs:
                    return pairs.spread(refs["query"], "query")
                return pairs.places("query") + self.problem.query_offset
            array = pairs.spread(refs[value], value.side)
            return array != 0 if value.dtype == np.bool_ else array

        (seen,) = self.problem.mask.evaluate(read, apply=_on_registers)
        seen = jnp.broadcast_to(seen, pairs.shape)
        keys = self.operands.k.shape[1]
        return seen & (pairs.places("key") < keys) if keys % TILE else seen


def _on_registers(operation: Operation, inputs: Sequence[Array]) -> list[Array]:
    """An operation on pairs in registers, which have no `not` of booleans."""
    if operation.name == "not" and inputs[0].dtype == jnp.bool_:
        return [inputs[0] != jnp.bool_(True)]
    return applied(operation, inputs)


def _padded_hoisted(side: str | None, array: Array) -> Array:
    """A hoisted value as kernels read it, (B or 1, N or 1, padded length); booleans have 32 bits."""
    array = array.astype(jnp.int32) if array.dtype == jnp.bool_ else array
    return array if side == "neither" else padded(array, 2, TILE, None)


# The schedule ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """The tiles that a block of rows visits, from `low` to `high`; from `full_low` to `full_high` they are full."""

    low: Any
    full_low: Any
    full_high: Any
    high: Any

    @classmethod
    def read(cls, ref: Any, batch: Any, head: Any, row: Any) -> "Span":
        """A line of the schedule."""
        of_batch, of_head = (count > 1 for count in ref.shape[:2])
        return cls(*(ref[batch if of_batch else 0, head if of_head else 0, row, n] for n in range(4)))

    @property
    def count(self) -> Any:
        """The number of tiles it visits."""
        return self.high - self.low

    def tile(self, n: Any, block: int) -> Any:
        """The rows of tile `low` + n, of `block` rows."""
        return pl.ds((self.low + n) * block, block)

    def visit(self, step: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
        """Carries `step(masked, n, carry)` through all tiles low + n."""
        ends = 0, self.full_low - self.low, self.full_high - self.low, self.count
        for first, last, masked in zip(ends, ends[1:], (True, False, True), strict=False):
            carry = lax.fori_loop(first, last, functools.partial(step, masked), carry)
        return carry


def _schedule(blocks: Blocks, columns: int) -> Int32[Array, "B K rows 4"]:
    """The spans of all rows of blocks; the leading dimensions are 1 where all are alike."""
    kinds, low, high = (jnp.asarray(x) for x in (blocks.kinds(columns), blocks.low, blocks.high))
    place, full = jnp.arange(columns, dtype=jnp.int32), kinds == FULL
    first = jnp.min(jnp.where(full, place, columns), axis=-1)
    last = jnp.min(jnp.where(~full & (place > first[..., None]), place, columns), axis=-1)
    return jnp.stack([low, jnp.minimum(first, high), jnp.minimum(last, high), high], axis=-1).astype(jnp.int32)


# Warpgroups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """Slots that tiles are loaded to in turn: barriers for slots that are full, and that are free again."""

    full: Any
    free: Any

    @staticmethod
    def barriers(arrays: int) -> list[Any]:
        """The barriers, for tiles of this number of arrays."""
        return [
            plgpu.Barrier(num_arrivals=arrays, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=SLOTS),
        ]

    def wait(self, n: Any) -> Any:
        """Waits for tile n; returns its slot."""
        slot = lax.rem(n, jnp.int32(SLOTS))
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, slot: Any) -> None:
        """Frees a slot for the next tile, once all warpgroups that compute have released it."""
        plgpu.barrier_arrive(self.free.at[slot])

    def run(self, count: Any, load_tile: Callable[[Any, Any], None], compute: Callable[[Any], None]) -> None:
        """One warpgroup loads `count` tiles, by `load_tile(n, slot)`; each of the others runs `compute(warpgroup)`."""
        own = lax.axis_index("warpgroup")
        computing, copying = REGISTERS

        @pl.when(own < COMPUTING)
        def _() -> None:
            plgpu.set_max_registers(computing, action="increase")
            compute(own)

        def reuse(n: Any, _: None) -> None:
            plgpu.barrier_wait(self.free.at[lax.rem(n, jnp.int32(SLOTS))])

        def next_tile(n: Any, _: None) -> None:
            pl.when(n >= SLOTS)(functools.partial(reuse, n, None))
            load_tile(n, lax.rem(n, jnp.int32(SLOTS)))

        @pl.when(own == COMPUTING)
        def _() -> None:
            plgpu.set_max_registers(copying, action="decrease")
            lax.fori_loop(0, count, next_tile, None)
            lax.fori_loop(jnp.maximum(count - SLOTS, 0), count, reuse, None)


def load(arrays: Sequence[Any], index: tuple[Any, ...], tiles: Sequence[Any], slot: Any, barriers: Any) -> None:
    """Starts the copies of `array[index]` of each array to slot `slot` of its tiles; each arrives at the barrier."""
    for array, tile in zip(arrays, tiles, strict=True):
        plgpu.copy_gmem_to_smem(array.at[index], tile.at[slot], barriers.at[slot])


def tiles(count: int, rows: int, width: int, dtype: Any) -> Any:
    """Tiles in shared memory, in the layout of matrix units and copies."""
    order: Any = plgpu.TilingTransform, plgpu.SwizzleTransform
    return plgpu.SMEM((count, rows, width), dtype, transforms=(order[0]((8, 64)), order[1](128)))


# In the registers of a warpgroup --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The pairs of a warpgroup's rows with a tile, of a sequence and a head."""

    down: str
    """The side of the rows: "query" or "key"."""
    shape: tuple[int, int]
    batch: Any
    head: Any
    first: tuple[Any, Any]
    """The index of the first row and of the first column."""

    def places(self, side: str) -> Array:
        """The index of the query or key of each pair."""
        dim = 0 if side == self.down else 1
        return plgpu.broadcasted_iota(jnp.int32, self.shape, dim, layout=LAYOUT) + self.first[dim]

    def spread(self, ref: Any, side: str | None) -> Array:
        """A hoisted value of queries, keys or neither, for each pair."""
        batch, head = (at if count > 1 else 0 for at, count in zip((self.batch, self.head), ref.shape, strict=False))
        if side == "neither":
            return lax.broadcast_in_dim(ref[batch, head, 0], self.shape, [])
        dim = 0 if side == self.down else 1
        part = ref.at[batch, head, pl.ds(self.first[dim], self.shape[dim])]
        return spread(plgpu.load(part, layout=LAYOUT.reduce(1 - dim), optimized=False), self.shape, dim)


def spread(numbers: Array, shape: tuple[int, int], dim: int = 0) -> Array:
    """A value of each row (dim 0) or column (dim 1), for each pair."""
    return lax.broadcast_in_dim(numbers, shape, [dim])


def row_of(value: float) -> Array:
    """One value for all rows."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), LAYOUT.reduce(1))


def zeros(width: int) -> Array:
    """Accumulators for each row."""
    return plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), LAYOUT)


def logits(a: Any, b: Any, shape: tuple[int, int]) -> Array:
    """The float32 products of the rows of two tiles in shared memory."""

    def run(sums: Any) -> Array:
        plgpu.wgmma(sums, a, b.transpose((1, 0)))
        return sums[...]

    return pl.run_scoped(run, SUMS(shape, jnp.float32))


def added(sums: Array, pairs: Array, b: Any) -> Array:
    """Float32 sums plus the product of pairs in registers with a tile in shared memory."""
    found: Any = pl.run_state(lambda sums: plgpu.wgmma(sums, pairs, b))(SUMS.init(sums))
    return found

"""How long kernels take: attention of training and of decoding, caches and XLA's products of grouped rows.

Where attention is no kernel but loops of XLA, how often they run.
"""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

from ...layers.kernels.attention import blocks, portable
from ...layers.moe.layer import MoE
from ...layers.sharding import stages
from ...zoo.decoder import Decoder
from .chips import Chip, Tpu
from .hlo import ARRAY, Operation, Program, TripCounts, bytes_of
from .time import Kernel

PUT = 1.0e-6, 45e-9
"""Seconds to write a token of every row into a cache, beside those of its bytes: of all, and of each row."""
ATTENTION = {
    "attention_forward": 1.0,
    "attention_backward": 2.5,
    "attention_backward_queries": 1.5,
    "attention_backward_keys": 2.0,
}
"""Products of kernels with what grows with the length, beside the two of the forward one."""
METADATA = 2e-6
"""Seconds in which the scalar core lists the tiles of grouped rows, at most, by its schedule."""
TILING = re.compile(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"')
OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?)\}, \w+=")


@dataclass(frozen=True)
class Kernels:
    """The kernels of a program that computes some tokens at once, on a mesh.

    Experts are taken to be equally likely: what their loads are is not in a program.
    """

    model: Decoder
    chip: Chip
    mesh: dict[str, int]
    tokens: float
    """Of all devices."""

    @property
    def tpu(self) -> Tpu:
        """The chip: there are no such kernels on others."""
        assert isinstance(self.chip, Tpu)
        return self.chip

    @property
    def devices(self) -> int:
        """That share a layer."""
        return math.prod(size for axis, size in self.mesh.items() if axis != stages.AXIS)

    @property
    def rows(self) -> int:
        """That the experts of a device compute."""
        chosen = [block.ffn.router.top_k for block in self.model.all_blocks if isinstance(block.ffn, MoE)]
        split = self.devices // self.mesh.get("tensor", 1)
        return round(max(chosen, default=0) * self.tokens / split)

    def training(self, length: int) -> Kernel:
        """Attention over documents of a length, by its FLOPs."""

        def seconds(op: Operation, program: Program) -> float | None:
            if op.kernel not in ATTENTION:
                return self.grouped(op)
            # What grows with the length are the products with keys and values.
            model, share = self.model, self.chip.attention_share(backward=op.kernel != "attention_forward")
            ends = [sum(block.mixer.flops(model.dim, size) for block in model.all_blocks) for size in (1, length)]
            flops = (ends[1] - ends[0]) / len(model.all_blocks) * self.tokens / self.devices * ATTENTION[op.kernel]
            return flops / (share * self.chip.tflops * 1e12)

        return seconds

    def loops(self, length: int) -> TripCounts:
        """Attention by blocks over documents of a length: a block of queries goes over those of keys that it sees on
        average, and in each takes the branch that looks at no mask, the shortest one that computes.
        """
        size, dim = blocks.block_size(length, portable.BLOCK, 8), self.model.dim
        flops = [[block.mixer.flops(dim, count) for count in (1, 2, length)] for block in self.model.all_blocks]
        # What a second token adds is half a key. The blocks at the ends are seen in part and computed whole.
        seen = [1 + (all_ - one) / (2 * (two - one)) for one, two, all_ in flops if two > one]

        def trip_count(op: Operation) -> float | None:
            if not op.blockwise or not seen:
                return None
            return blocks.FULL if op.code == "conditional" else sum(seen) / len(seen) / size + 0.5

        return trip_count

    def decoding(self, op: Operation, program: Program) -> float | None:
        """Attention of one token to a cache that is full, by the bytes that it reads; and that it is written there."""
        if op.kernel == "attention_put":
            ((kind, dims, _),) = ARRAY.findall(op.type)
            return put_seconds(self.chip, _sizes(dims), bytes_of(kind, ""))
        if op.kernel != "attention_forward":
            return self.grouped(op)
        read = sum(program.named[name].size for name in op.operands if name in program.named)
        return read / (self.tpu.decode * self.tpu.derate * self.chip.hbm_gbps * 1e9)

    def grouped(self, op: Operation) -> float | None:
        """XLA's products of rows with the matrix of their group, or of groups of rows with each other."""
        if op.kernel == "ragged-dot-metadata":
            return METADATA
        tiling, operands = TILING.search(op.rest), OPERANDS.search(op.rest)
        if op.kernel != "ragged-dot-none" or tiling is None or operands is None:
            return None
        left, right = [(kind, _sizes(dims)) for kind, dims, _ in ARRAY.findall(operands[1])][-2:]
        ((kind, dims, _),) = ARRAY.findall(op.type)
        out, each = _sizes(dims), bytes_of(kind, "")
        tiles = [int(size) for size in tiling.groups()]
        rows = min(left[1][0], self.rows)
        if len(right[1]) == 3 and len(out) == 2:
            return grouped_seconds(self.tpu, rows, right[1], tiles, each)
        # One of the cores may be left without work where groups are smaller than tiles: there is no model of that.
        if len(right[1]) == 2 and len(out) == 3 and rows >= out[0] * tiles[0]:
            return outer_seconds(self.tpu, rows, out, tiles, each)
        return None


def put_seconds(chip: Chip, slots: tuple[int, ...], each: int) -> float:
    """Of one token of every row into slots (B K S H): the tiles that these lie in are read and written."""
    batch, heads, _, size = slots
    tiles = batch * heads * (32 // each) * -(-size // 128) * 128 * each
    return PUT[0] + batch * PUT[1] + 2 * tiles / chip.hbm_speed


def grouped_seconds(chip: Tpu, rows: int, weights: tuple[int, ...], tiles: list[int], each: int) -> float:
    """Of rows, each with the matrix (inputs x outputs) of its group: the kernel goes over the columns of the outputs,
    in each over the tiles of rows that groups have a part in, and in each over the inputs.

    A tile takes as long as its products, or as the copies of what the next one needs and this one does not.
    """
    groups, inputs, outputs = weights
    tile, deep, wide = tiles
    parts, columns = math.ceil(inputs / deep), math.ceil(outputs / wide)
    deep, wide_bytes = (inputs / parts if parts > 1 else deep), outputs / columns
    products = chip.grouped[0] * 2 * tile * tiles[1] * wide / (chip.tflops * 1e12)
    total, before = 0.0, (-1, -1)
    for group, place in visits(rows, groups, tile):
        moved = 0.0
        if parts > 1 or place != before[1]:
            moved += tile * deep
        if parts > 1 or group != before[0]:
            moved += deep * wide_bytes
        written = tile * wide_bytes if place != before[1] else 0.0
        before = group, place
        copies = [each * (moved + written) / chip.hbm_speed, *[each * moved / chip.hbm_speed] * (parts - 1)]
        total += sum(max(products, one) for one in copies)
    return columns * total


def outer_seconds(chip: Tpu, rows: int, sums: tuple[int, ...], tiles: list[int], each: int) -> float:
    """Of the sums (inputs x outputs) over the rows of each group, tile by tile of a sum and of rows."""
    groups, inputs, outputs = sums
    tile, deep, wide = tiles
    parts, columns = math.ceil(inputs / deep), math.ceil(outputs / wide)
    products = chip.grouped[1] * 2 * tile * deep * wide / (chip.tflops * 1e12)
    deep, wide = inputs / parts, outputs / columns
    total, before = 0.0, (-1, -1)
    for group, place in visits(rows, groups, tile):
        moved = tile * (deep + wide) if place != before[1] else 0.0
        written = deep * wide if group != before[0] else 0.0
        before = group, place
        total += max(products, each * (moved + written) / chip.hbm_speed)
    return parts * columns * total


def visits(rows: int, groups: int, tile: int) -> list[tuple[int, int]]:
    """Which groups have rows in which tiles, in order, where every row is as likely to be of any group."""
    ends = np.cumsum(np.random.default_rng(0).multinomial(rows, np.full(groups, 1 / groups))).tolist()
    return [
        (group, place)
        for group, (start, end) in enumerate(itertools.pairwise([0, *ends]))
        for place in (range(start // tile, -(-end // tile)) if end > start else ())
    ]


def _sizes(dims: str) -> tuple[int, ...]:
    return tuple(int(size) for size in dims.split(","))

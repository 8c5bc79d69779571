"""The blocks of a decoder, layer by layer, as configs tell of them."""

from collections.abc import Callable
from typing import TypedDict

import numpy as np

from ...layers.block import Block
from ...layers.mixers.attention import Attention
from ...layers.mlp import FeedForward
from ...layers.moe.layer import MoE
from ...layers.spec import Spec
from ..decoder import Decoder


class Pattern(TypedDict):
    """The fields of a decoder that list its blocks."""

    first: tuple[Block, ...]
    block: tuple[Block, ...]
    layers: int


class Inexpressible(ValueError):
    """No family, or not the one asked for, has such a decoder."""


def expect[T: Spec](spec: Spec, *kinds: type[T]) -> T:
    """`spec`, which must be of one of these kinds for the family to express it."""
    if not isinstance(spec, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise Inexpressible(f"a {type(spec).__name__} where it has a {names}")
    return spec


def attentions(decoder: Decoder) -> list[Attention]:
    """The mixer of each layer, which must be attention for the family to express it."""
    return [expect(block.mixer, Attention) for block in decoder.all_blocks]


def experts(decoder: Decoder) -> MoE:
    """The feed-forward layer of the blocks that route, which must exist for the family to express the decoder."""
    found = next((block.ffn for block in decoder.all_blocks if block.ffn.routed), decoder.all_blocks[0].ffn)
    return expect(found, MoE)


def with_ffn(decoder: Decoder, ffn: FeedForward) -> Decoder:
    """The decoder with this feed-forward layer in every block."""
    blocks = decoder.all_blocks
    return per_layer(decoder, lambda i, _: blocks[i].replace(ffn=ffn))


def per_layer(decoder: Decoder, change: Callable[[int, Block], Block]) -> Decoder:
    """The decoder whose layers are its first block after `change(layer, block)`."""
    return decoder.replace(**pattern([change(layer, decoder.block[0]) for layer in range(decoder.layers)]))


def layer_types(decoder: Decoder) -> list[str]:
    """The field of this name for a decoder of attention layers."""
    return ["full_attention" if a.window is None else "sliding_attention" for a in attentions(decoder)]


def windowed(decoder: Decoder, kinds: list[str], window: int | None) -> Decoder:
    """The decoder with this window on its "sliding_attention" layers, and none on others."""
    blocks = decoder.all_blocks
    if window is None and "sliding_attention" in kinds:
        raise ValueError("layer_types has sliding_attention, and there is no sliding_window (or it is switched off)")
    width = {"sliding_attention": window, "full_attention": None}
    return per_layer(decoder, lambda i, _: blocks[i].replace(**{"mixer.window": width[kinds[i]]}))


def window_of(decoder: Decoder) -> int | None:
    """The window of the layers that have one."""
    return next((a.window for a in attentions(decoder) if a.window is not None), None)


def pattern(blocks: list[Block]) -> Pattern:
    """`first`, `block` and `layers` of the decoder with these blocks: the shortest pattern that repeats."""
    numbers = {block: number for number, block in enumerate(dict.fromkeys(blocks))}
    ids, count = np.array([numbers[block] for block in blocks]), len(blocks)
    if not count:
        raise ValueError("a decoder has at least one layer, got 0")
    total, first = count, 0
    for period in range(1, count):
        unlike = np.flatnonzero(ids[:-period] != ids[period:])
        start = int(unlike[-1]) + 1 if unlike.size else 0  # from where on every block is that of a period before
        total, first = min((total, first), (start + period, start))
    return {"first": tuple(blocks[:first]), "block": tuple(blocks[first:total]), "layers": count}

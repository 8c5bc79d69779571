"""Pictures of masks: visible pairs, and the kinds of blocks."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from .blocks import EMPTY, FULL, PARTIAL, classify
from .masks import Mask
from .pair_function import Sizes, positions, trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {EMPTY: "#f4f4f2", PARTIAL: "#8fb3d9", FULL: "#1f5fa8"}
NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}


def kinds_of(mask: Mask, queries: int, keys: int, block: int, *, batch: int = 1, heads: int = 1) -> np.ndarray:
    """The kind of every block: (batch or 1, heads or 1, rows, columns) of EMPTY, PARTIAL or FULL."""
    function, sizes = trace(mask.visible), Sizes(batch, heads, queries, keys)
    blocks = classify(function, function.hoisted_values(sizes), sizes, block, block, kv_heads=heads)
    return np.asarray(blocks.kinds(-(-keys // block)))


def plot(mask: Mask, queries: int, keys: int, block: int, *, title: str, batch: int, heads: int, head: int) -> "Figure":
    """A figure of one mask."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.6 * min(2.0, queries / keys)), layout="constrained", dpi=110)
    draw(figure.add_subplot(), mask, queries, keys, block, title=title, batch=batch, heads=heads, head=head)
    return figure


def draw(
    axes: Any,
    mask: Mask,
    queries: int,
    keys: int,
    block: int,
    *,
    title: str,
    batch: int = 1,
    heads: int = 1,
    head: int = 0,
) -> None:
    """Draws blocks by color, and a dot for each visible pair of up to 2^18 pairs, on matplotlib axes."""
    from matplotlib.patches import Patch

    kinds = kinds_of(mask, queries, keys, block, batch=batch, heads=heads)
    kinds = kinds[0, head if kinds.shape[1] > 1 else 0]
    colors = np.array([[int(COLORS[kind][n : n + 2], 16) for n in (1, 3, 5)] for kind in sorted(COLORS)], np.uint8)
    axes.imshow(colors[kinds], extent=(0, kinds.shape[1] * block, kinds.shape[0] * block, 0), interpolation="nearest")
    if queries * keys <= 2**18:
        axes.imshow(
            _dots(mask, queries, keys, batch, heads, head), extent=(0, keys, queries, 0), interpolation="nearest"
        )
    axes.set_xticks(np.arange(0, keys + 1, block), minor=True)
    axes.set_yticks(np.arange(0, queries + 1, block), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set(xlim=(0, keys), ylim=(queries, 0), xlabel="key", ylabel="query")
    axes.set_title(title, loc="left", fontsize=10)
    counts = {kind: int((kinds == kind).sum()) for kind in COLORS}
    handles = [Patch(facecolor=COLORS[k], edgecolor="#cccccc", label=f"{NAMES[k]} {n}") for k, n in counts.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=8)


def _dots(mask: Mask, queries: int, keys: int, batch: int, heads: int, head: int) -> np.ndarray:
    """A transparent picture with a dark dot for every visible pair."""
    grid: dict[str, Any] = positions(Sizes(batch, heads, queries, keys))
    index = (
        0 * grid["batch"][:1, 0],
        0 * grid["head"][:1, 0] + head,
        grid["query"][0, 0][:, None],
        grid["key"][0],
    )
    seen = np.broadcast_to(np.asarray(mask.visible(*(jnp.asarray(x, jnp.int32) for x in index))), (queries, keys))
    return np.where(seen[..., None], np.array([16, 42, 76, 70], np.uint8), np.zeros(4, np.uint8))

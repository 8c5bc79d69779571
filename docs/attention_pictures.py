"""The pictures of attention.md, made by the code that they describe: `make docs-attention`."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flaxzoo.layers.kernels.attention.masks import (
    BlockSparse,
    Causal,
    Chunked,
    Documents,
    GlobalTokens,
    Mask,
    Prefix,
    Where,
    Window,
)
from flaxzoo.layers.kernels.attention.plot import draw
from matplotlib.figure import Figure

LENGTH, BLOCK = 512, 32
RANDOM = np.random.default_rng(0)
MASKS: dict[str, Mask] = {
    "Causal()": Causal(),
    "Causal() & Window(96)": Causal() & Window(96),
    "Window(64, 64)": Window(64, 64),
    "Causal() & Chunked(128)": Causal() & Chunked(128),
    "Causal() | Prefix(128)": Causal() | Prefix(128),
    "Causal() & Documents(ids)": Causal()
    & Documents(jnp.asarray(np.repeat([[1, 2, 3, 4]], [150, 90, 200, 72], axis=1), jnp.int32)),
    "Causal() & (GlobalTokens(16) | Window(64))": Causal() & (GlobalTokens(16) | Window(64)),
    "Causal() & BlockSparse(table, 64)": Causal() & BlockSparse(jnp.asarray(RANDOM.random((1, 1, 8, 8)) < 0.4), 64),
    "Causal() & Where(dilated)": Causal() & Where(lambda batch, head, query, key: (query - key) % 64 < 8),
}


def main() -> None:
    """Draws all masks on one page."""
    figure = Figure(figsize=(11.4, 12.6), layout="constrained", dpi=80)
    for axes, (name, mask) in zip(figure.subplots(3, 3).flat, MASKS.items(), strict=True):
        draw(axes, mask, LENGTH, LENGTH, BLOCK, title=name)
    figure.savefig(Path(__file__).with_name("masks.png"))


if __name__ == "__main__":
    main()

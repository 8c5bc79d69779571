"""Tiny decoders that between them use all there is."""

import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.block import Block
from flaxzoo.zoo import MLP, Attention, Decoder, GatedMLP, LayerNorm, RMSNorm
from flaxzoo.zoo.decoder import DecoderModel
from flaxzoo.zoo.parameters import describe, merge

ATTENTION = Attention(heads=4, kv_heads=2, head_dim=8)
PLAIN = Block(mixer=ATTENTION, ffn=GatedMLP(hidden=32))
LOCAL = Block(
    mixer=ATTENTION.replace(window=5, soft_cap=3.0, sinks=True, qk_norm=RMSNorm()),
    ffn=GatedMLP(hidden=32, activation="gelu_tanh"),
    norm=RMSNorm(zero_centered=True),
    placement="sandwich",
)
LEARNED = Block(
    mixer=ATTENTION.replace(kv_heads=4, rope=None, bias=True, output_bias=True), ffn=MLP(hidden=32), norm=LayerNorm()
)

DECODERS = {
    "plain": Decoder(vocab=48, dim=32, layers=2, block=(PLAIN,), tied=False),
    "mixed": Decoder(
        vocab=48, dim=32, layers=6, first=(PLAIN,), block=(LOCAL, PLAIN), soft_cap=4.0, scale_embedding=True
    ),
    "pattern": Decoder(vocab=48, dim=32, layers=4, block=(LOCAL, PLAIN), soft_cap=4.0),
    "unrolled": Decoder(vocab=48, dim=32, layers=2, first=(PLAIN,), block=(LOCAL, PLAIN)),
    "learned": Decoder(vocab=48, dim=32, layers=2, block=(LEARNED,), norm=LayerNorm(), max_positions=64),
}
"""`mixed`: 1 first block, the pattern of 2 twice, 1 block of the incomplete last repeat."""


def fresh(decoder: Decoder) -> DecoderModel:
    """The model with every parameter drawn at random, the vectors too."""
    random = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(random.normal(0, 0.25, known.shape) + name.endswith("scale"), jnp.float32)
        for name, known in describe(decoder.abstract()).items()
    }
    return merge(decoder.abstract(), parameters)


@pytest.fixture(scope="session")
def decoders() -> dict[str, Decoder]:
    return DECODERS


@pytest.fixture(scope="session")
def models() -> dict[str, DecoderModel]:
    return {name: fresh(decoder) for name, decoder in DECODERS.items()}

"""Tiny decoders that between them use all there is."""

import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.block import Block
from flaxzoo.zoo import MLA, MLP, Attention, Decoder, GatedMLP, Groups, LayerNorm, MoE, RMSNorm, Router
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
LATENT = Block(
    mixer=MLA(heads=4, kv_rank=12, nope_dim=8, rope_dim=4, value_dim=8, query_rank=16),
    ffn=MoE(
        experts=8,
        expert=GatedMLP(hidden=16),
        router=Router(
            top_k=3, score="sigmoid", correction=True, groups=Groups(groups=4, chosen=2, group_score="best_two")
        ),
        shared=GatedMLP(hidden=16),
    ),
)
ROUTED = PLAIN.replace(ffn=MoE(experts=4, expert=GatedMLP(hidden=16, bias=True), router=Router(top_k=2, bias=True)))

DECODERS = {
    "plain": Decoder(vocab=48, dim=32, layers=2, block=(PLAIN,), tied=False),
    "mixed": Decoder(
        vocab=48, dim=32, layers=6, first=(PLAIN,), block=(LOCAL, PLAIN), soft_cap=4.0, scale_embedding=True
    ),
    "pattern": Decoder(vocab=48, dim=32, layers=4, block=(LOCAL, PLAIN), soft_cap=4.0),
    "unrolled": Decoder(vocab=48, dim=32, layers=2, first=(PLAIN,), block=(LOCAL, PLAIN)),
    "routed": Decoder(
        vocab=48, dim=32, layers=4, first=(LATENT.replace(ffn=GatedMLP(hidden=32)),), block=(LATENT, ROUTED)
    ),
    "learned": Decoder(vocab=48, dim=32, layers=2, block=(LEARNED,), norm=LayerNorm(), max_positions=64),
}
"""`mixed`: 1 first block, the pattern of 2 twice, 1 block of the incomplete last repeat; `routed`: 1, 2 and 1."""


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

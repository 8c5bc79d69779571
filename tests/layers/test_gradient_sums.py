"""Gradients computed in bfloat16 against float32, over thousands of rows, for every kind of layer."""

import dataclasses
import inspect
from typing import Any

import flaxzoo.zoo  # registers every spec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo.layers.block import Block
from flaxzoo.layers.loss import cross_entropy
from flaxzoo.layers.mixers.attention import Attention
from flaxzoo.layers.mixers.latent import MLA
from flaxzoo.layers.mixers.mixer import Mixer, Positions
from flaxzoo.layers.mlp import MLP, FeedForward, GatedMLP
from flaxzoo.layers.moe.layer import MoE
from flaxzoo.layers.moe.routing import Router
from flaxzoo.layers.norm import LayerNorm, Norm, RMSNorm
from flaxzoo.layers.spec import Spec
from flaxzoo.zoo.decoder import Decoder
from flaxzoo.zoo.parameters import Parameters, describe, merge, split

pytestmark = pytest.mark.usefixtures("quick_compiler")

B, T, D, V = 256, 32, 16, 50
MOE = MoE(experts=4, expert=MLP(hidden=16), router=Router(top_k=2, bias=True), shared=GatedMLP(hidden=16, bias=True))
ATTENTION = Attention(heads=4, kv_heads=2, head_dim=8, bias=True, output_bias=True, qk_norm=RMSNorm(), sinks=True)
BLOCK = Block(mixer=ATTENTION, ffn=MLP(hidden=16), norm=LayerNorm())
EXAMPLES: dict[str, Spec] = {
    "RMSNorm": RMSNorm(),
    "LayerNorm": LayerNorm(),
    "MLP": MLP(hidden=16),
    "GatedMLP": GatedMLP(hidden=16, bias=True),
    "MoE": MOE,
    "Attention": ATTENTION,
    "MLA": MLA(heads=4, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4, query_rank=8, bias=True),
    "Block": BLOCK.replace(placement="sandwich"),
    "Decoder": Decoder(vocab=V, dim=D, layers=1, block=(BLOCK,), tied=False, max_positions=T),
}
"""A layer of each kind, with every parameter it can have; one that a router corrects has no gradient."""


def is_layer(kind: type[Spec]) -> bool:
    """Whether a kind of spec is the package's own and builds a layer."""
    ours = kind.__module__.startswith(flaxzoo.zoo.__name__.partition(".")[0])
    return ours and not inspect.isabstract(kind) and hasattr(kind, "build")


def build(spec: Any) -> nnx.Module:
    if isinstance(spec, Norm):
        return spec.build("D", D)
    return spec.build(rngs=nnx.Rngs(0)) if isinstance(spec, Decoder) else spec.build(D, rngs=nnx.Rngs(0))


def test_every_kind_of_layer_has_an_example() -> None:
    assert {name for name, kind in Spec._kinds.items() if is_layer(kind)} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_every_parameter(name: str) -> None:
    example: Any = EXAMPLES[name]
    parameters = set(describe(jax.eval_shape(lambda: build(example))))
    for field in dataclasses.fields(example):
        if isinstance(value := getattr(example, field.name), bool):
            changed = example.replace(**{field.name: not value})
            assert set(describe(jax.eval_shape(lambda spec=changed: build(spec)))) <= parameters, field.name


def gradients(spec: Any, dtype: Any) -> Parameters:
    """Gradients of a weighted sum of outputs, or of the mean loss of a model; nine of ten tokens are the same."""
    model, source = build(spec), np.random.default_rng(0)
    tokens = np.where(source.random((B, T)) < 0.9, 7, source.integers(0, V, (B, T)))
    x = source.normal(size=(V, D))[tokens] + 0.1 * source.normal(size=(B, T, D))
    x = jnp.asarray(x, jnp.bfloat16).astype(dtype)
    weights = jnp.asarray(1 + source.normal(size=(B, T, D)), jnp.bfloat16).astype(jnp.float32)
    targets = jnp.asarray(np.roll(tokens, -1, axis=1), jnp.int32)
    positions = Positions(
        index=jnp.zeros((B, T), jnp.int32) + jnp.arange(T, dtype=jnp.int32), segments=jnp.ones((B, T), jnp.int32)
    )
    # The same numbers in both dtypes.
    params = {
        name: value if known.inputs else value + 0.3 * source.normal(size=value.shape).astype(np.float32)
        for (name, value), known in zip(split(model).items(), describe(model).values(), strict=True)
    }
    params = jax.tree.map(lambda value: value.astype(jnp.bfloat16).astype(jnp.float32), params)

    def loss(params: Parameters) -> jax.Array:
        layer = merge(model, params)
        if isinstance(spec, Decoder):
            hidden = layer.hidden(jnp.asarray(tokens, jnp.int32), positions, dtype=dtype)[0]
            total, _ = cross_entropy(hidden, layer.output_embedding, targets, jnp.ones((B, T)))
            return total / (0.9 * B * T)
        with_positions = isinstance(spec, Mixer | Block) or (isinstance(spec, FeedForward) and spec.routed)
        y = layer(x, positions)[0] if with_positions else layer(x)
        return jnp.sum(y.astype(jnp.float32) * weights)

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_are_summed_in_float32(name: str) -> None:
    in_bfloat16, in_float32 = (gradients(EXAMPLES[name], dtype) for dtype in (jnp.bfloat16, jnp.float32))
    for parameter, expected in in_float32.items():
        error = np.abs(np.asarray(in_bfloat16[parameter]) - np.asarray(expected))
        largest = np.abs(expected).argmax()
        assert np.linalg.norm(error) < 0.025 * np.linalg.norm(expected), parameter
        assert error.flat[largest] < 0.025 * np.abs(expected).max(), parameter

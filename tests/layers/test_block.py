"""Where a block's norms stand, against the formulas; and attention's own rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo.layers.block import Block, Placement
from flaxzoo.layers.kernels.attention import attend
from flaxzoo.layers.kernels.attention.masks import Causal, Documents, Window
from flaxzoo.layers.kernels.attention.scores import SoftCap
from flaxzoo.layers.mixers.attention import Attention
from flaxzoo.layers.mixers.mixer import Positions
from flaxzoo.layers.mlp import GatedMLP
from flaxzoo.layers.norm import RMSNorm
from flaxzoo.layers.positions.rope import Rope

DIM = 16
ATTENTION = Attention(heads=4, kv_heads=2, head_dim=8)
BLOCK = Block(mixer=ATTENTION, ffn=GatedMLP(hidden=24), norm=RMSNorm())
X = jax.random.normal(jax.random.key(0), (2, 6, DIM)) * 3
POSITIONS = Positions(
    index=jnp.asarray([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]], jnp.int32),
    segments=jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 0]], jnp.int32),
)
NORMS = {
    "pre": {"mixer_norm", "ffn_norm"},
    "post": {"mixer_output_norm", "ffn_output_norm"},
    "output": {"mixer_output_norm", "ffn_output_norm"},
    "sandwich": {"mixer_norm", "mixer_output_norm", "ffn_norm", "ffn_output_norm"},
    "parallel": {"mixer_norm"},
}


def build(spec):
    """The layer, with every vector drawn at random."""
    layer = spec.build(DIM, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) + 1 if x.ndim == 1 else x, layer)


def formula(block, placement, x) -> jax.Array:
    def mixer(x):
        return block.mixer(x, POSITIONS)[0]

    match placement:
        case "pre":
            x = x + mixer(block.mixer_norm(x))
            return x + block.ffn(block.ffn_norm(x))
        case "post":
            x = block.mixer_output_norm(x + mixer(x))
            return block.ffn_output_norm(x + block.ffn(x))
        case "output":
            x = x + block.mixer_output_norm(mixer(x))
            return x + block.ffn_output_norm(block.ffn(x))
        case "sandwich":
            x = x + block.mixer_output_norm(mixer(block.mixer_norm(x)))
            return x + block.ffn_output_norm(block.ffn(block.ffn_norm(x)))
        case "parallel":
            normal = block.mixer_norm(x)
            return x + mixer(normal) + block.ffn(normal)
        case _:
            raise AssertionError(placement)


def test_every_placement_is_tested():
    assert set(NORMS) == set(Placement.__args__)


@pytest.mark.parametrize("placement", NORMS)
def test_placement(placement):
    block = build(BLOCK.replace(placement=placement))
    np.testing.assert_allclose(block(X, POSITIONS)[0], formula(block, placement, X), rtol=1e-5, atol=1e-5)
    assert {name for name in NORMS["sandwich"] if getattr(block, name) is not None} == NORMS[placement]


VARIANTS = {
    "plain": {},
    "no rope": {"rope": None},
    "biases": {"bias": True, "output_bias": True},
    "qk norm": {"qk_norm": RMSNorm(eps=0.1)},
    "window": {"window": 2},
    "soft cap": {"soft_cap": 0.5},
    "sinks": {"sinks": True},
    "scale": {"scale": 1.3},
    "multi-query": {"kv_heads": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_layer(name):
    spec = ATTENTION.replace(**VARIANTS[name])
    layer = build(spec)

    def project(linear, x):
        y = jnp.einsum("BTD,DNH->BTNH", x, linear.weight[...])
        return y if linear.bias is None else y + linear.bias[...]

    q, k, v = (project(linear, X) for linear in (layer.query, layer.key, layer.value))
    if spec.qk_norm is not None:
        q, k = (x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 0.1) for x in (q, k))
        q, k = q * layer.query_norm.scale[...], k * layer.key_norm.scale[...]
    if spec.rope is not None:
        q, k = (Rope()(x, POSITIONS) for x in (q, k))
    mask = Causal() & Documents(POSITIONS.segments)
    mask = mask & Window(spec.window) if spec.window else mask
    sinks = layer.sinks[...] if spec.sinks else None
    score = SoftCap(spec.soft_cap) if spec.soft_cap else None
    mixed = attend(q, k, v, mask=mask, score=score, sinks=sinks, scale=spec.scale)
    wanted = jnp.einsum("BTNH,NHD->BTD", mixed, layer.output.weight[...])
    wanted = wanted if layer.output.bias is None else wanted + layer.output.bias[...]
    np.testing.assert_allclose(layer(X, POSITIONS)[0], wanted, rtol=1e-5, atol=1e-5)


def test_changing_a_later_token_changes_no_earlier_one():
    layer = build(ATTENTION)
    changed = X.at[:, 4].add(1.0)
    before, after = (np.asarray(layer(x, POSITIONS)[0]) for x in (X, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[0, 4:] - after[0, 4:]).min() > 0


@pytest.mark.parametrize("spec", [ATTENTION, ATTENTION.replace(window=4), ATTENTION.replace(kv_heads=4)], ids=str)
def test_flops_count_projections_and_visible_keys(spec):
    layer = spec.build(DIM, rngs=nnx.Rngs(0))
    weights = sum(x.size for x in jax.tree.leaves(layer))
    length = 9
    seen = sum(min(query + 1, spec.window or length) for query in range(length)) / length
    assert spec.flops(DIM, length) == pytest.approx(2 * weights + 4 * seen * spec.heads * spec.head_dim)


def test_query_heads_are_a_multiple():
    with pytest.raises(ValueError, match=r"must be a multiple of key/value heads, got heads=3, kv_heads=2"):
        Attention(heads=3, kv_heads=2, head_dim=8)


@pytest.mark.parametrize("name", ["heads", "kv_heads", "head_dim", "window"])
def test_counts_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ATTENTION.replace(**{name: 0})

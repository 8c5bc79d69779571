"""Multi-head latent attention: against its formulas, both forms, the cache, and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo.layers.mixers.latent import MLA
from flaxzoo.layers.mixers.mixer import Positions
from flaxzoo.layers.positions.rope import Rope
from flaxzoo.layers.positions.scaling import YarnScaling, yarn_mscale
from flaxzoo.layers.sharding.axes import batch_partition
from flaxzoo.zoo.parameters import describe, merge, shardings, split

pytestmark = pytest.mark.usefixtures("quick_compiler")
DIM, B, T = 24, 4, 11
V2 = MLA(heads=4, kv_rank=12, nope_dim=8, rope_dim=6, value_dim=10)
YARN = YarnScaling(factor=4.0, original_length=8, mscale=0.7, mscale_all_dim=0.7)
V3 = V2.replace(query_rank=9, bias=True, rope=Rope(interleaved=True, scaling=YARN))
LAYERS = {"v2 lite": V2, "v3": V3, "half rope": V2.replace(rope=Rope(), scale=0.3)}
X = jax.random.normal(jax.random.key(0), (B, T, DIM))
POSITIONS = Positions(
    index=jnp.zeros((B, T), jnp.int32) + jnp.arange(T, dtype=jnp.int32), segments=jnp.ones((B, T), jnp.int32)
)


def build(spec):
    """The layer, with every vector drawn at random."""
    layer = spec.build(DIM, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    drawn = {
        name: value if known.inputs else jnp.asarray(random.normal(1, 0.3, value.shape), jnp.float32)
        for (name, value), known in zip(split(layer).items(), describe(layer).values(), strict=True)
    }
    return merge(layer, drawn)


def formula(spec, layer, x):
    """The equations of the paper (2405.04434, appendix C) in float64, one head after another."""
    weights = {name: np.asarray(value, np.float64) for name, value in split(layer).items()}

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm.eps) * scale

    def turned(x):
        return np.asarray(spec.rope(jnp.asarray(x, jnp.float32)[:, :, None], POSITIONS))[:, :, 0]

    x = np.asarray(x, np.float64)
    latent = x @ weights["latent.weight"] + weights.get("latent.bias", 0.0)
    content, shared_key = norm(latent[..., : spec.kv_rank], weights["latent_norm.scale"]), latent[..., spec.kv_rank :]
    queries = x
    if spec.query_rank:
        queries = norm(x @ weights["query_down.weight"] + weights["query_down.bias"], weights["query_norm.scale"])
    out = 0.0
    for head in range(spec.heads):
        query = queries @ weights["query.weight"][:, head]
        key_value = content @ weights["key_value.weight"][:, head]
        key, value = key_value[..., : spec.nope_dim], key_value[..., spec.nope_dim :]
        logits = np.einsum("bth,bsh->bts", query[..., : spec.nope_dim], key)
        logits += np.einsum("bth,bsh->bts", turned(query[..., spec.nope_dim :]), turned(shared_key))
        logits = np.where(np.tril(np.ones((T, T))), logits * spec.logit_scale, -np.inf)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        out = out + np.einsum("bts,bsh->bth", shares, value) @ weights["output.weight"][head]
    return out + weights.get("output.bias", 0.0)


@pytest.mark.parametrize("name", LAYERS)
def test_output_is_that_of_the_formulas(name):
    spec, layer = LAYERS[name], build(LAYERS[name])
    np.testing.assert_allclose(layer(X, POSITIONS)[0], formula(spec, layer, X), rtol=1e-5, atol=1e-5)


def test_the_scale_of_the_logits():
    assert pytest.approx(14**-0.5) == V2.logit_scale
    assert pytest.approx(yarn_mscale(4.0, 0.7) ** 2 * 14**-0.5) == V3.logit_scale
    assert V3.replace(scale=0.3).logit_scale == 0.3
    plain = YARN.replace(mscale=None, mscale_all_dim=None)
    assert pytest.approx(14**-0.5) == V3.replace(**{"rope.scaling": plain}).logit_scale


@pytest.mark.parametrize("name", LAYERS)
def test_absorbed_is_expanded(name, monkeypatch):
    """Forward and gradient, over a cache that is longer than what was written."""
    spec, layer = LAYERS[name], build(LAYERS[name])
    g = jax.random.normal(jax.random.key(1), X.shape)

    def run(absorbs):
        monkeypatch.setattr(MLA, "absorbs", lambda *_: absorbs)

        def mixed(parameters, x):
            return merge(layer, parameters)(x, POSITIONS, spec.cache(B, T + 3, jnp.float32))[0]

        y, pull = jax.vjp(mixed, split(layer), X)
        return y, pull(g)

    expanded, absorbed = jax.jit(lambda: run(False))(), jax.jit(lambda: run(True))()
    np.testing.assert_allclose(expanded[0], layer(X, POSITIONS)[0], rtol=1e-5, atol=1e-5)
    for (path, one), other in zip(jax.tree.leaves_with_path(expanded), jax.tree.leaves(absorbed), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max(), err_msg=str(path))


def test_one_token_is_absorbed_and_a_long_prompt_expanded():
    deepseek = MLA(heads=128, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert deepseek.absorbs(1, 4096)
    assert deepseek.absorbs(4, 4096)
    assert not deepseek.absorbs(4096, 4096)


@pytest.mark.parametrize("name", LAYERS)
def test_token_by_token_is_all_at_once(name):
    """A prompt of 5 and then one after another, with a cache of rank + rope dims a token."""
    spec, layer = LAYERS[name], build(LAYERS[name])
    cache = spec.cache(B, T, jnp.float32)
    assert sum(x.size for x in jax.tree.leaves(cache)) == B * T * (spec.kv_rank + spec.rope_dim)
    step = jax.jit(lambda x, positions, cache: layer(x, positions, cache))
    found = []
    for first, last in [(0, 5), *((t, t + 1) for t in range(5, T))]:
        y, cache = step(X[:, first:last], jax.tree.map(lambda x, a=first, b=last: x[:, a:b], POSITIONS), cache)
        found.append(y)
    np.testing.assert_allclose(np.concatenate(found, axis=1), layer(X, POSITIONS)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("absorbs", [False, True])
def test_a_mesh_changes_nothing(absorbs, monkeypatch):
    monkeypatch.setattr(MLA, "absorbs", lambda *_: absorbs)
    layer = build(V3)
    g = jax.random.normal(jax.random.key(1), X.shape)

    def run(parameters, x, positions, g):
        def loss(parameters, x):
            y, _ = merge(layer, parameters)(x, positions, V3.cache(B, T + 3, jnp.float32))
            return jnp.sum(y * g), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)

    wanted = jax.jit(run)(split(layer), X, POSITIONS, g)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        placement = shardings(describe(layer), mesh)
        parameters = {n: jax.device_put(np.asarray(x), placement[n]) for n, x in split(layer).items()}
        batch = jax.sharding.NamedSharding(mesh, batch_partition(mesh))
        found = jax.jit(run)(
            parameters, *jax.tree.map(lambda x: jax.device_put(np.asarray(x), batch), (X, POSITIONS, g))
        )
    for (path, one), other in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max() + 1e-6, err_msg=str(path))


def test_documents_are_apart():
    layer = build(V2)
    segments = jnp.zeros((B, T), jnp.int32) + jnp.asarray([1] * 6 + [2] * 5, jnp.int32)
    positions = jnp.zeros((B, T), jnp.int32) + jnp.asarray([*range(6), *range(5)], jnp.int32)
    packed, _ = layer(X, Positions(index=positions, segments=segments))
    alone, _ = layer(X[:, 6:], Positions(index=positions[:, 6:], segments=segments[:, 6:]))
    np.testing.assert_allclose(packed[:, 6:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_rank", [None, 9])
def test_flops_count_two_for_each_product(query_rank):
    spec = V2.replace(query_rank=query_rank)
    layer = spec.build(DIM, rngs=nnx.Rngs(0))
    matrices = 2 * sum(x.size for x in jax.tree.leaves(layer) if x.ndim > 1)
    attention = 2 * (8 + 6 + 10) * 4 * (T + 1) / 2
    assert spec.flops(DIM, T) == pytest.approx(matrices + attention)


def test_padding_is_not_remembered():
    """A prompt padded on the right, in a cache that the padding would not fit into, and then the rest."""
    layer, cache = build(V2), V2.cache(B, T, jnp.float32)
    padded = jnp.pad(X[:, 5:T], ((0, 0), (0, 4), (0, 0)), constant_values=9.0)
    positions = Positions(
        index=jnp.zeros((B, 10), jnp.int32) + jnp.arange(5, 15, dtype=jnp.int32),
        segments=jnp.zeros((B, 10), jnp.int32) + jnp.asarray([1] * 6 + [0] * 4, jnp.int32),
    )
    first = jax.tree.map(lambda x: x[:, :5], POSITIONS)
    _, cache = layer(X[:, :5], first, cache)
    found, cache = layer(padded, positions, cache)
    np.testing.assert_allclose(found[:, :6], layer(X, POSITIONS)[0][:, 5:], rtol=1e-5, atol=1e-5)
    _, whole = layer(X, POSITIONS, V2.cache(B, T, jnp.float32))
    np.testing.assert_allclose(cache.latent, whole.latent, rtol=1e-5, atol=1e-5)


def test_no_quantized_cache():
    with pytest.raises(NotImplementedError, match="is not quantized, got int8"):
        V2.cache(B, T, jnp.int8)


def test_nothing_of_size_zero():
    with pytest.raises(ValueError, match="kv_rank must be at least 1, got 0"):
        V2.replace(kv_rank=0)

"""Mixtures of experts against a plain loop over experts, routing against its formulas, meshes against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo.layers.mixers.mixer import Positions
from flaxzoo.layers.mlp import MLP, GatedMLP
from flaxzoo.layers.moe.exchange import Exchange
from flaxzoo.layers.moe.layer import MoE
from flaxzoo.layers.moe.routing import Groups, Router
from flaxzoo.layers.sharding.axes import batch_partition, stream_partition
from flaxzoo.zoo.parameters import describe, merge, shardings, split

pytestmark = pytest.mark.usefixtures("quick_compiler")
DIM, EXPERTS, B, T = 12, 8, 8, 10
X = jax.random.normal(jax.random.key(0), (B, T, DIM))
POSITIONS = Positions(
    index=jnp.zeros((B, T), jnp.int32) + jnp.arange(T, dtype=jnp.int32), segments=jnp.ones((B, T), jnp.int32)
)
EXPERT = GatedMLP(hidden=16)
GPT_OSS = GatedMLP(hidden=16, activation="quick_gelu", bias=True, limit=1.0, offset=1.0)
BEST_TWO = Groups(groups=4, chosen=2, group_score="best_two")
LAYERS = {
    "mixtral": MoE(experts=EXPERTS, expert=EXPERT, router=Router(top_k=2)),
    "deepseek_v2": MoE(
        experts=EXPERTS,
        expert=EXPERT,
        router=Router(top_k=3, normalise=False, scale=1.5, groups=Groups(groups=4, chosen=2, group_score="best")),
        shared=GatedMLP(hidden=32),
    ),
    "deepseek_v3": MoE(
        experts=EXPERTS,
        expert=EXPERT,
        router=Router(top_k=3, score="sigmoid", correction=True, scale=2.5, groups=BEST_TWO),
        shared=EXPERT,
    ),
    "gpt_oss": MoE(experts=EXPERTS, expert=GPT_OSS, router=Router(top_k=2, bias=True)),
    "plain experts": MoE(experts=EXPERTS, expert=MLP(hidden=16), router=Router(top_k=1, normalise=False)),
    "all chosen": MoE(experts=4, expert=EXPERT, router=Router(top_k=4, score="sigmoid")),
}


def build(spec, dim=DIM):
    """The layer, with every vector drawn at random."""
    layer = spec.build(dim, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    drawn = {
        name: value if known.inputs else jnp.asarray(random.normal(size=value.shape), jnp.float32)
        for (name, value), known in zip(split(layer).items(), describe(layer).values(), strict=True)
    }
    return merge(layer, drawn)


def routed(spec, layer, x):
    """Chosen experts and their weights, one token after another, in NumPy."""
    router = spec.router
    parameters = {name: np.asarray(value, np.float64) for name, value in split(layer.router).items()}
    logits = np.asarray(x, np.float64) @ parameters["weight"] + parameters.get("bias", 0.0)
    chosen, weights = [], []
    for row in logits.reshape(-1, spec.experts):
        scores = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        if router.score == "sigmoid":
            scores = 1 / (1 + np.exp(-row))
        worth = scores + parameters.get("correction", 0.0)
        if router.groups is not None:
            grouped = np.split(worth, router.groups.groups)
            count = {"best": 1, "best_two": 2}[router.groups.group_score]
            best = np.argsort([-np.sort(group)[-count:].sum() for group in grouped])[: router.groups.chosen]
            closed = ~np.isin(np.arange(router.groups.groups), best)
            worth = np.where(np.repeat(closed, len(grouped[0])), -np.inf, worth)
        picked = np.argsort(-worth)[: router.top_k]
        weight = scores[picked] / scores[picked].sum() if router.normalise else scores[picked]
        chosen.append(picked)
        weights.append(weight * router.scale)
    return np.array(chosen), np.array(weights)


def loop(spec, parameters, x, chosen, weights):
    """Every expert over every token, the unchosen ones counting nothing."""

    def expert(index):
        one = {name.removeprefix("experts."): value[index] for name, value in parameters.items() if "experts." in name}
        return merge(jax.eval_shape(lambda: spec.expert.build(DIM, rngs=nnx.Rngs(0))), one)(x)

    y = jnp.zeros_like(x)
    for index in range(spec.experts):
        share = jnp.sum(jnp.where(chosen == index, weights, 0.0), axis=-1)
        y = y + share[..., None] * expert(index)
    return y


@pytest.mark.parametrize("name", LAYERS)
def test_routing_is_that_of_the_formulas(name):
    spec, layer = LAYERS[name], build(LAYERS[name])
    chosen, weights, _ = layer.router(X, jnp.ones((B, T)))
    wanted, shares = routed(spec, layer, X)
    order, other = np.argsort(chosen.reshape(wanted.shape), axis=1), np.argsort(wanted, axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(chosen).reshape(wanted.shape), order, 1), np.take_along_axis(wanted, other, 1)
    )
    found = np.take_along_axis(np.asarray(weights).reshape(wanted.shape), order, 1)
    np.testing.assert_allclose(found, np.take_along_axis(shares, other, 1), rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_a_loop_over_experts(name):
    spec, layer = LAYERS[name], build(LAYERS[name])
    parameters = split(layer)

    def ours(parameters, x):
        return merge(layer, parameters)(x, POSITIONS)[0]

    def plain(parameters, x):
        made = merge(layer, parameters)
        chosen, weights, _ = made.router(x, jnp.ones((B, T)))
        y = loop(spec, parameters, x, chosen, weights)
        return y if made.shared is None else y + made.shared(x)

    g = jax.random.normal(jax.random.key(1), X.shape)
    found, wanted = (
        jax.jit(lambda parameters, x, f=f: (lambda y, pull: (y, pull(g)))(*jax.vjp(f, parameters, x)))(parameters, X)
        for f in (ours, plain)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    for path, gradient in jax.tree.leaves_with_path(wanted[1]):
        scale = np.abs(gradient).max()
        assert scale > 0 or "correction" in str(path), path
        other = dict(jax.tree.leaves_with_path(found[1]))[path]
        np.testing.assert_allclose(other, gradient, rtol=0, atol=1e-5 * scale + 1e-6, err_msg=str(path))


def test_no_token_is_dropped_when_all_go_to_one_expert():
    spec = LAYERS["mixtral"].replace(**{"router.top_k": 1, "router.bias": True})
    layer = build(spec)
    layer.router.bias[...] = jnp.where(jnp.arange(EXPERTS) == 5, 1e3, 0.0)
    y, done = layer(X, POSITIONS)
    np.testing.assert_array_equal(done["load"], np.where(np.arange(EXPERTS) == 5, B * T, 0))
    one = {name.removeprefix("experts."): v[5] for name, v in split(layer).items() if name.startswith("experts.")}
    np.testing.assert_allclose(y, merge(EXPERT.build(DIM, rngs=nnx.Rngs(0)), one)(X), rtol=1e-5, atol=1e-5)


def test_what_a_router_did_leaves_padding_out():
    spec = LAYERS["deepseek_v3"]
    layer = build(spec)
    segments = POSITIONS.segments.at[:, 6:].set(0)
    done = layer(X, Positions(index=POSITIONS.index, segments=segments))[1]
    alone = layer(X[:, :6], Positions(index=POSITIONS.index[:, :6], segments=segments[:, :6]))[1]
    chosen, _ = routed(spec, layer, X[:, :6])
    np.testing.assert_array_equal(done["load"], np.bincount(chosen.ravel(), minlength=EXPERTS))
    for name, value in done.items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-5, err_msg=name)
    logits = np.asarray(layer.router.logits(X[:, :6]), np.float64)
    scores = 1 / (1 + np.exp(-logits))
    shares = (scores / scores.sum(-1, keepdims=True)).sum((0, 1))
    np.testing.assert_allclose(done["probability"], shares, rtol=1e-5)
    np.testing.assert_allclose(done["z"], (np.log(np.exp(logits).sum(-1)) ** 2).sum(), rtol=1e-5)


def test_the_router_computes_in_float32():
    layer = build(LAYERS["mixtral"])
    x = X.astype(jnp.bfloat16)
    assert layer.router.logits(x).dtype == jnp.float32
    np.testing.assert_array_equal(layer.router.logits(x), layer.router.logits(x.astype(jnp.float32)))
    y, _ = layer(x, POSITIONS)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(layer(x.astype(jnp.float32), POSITIONS)[0])
    assert np.abs(np.asarray(y, np.float32) - wide).max() < 0.03 * np.abs(wide).max()


MESHES = [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "expert": 4}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_a_mesh_changes_nothing(name, sizes):
    layer = build(LAYERS[name])
    parameters = split(layer)
    g = jax.random.normal(jax.random.key(1), X.shape)

    def run(parameters, x, positions, g):
        def loss(parameters, x):
            y, done = merge(layer, parameters)(x, positions)
            return jnp.sum(y * g) + done["z"], (y, done)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)

    wanted = jax.jit(run)(parameters, X, POSITIONS, g)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    with jax.set_mesh(mesh):
        placement = shardings(describe(layer), mesh)
        split_parameters = {n: jax.device_put(np.asarray(x), placement[n]) for n, x in parameters.items()}
        batch, stream = batch_partition(mesh), stream_partition(mesh, X.shape[1])
        at = jax.tree.map(lambda x: jax.device_put(np.asarray(x), batch), POSITIONS)
        x, gradient = (jax.device_put(np.asarray(x), stream) for x in (X, g))
        found = jax.jit(run)(split_parameters, x, at, gradient)
        for n, one in found[1][0].items():
            assert one.sharding == split_parameters[n].sharding, n
    for (path, one), other in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        scale = np.abs(one).max()
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * scale + 1e-6, err_msg=str(path))


def ragged_all_to_all(rows, output, starts, sends, offsets, receives, *, axis_name):
    """What XLA has no code for on CPU: every device is given everything, and takes what is its own."""
    everyone = [jax.lax.all_gather(x, axis_name) for x in (rows, starts, sends, offsets)]
    slices, me = len(sends) // len(everyone[0]), jax.lax.axis_index(axis_name)
    line, received = jnp.arange(len(output), dtype=jnp.int32), jnp.zeros_like(receives)
    for device in range(len(everyone[0])):
        for index in range(slices):
            operand, start, size, place = (x[device] for x in everyone)
            start, size, place = (x[me * slices + index] for x in (start, size, place))
            inside = (line >= place) & (line < place + size)
            picked = operand.at[jnp.where(inside, start + line - place, 0)].get()
            output = jnp.where(inside[:, None], picked, output)
            received = received.at[device * slices + index].set(size)
    return jnp.where(jnp.all(received == receives), output, jnp.nan)


@pytest.mark.parametrize("name", ["gpt_oss"])
def test_rows_that_are_sent_to_experts_give_what_gathered_ones_do(name, monkeypatch):
    """The way of TPUs and GPUs, with the one operation that CPUs lack in plain JAX."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(Exchange, "_gathered", Exchange._sent)
    test_a_mesh_changes_nothing(name, {"data": 2, "expert": 2, "tensor": 2})


def test_flops_and_unused_parameters():
    spec = LAYERS["deepseek_v3"]
    known = describe(jax.eval_shape(lambda: spec.build(DIM, rngs=nnx.Rngs(0))))
    of_experts = sum(what.size for name, what in known.items() if name.startswith("experts."))
    total = sum(what.size for what in known.values())
    assert spec.unused(DIM) == of_experts * (EXPERTS - 3) // EXPERTS
    assert spec.flops(DIM) == 2 * (total - spec.unused(DIM) - EXPERTS)  # the correction is only added
    assert EXPERT.unused(DIM) == 0
    gpt_oss = LAYERS["gpt_oss"]
    biases = 6 * (2 * 16 + DIM)
    assert gpt_oss.unused(DIM) == 6 * 3 * DIM * 16 + biases


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": Router(top_k=9)}, "experts=8, top_k=9, groups=1, chosen=1"),
        ({"router": Router(top_k=0)}, "top_k=0"),
        ({"router": Router(top_k=5, groups=BEST_TWO)}, "top_k=5, groups=4, chosen=2"),
        ({"experts": 6, "router": Router(top_k=2, groups=BEST_TWO)}, "experts=6, top_k=2, groups=4"),
        (
            {"experts": 4, "router": Router(top_k=2, groups=BEST_TWO)},
            "two experts in each group, got experts=4, groups=4",
        ),
    ],
    ids=str,
)
def test_impossible_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LAYERS["mixtral"].replace(**change)


def test_impossible_groups_are_refused():
    with pytest.raises(ValueError, match="got chosen=5, groups=4"):
        Groups(groups=4, chosen=5, group_score="best")

"""Rotary embeddings against transformers (tests/truth/make_rope.py), their formulas and their invariants."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_scaling import LONGROPE, SCALINGS
from flaxzoo.layers.positions.positions import Positions
from flaxzoo.layers.positions.rope import Rope
from flaxzoo.layers.positions.scaling import (
    DynamicNTKScaling,
    LinearScaling,
    NTKScaling,
    ProportionalScaling,
    RopeScaling,
    rope_frequencies,
    yarn_mscale,
)
from jax.sharding import PartitionSpec as P

TRUTH = json.loads((Path(__file__).parents[2] / "truth" / "rope.json").read_text())
ROPES = {
    "plain": Rope(),
    "interleaved": Rope(interleaved=True),
    "partial": Rope(fraction=0.5),
    "partial interleaved": Rope(fraction=0.5, interleaved=True),
} | {name: Rope(scaling=scaling) for name, scaling in SCALINGS.items()}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def at(index, lengths=None) -> Positions:
    """One document a row."""
    return Positions(index=jnp.asarray(index), segments=jnp.ones_like(index), lengths=lengths)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def frequencies(rope: Rope, dim: int, length: int) -> tuple[np.ndarray, float]:
    if rope.scaling is None:
        return rope_frequencies(rope.theta, dim), 1.0
    found, factor = rope.scaling.frequencies(rope.theta, dim, length)
    return np.asarray(found), factor


@pytest.mark.parametrize("case", TRUTH["cases"], ids=lambda case: case["name"])
def test_as_transformers(case):
    rope = Rope.from_dict(case["rope"])
    wanted = np.array(case["frequencies"], np.float32)
    found, factor = frequencies(rope, 2 * wanted.size, max(case["positions"]) + 1)
    assert found.dtype == np.float32
    assert factor == case["attention_factor"]
    # PyTorch's float32 power is not rounded correctly everywhere: a few frequencies differ in their last bits.
    np.testing.assert_array_max_ulp(found, wanted, maxulp=2)

    x = np.array(TRUTH["x"], np.float32)[None, :, None, : case["head_dim"]]
    index = jnp.asarray([case["positions"]])
    turned = jax.jit(rope.__call__)(jnp.asarray(x), at(index, jnp.full_like(index, index.max() + 1)))
    off = np.array(case["positions"])[:, None] * np.abs(found - wanted)  # radians, by which the angles differ
    off = np.repeat(off, 2, axis=-1) if rope.interleaved else np.tile(off, 2)
    passed = np.zeros((len(x[0]), case["head_dim"] - off.shape[-1]))
    error = np.abs(np.asarray(turned) - np.array(case["turned"], np.float32).reshape(x.shape))[0, :, 0]
    np.testing.assert_array_less(error, 1e-6 + 4 * np.concatenate((off, passed), axis=-1))


def test_truth_covers_every_scaling_but_static_ntk():
    kinds = {case["rope"].get("scaling", {}).get("kind") for case in TRUTH["cases"]}
    assert kinds >= {type(scaling).__name__ for scaling in SCALINGS.values()} - {"NTKScaling"}


@pytest.mark.parametrize(("factor", "mscale", "wanted"), TRUTH["yarn_mscale"])
def test_yarn_mscale_as_deepseek(factor, mscale, wanted):
    assert yarn_mscale(factor, mscale) == wanted


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_ntk_is_a_larger_theta(dim):
    found, factor = frequencies(Rope(theta=5e5, scaling=NTKScaling(factor=8.0)), dim, 1)
    theta = 5e5 * 8.0 ** (dim / (dim - 2))
    np.testing.assert_allclose(found, theta ** -(np.arange(0, dim, 2) / dim), rtol=1e-6)
    # The fastest pair is kept; the slowest is interpolated by just the factor.
    np.testing.assert_allclose(found[[0, -1]], rope_frequencies(5e5, dim)[[0, -1]] / [1, 8], rtol=1e-6)
    assert factor == 1.0


def test_dynamic_ntk_at_a_length_is_ntk_of_its_factor():
    length, scaling = 250, SCALINGS["dynamic"]
    found, _ = frequencies(Rope(scaling=scaling), 64, length)
    wanted, _ = frequencies(Rope(scaling=NTKScaling(factor=4.0 * length / 64 - 3.0)), 64, length)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ROPES)
def test_scores_depend_on_the_distance_alone(name):
    q, k = normal(1, 8, 2, 8), normal(1, 8, 2, 8, seed=1)
    positions = jnp.array([[0, 3, 7, 20, 21, 40, 50, 60]])

    def scores(shift):  # both shifts stay on one side of where dynamic scalings change
        shifted = at(positions + shift)
        return jnp.einsum("BTNH,BSNH->BNTS", ROPES[name](q, shifted), ROPES[name](k, shifted))

    if isinstance(ROPES[name].scaling, DynamicNTKScaling):
        np.testing.assert_allclose(scores(3), scores(0), atol=1e-5)
    else:
        np.testing.assert_allclose(scores(1000), scores(100), atol=2e-3)
        np.testing.assert_allclose(scores(3), scores(0), atol=1e-5)


@pytest.mark.parametrize("name", ROPES)
def test_keeps_norms_up_to_the_attention_factor(name):
    rope, x = ROPES[name], normal(2, 16, 3, 8)
    positions = jax.random.randint(jax.random.key(2), (2, 16), 0, 60)
    turned = rope(x, at(positions))
    _, factor = frequencies(rope, 8, 60)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), factor * jnp.linalg.norm(x, axis=-1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(rope(x, at(jnp.zeros_like(positions))), factor * x, rtol=1e-6)


def test_pairs():
    x, second = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0), at(jnp.array([[1]]))
    one = 10_000 ** (-2 / 8)
    np.testing.assert_allclose(Rope()(x, second)[0, 0, 0], [0, np.cos(one), 0, 0, 0, np.sin(one), 0, 0], atol=1e-7)
    wanted = [-np.sin(1), np.cos(1), 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(Rope(interleaved=True)(x, second)[0, 0, 0], wanted, atol=1e-7)


def test_far_positions_against_float64():
    positions = np.array([[131_071, 524_287, 999_999, 1_000_000]], np.int32)
    turns = [np.asarray(turn) for turn in jax.jit(Rope().rotation, static_argnums=1)(at(positions), 128)]
    angles = positions[..., None].astype(np.float32) * rope_frequencies(10_000.0, 128)
    exact = positions[..., None] * 10_000.0 ** -(np.arange(0, 128, 2) / 128)
    for turn, function in zip(turns, (np.cos, np.sin), strict=True):
        # Range reduction loses nothing; all the error is the float32 angle's, three roundings of half an ulp.
        np.testing.assert_allclose(turn, function(angles.astype(np.float64)), atol=2e-7, rtol=0)
        np.testing.assert_array_less(np.abs(turn - function(exact)), 2e-7 + 1.5 * 2**-23 * exact)
        np.testing.assert_allclose(turn[..., 60:], function(exact)[..., 60:], atol=5e-5)  # slow pairs stay precise


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ROPES)
def test_low_precision_is_float32_rounded_once(name, dtype):
    x, positions = normal(2, 5, 3, 8).astype(dtype), at(jnp.arange(10).reshape(2, 5) * 99)
    turned = ROPES[name](x, positions)
    assert turned.dtype == dtype
    np.testing.assert_array_equal(turned, ROPES[name](x.astype(jnp.float32), positions).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ROPES)
def test_tpus_turn_by_a_product(name, dtype):
    """By which nothing is rounded: it is what others do."""
    x, positions = normal(2, 5, 3, 8).astype(dtype), at(jnp.arange(10).reshape(2, 5) * 99)
    rotation = ROPES[name].rotation(positions, 8)
    found, wanted = (way(*rotation, x) for way in (ROPES[name]._by_product, ROPES[name]._by_parts))
    assert found.dtype == dtype
    ulp = jnp.finfo(dtype).eps
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=ulp, atol=2e-7)


@pytest.mark.parametrize("name", ROPES)
def test_inside_jit_and_scan_with_its_gradient(name):
    rope, x = ROPES[name], normal(2, 4, 3, 8)
    positions = at(jnp.arange(8).reshape(2, 4) * 20)

    @jax.jit
    def twice(x, positions):
        return jax.lax.scan(lambda x, _: (rope(x, positions), None), x, length=2)[0]

    once = rope(x, positions)
    np.testing.assert_allclose(twice(x, positions), rope(once, positions), atol=1e-6)
    # The transpose of a turn is the turn back: the gradient of |turned|^2 / 2 is x, times the attention factor squared.
    _, factor = frequencies(rope, 8, 141)
    gradient = jax.grad(lambda x: jnp.sum(twice(x, positions) ** 2) / 2)(x)
    wanted = np.array(x)
    dim = int(rope.fraction * 8)
    wanted[..., :dim] *= factor**4
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_explicit_sharding(name, jit):
    rope, x = ROPES[name], normal(4, 8, 2, 8)
    positions = jnp.tile(jnp.arange(8), (4, 1)) + jnp.array([[0], [5], [10], [200]])  # only one shard is long
    wanted = rope(x, at(positions))
    call = jax.jit(rope.__call__) if jit else rope
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "model"))
    assert mesh.are_all_axes_explicit
    for sequence in (None, "sequence"):
        with jax.set_mesh(mesh):
            x_spec = P("data", sequence, "model", None)
            turned = call(jax.device_put(x, x_spec), jax.device_put(at(positions), P("data", sequence)))
            assert jax.typeof(turned).sharding.spec == x_spec
        np.testing.assert_allclose(np.asarray(turned), wanted, atol=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_the_length_of_each_document_decides(name):
    """In one program: rows and packed documents on both sides of `original_length` rotate as they do alone."""
    rope, traces = ROPES[name], []
    rotation = jax.jit(lambda positions: (traces.append(1), rope.rotation(positions, 8))[1])
    sizes = [[3, 60, 0, 65, 2, 0, 0], [66, 64, 2, 0, 0, 0, 0], [131, 1, 0, 0, 0, 0, 0]]
    index = np.stack(
        [np.concatenate([np.arange(size) for size in row] + [np.zeros(132 - sum(row), int)]) for row in sizes]
    )
    segments = np.stack([np.repeat([*range(1, len(row) + 1), 0], [*row, 132 - sum(row)]) for row in sizes])
    packed = Positions(index=jnp.asarray(index), segments=jnp.asarray(segments))
    rotated = rotation(packed)
    for row, number in [(0, 1), (0, 2), (0, 4), (0, 5), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]:
        place = segments[row] == number
        frequency, factor = frequencies(rope, 8, int(place.sum()))
        angles = np.arange(place.sum(), dtype=np.float32)[:, None] * frequency
        np.testing.assert_allclose(rotated[0][row][place], np.cos(angles) * factor, atol=2e-5)
        np.testing.assert_allclose(rotated[1][row][place], np.sin(angles) * factor, atol=2e-5)
    assert len(traces) == 1


def test_every_scaling_is_here():
    def kinds(kind):
        return {kind, *(inner for child in kind.__subclasses__() for inner in kinds(child))}

    assert kinds(RopeScaling) - {RopeScaling} == {type(scaling) for scaling in SCALINGS.values()}


@pytest.mark.parametrize("name", SCALINGS)
def test_equal_lengths_are_those_of_equal_frequencies(name):
    scaling = SCALINGS[name]
    by_length = {length: frequencies(ROPES[name], 8, length)[0].tolist() for length in range(1, 140)}
    for length, wanted in by_length.items():
        equal = scaling.equal_lengths(length)
        assert length in equal
        assert all(by_length[other] == wanted for other in by_length if other in equal)
        assert all(by_length[other] != wanted for other in by_length if other not in equal)


@pytest.mark.parametrize("name", SCALINGS)
def test_specs_travel_as_json_and_are_static(name):
    rope = ROPES[name]
    assert Rope.from_dict(json.loads(json.dumps(rope.to_dict()))) == rope
    assert hash(rope) == hash(rope.replace())


CHANGES = {
    "linear": {"factor": 2.0},
    "ntk": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "original_length": 32},
    "proportional": {"fraction": 0.25, "factor": 2.0},
    "yarn": {"factor": 2.0, "original_length": 999, "beta_fast": 2.0, "beta_slow": 0.5, "attention_factor": 2.0,
             "truncate": False},
    "llama3": {"factor": 2.0, "low_frequency_factor": 2.0, "high_frequency_factor": 8.0, "original_length": 128},
    "longrope": {"short_factors": (1.0, 1.0, 1.0, 1.0), "long_factors": (1.0, 1.0, 1.0, 1.0), "original_length": 32,
                 "length": 128, "attention_factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in CHANGES for field in CHANGES[name]])
def test_no_field_is_dead(name, field):
    dim, base = (8 if name == "longrope" else 64), ROPES[name]
    changed = base.replace(**{f"scaling.{field}": CHANGES[name][field]})
    found = [[*frequencies(rope, dim, length)[0], frequencies(rope, dim, length)[1]]
             for rope in (base, changed) for length in (40, 200)]  # fmt: skip
    assert found[:2] != found[2:]


def test_yarn_takes_both_mscales():
    base = SCALINGS["yarn"]
    _, factor = base.replace(mscale=1.0, mscale_all_dim=0.5).frequencies(10_000.0, 64, 1)
    assert factor == yarn_mscale(4.0) / yarn_mscale(4.0, 0.5)
    for one in ({"mscale": 1.0}, {"mscale_all_dim": 1.0}, {"mscale": 0.0, "mscale_all_dim": 1.0}):
        with pytest.raises(ValueError, match="mscale and mscale_all_dim work only together"):
            base.replace(**one)


@pytest.mark.parametrize(
    ("rope", "head_dim", "rotated"),
    [(Rope(), 7, 7), (Rope(fraction=0.5), 6, 3), (Rope(fraction=0.5), 9, 4), (Rope(fraction=0.1), 8, 0)],
)
def test_odd_dims_raise(rope, head_dim, rotated):
    with pytest.raises(ValueError, match=rf"H={head_dim}, .*{rotated} rotated"):
        rope(jnp.zeros((1, 2, 1, head_dim)), at(jnp.zeros((1, 2), jnp.int32)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rope(theta=0.0), "Rope.theta must be a finite number above 0, got 0.0"),
        (lambda: Rope(fraction=1.5), "fraction must be at most 1, got 1.5"),
        (lambda: ProportionalScaling(fraction=2.0), "fraction must be at most 1, got 2.0"),
        (lambda: LinearScaling(factor=float("nan")), "factor must be a finite number above 0, got nan"),
        (lambda: LinearScaling(factor=0.0), "LinearScaling.factor must be a finite number above 0"),
        (lambda: SCALINGS["llama3"].replace(high_frequency_factor=1.0), "must be below"),
        (lambda: SCALINGS["yarn"].replace(beta_slow=32.0), "beta_fast must be above beta_slow, got 32.0 and 32.0"),
        (lambda: LONGROPE.replace(short_factors=(1.0,)), "must be as many, got 1 and 4"),
        (lambda: LONGROPE.frequencies(1e4, 16, 1), "got 4 factors for 16 rotated dimensions, 8 pairs"),
        (lambda: NTKScaling(factor=2.0).frequencies(1e4, 2, 1), "at least 4 rotated dimensions, got 2"),
    ],
)
def test_wrong_settings_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()

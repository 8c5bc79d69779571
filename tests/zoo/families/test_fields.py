"""Every field of every spec of a model does something: changed, it changes parameters or output, or is refused."""

import dataclasses
import functools

import flaxzoo.zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo.layers.positions import scaling
from flaxzoo.layers.spec import Spec
from flaxzoo.zoo import MLA, MLP, Attention, Block, Decoder, GatedMLP, Groups, LayerNorm, MoE, RMSNorm, Rope, Router
from flaxzoo.zoo.parameters import describe, merge, split

pytestmark = pytest.mark.usefixtures("quick_compiler")
assert flaxzoo.zoo  # every spec of layers and zoo is imported with it

ATTENTION = Attention(heads=2, kv_heads=1, head_dim=8)
BLOCK = Block(mixer=ATTENTION, ffn=GatedMLP(hidden=12))
TINY = Decoder(vocab=20, dim=16, layers=2, block=(BLOCK,))
TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]], jnp.int32)
MIXER, SCALING = "block.0.mixer", "block.0.mixer.rope.scaling"
LATENT = MLA(heads=2, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8)
ROUTER = Router(top_k=2, score="sigmoid", groups=Groups(groups=4, chosen=2, group_score="best_two"))
EXPERTS = MoE(experts=8, expert=GatedMLP(hidden=8), router=ROUTER)
SHORT, LONG = (1.0, 1.5, 2.0, 3.0), (1.0, 4.0, 8.0, 16.0)
LONGROPE = scaling.LongRopeScaling(short_factors=SHORT, long_factors=LONG, original_length=12, length=64)

# Each spec that can be built: where it stands in the tiny decoder, the spec, and another value for each of its fields.
SPECS: dict[str, tuple[str, Spec, dict[str, object]]] = {
    "Decoder": (
        "",
        TINY,
        {
            "vocab": 24,
            "dim": 32,
            "layers": 3,
            "block": (BLOCK, BLOCK),
            "first": (BLOCK,),
            "norm": None,
            "tied": False,
            "max_positions": 32,
            "scale_embedding": True,
            "soft_cap": 0.5,
        },
    ),
    "Block": (
        "block.0",
        BLOCK,
        {"mixer": ATTENTION.replace(heads=4), "ffn": MLP(hidden=12), "norm": LayerNorm(), "placement": "parallel"},
    ),
    "Attention": (
        MIXER,
        ATTENTION,
        {
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 4,
            "rope": None,
            "bias": True,
            "output_bias": True,
            "qk_norm": RMSNorm(),
            "qk_norm_joint": True,
            "window": 3,
            "soft_cap": 0.5,
            "sinks": True,
            "scale": 2.0,
        },
    ),
    "Attention, its queries and keys normalised": (
        MIXER,
        ATTENTION.replace(qk_norm=RMSNorm()),
        {"qk_norm_joint": True},
    ),
    "MLP": ("block.0.ffn", MLP(hidden=12), {"hidden": 8, "activation": "relu", "bias": False}),
    "GatedMLP": (
        "block.0.ffn",
        GatedMLP(hidden=12),
        {"hidden": 8, "activation": "relu", "bias": True, "limit": 0.3, "offset": 1.0},
    ),
    "MLA": (
        MIXER,
        LATENT,
        {
            "heads": 4,
            "kv_rank": 4,
            "nope_dim": 4,
            "rope_dim": 8,
            "value_dim": 4,
            "query_rank": 4,
            "rope": Rope(interleaved=True, theta=100.0),
            "norm": RMSNorm(eps=0.5),
            "bias": True,
            "scale": 2.0,
        },
    ),
    "MoE": (
        "block.0.ffn",
        EXPERTS,
        {
            "experts": 16,
            "expert": MLP(hidden=8),
            "router": ROUTER.replace(top_k=3),
            "shared": GatedMLP(hidden=8),
        },
    ),
    "Router": (
        "block.0.ffn.router",
        ROUTER,
        {
            "top_k": 3,
            "score": "softmax",
            "normalise": False,
            "scale": 2.0,
            "groups": None,
            "bias": True,
            "correction": True,
        },
    ),
    "Groups": (
        "block.0.ffn.router.groups",
        Groups(groups=4, chosen=2, group_score="best_two"),
        {"groups": 2, "chosen": 3, "group_score": "best"},
    ),
    "RMSNorm": ("block.0.norm", RMSNorm(), {"eps": 0.5, "zero_centered": True}),
    "LayerNorm": ("block.0.norm", LayerNorm(), {"eps": 0.5, "bias": False}),
    "Rope": (
        f"{MIXER}.rope",
        Rope(),
        {"theta": 100.0, "fraction": 0.5, "interleaved": True, "scaling": scaling.LinearScaling(factor=4.0)},
    ),
    "LinearScaling": (SCALING, scaling.LinearScaling(factor=2.0), {"factor": 4.0}),
    "NTKScaling": (SCALING, scaling.NTKScaling(factor=2.0), {"factor": 4.0}),
    "DynamicNTKScaling": (
        SCALING,
        scaling.DynamicNTKScaling(factor=2.0, original_length=8),
        {"factor": 4.0, "original_length": 4},
    ),
    "ProportionalScaling": (SCALING, scaling.ProportionalScaling(fraction=0.5), {"fraction": 1.0, "factor": 4.0}),
    "YarnScaling": (
        SCALING,
        scaling.YarnScaling(factor=4.0, original_length=64, truncate=False),
        {
            "factor": 8.0,
            "original_length": 256,
            "beta_fast": 4.0,
            "beta_slow": 8.0,
            "attention_factor": 2.0,
            "mscale": 1.0,  # refused without mscale_all_dim, and the other way around
            "mscale_all_dim": 1.0,
            "truncate": True,
        },
    ),
    "YarnScaling, DeepSeek's": (
        SCALING,
        scaling.YarnScaling(factor=4.0, original_length=64, mscale=0.7, mscale_all_dim=1.0),
        {"mscale": 2.0, "mscale_all_dim": 2.0},
    ),
    "Llama3Scaling": (
        SCALING,
        scaling.Llama3Scaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64),
        {"factor": 8.0, "low_frequency_factor": 2.0, "high_frequency_factor": 16.0, "original_length": 512},
    ),
    "LongRopeScaling": (
        SCALING,
        LONGROPE,
        {
            "short_factors": SHORT[:3],  # refused: one for each pair
            "long_factors": LONG[::-1],
            "original_length": 16,
            "length": 128,
            "attention_factor": 3.0,
        },
    ),
    "LongRopeScaling, short": (SCALING, LONGROPE.replace(original_length=32), {"short_factors": SHORT[::-1]}),
}
CASES = [(name, field) for name, (_, _, changes) in SPECS.items() for field in changes]


def every_spec(kind: type[Spec] = Spec) -> set[type[Spec]]:
    below = {sub for child in kind.__subclasses__() for sub in every_spec(child)}
    ours = kind.__module__.startswith(("flaxzoo.layers.", "flaxzoo.zoo.decoder")) and kind is not Spec
    return below | ({kind} if ours and not getattr(kind, "__abstractmethods__", None) else set())


def decoder_with(path: str, spec: Spec) -> Decoder:
    if path == "":
        assert isinstance(spec, Decoder)
        return spec
    if isinstance(spec, scaling.RopeScaling):
        return TINY.replace(**{f"{MIXER}.rope": Rope(scaling=spec)})
    if path.startswith("block.0.ffn.router"):
        return TINY.replace(**{"block.0.ffn": EXPERTS}).replace(**{path: spec})
    return TINY.replace(**{path: spec})


def shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    return {name: known.shape for name, known in describe(decoder.abstract()).items()}


@functools.cache
def logits(decoder: Decoder) -> np.ndarray:
    """Of a model whose parameters depend on their names and shapes alone."""
    random = np.random.default_rng(0)
    drawn = {name: jnp.asarray(random.normal(0, 0.5, shape), jnp.float32) for name, shape in shapes(decoder).items()}
    with jax.disable_jit():  # the operations are compiled once, not once for every decoder
        return np.asarray(merge(decoder.abstract(), drawn)(TOKENS)[0])


def test_every_spec_and_field_has_a_case():
    covered: dict[str, set[str]] = {}
    for name, (_, _, changes) in SPECS.items():
        covered.setdefault(name.partition(",")[0], set()).update(changes)
    assert covered == {kind.__name__: {field.name for field in dataclasses.fields(kind)} for kind in every_spec()}


@pytest.mark.parametrize(("name", "field"), CASES, ids=lambda part: part)
def test_field_does_something(name, field):
    path, spec, changes = SPECS[name]
    assert getattr(spec, field) != changes[field]
    before = decoder_with(path, spec)
    try:
        after = decoder_with(path, spec.replace(**{field: changes[field]}))
        if shapes(before) == shapes(after):
            assert np.abs(logits(after) - logits(before)).max() > 1e-3
    except ValueError as refused:
        if field not in str(refused):
            raise


def test_logits_of_the_same_decoder_are_the_same():
    """So any difference above comes from the field."""
    first = logits(TINY)
    logits.cache_clear()
    np.testing.assert_array_equal(logits(TINY), first)


def test_parameters_start_by_seed():
    first, same, other = (split(TINY.build(rngs=nnx.Rngs(seed))) for seed in (0, 0, 1))
    name = "stack.0.mixer.query.weight"
    np.testing.assert_array_equal(first[name], same[name])
    assert np.abs(np.asarray(first[name] - other[name])).min() > 0

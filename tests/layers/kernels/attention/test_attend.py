"""Every implementation of attend against the plain definition and JAX's own, forward and gradients."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import (
    CASES,
    SQUARE,
    VARIANTS,
    Case,
    assert_close,
    indices,
    ours,
    outcomes,
    plain,
    visible,
)
from flaxzoo.layers.kernels.attention import attend
from flaxzoo.layers.kernels.attention.masks import Causal, Documents, Full, Where

pytestmark = pytest.mark.usefixtures("quick_compiler")

JAX_CASES = ("groups of 2, whole blocks", "multi-query", "offset", "both hoisted", "scale")
WITHOUT_CAUSE_TO_SEE = ("nothing in one sequence", "documents with padding", "not", "lengths", "sinks and nothing")

REFUSED_BY_TPU = {
    "relative bias": "the score looks up an array by query and key at once",
    "relative bias, both ways": "the score looks up an array by query and key at once",
}


def variants(name: str) -> list[str]:
    """Those that can do a case."""
    return [variant for variant in VARIANTS if not (variant.startswith("tpu") and name in REFUSED_BY_TPU)]


@functools.cache
def in_float32(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Outcomes of the definition ("plain"), JAX's own where it can say so ("jax"), and every implementation."""
    case = CASES[name]
    functions = {variant: ours(case, variant) for variant in variants(name)}
    if name in JAX_CASES:
        scale = case.options.get("scale")
        functions["jax"] = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=visible(case), scale=scale)
    return outcomes(case.inputs(), plain=lambda **x: plain(case, **x), **functions)


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name in CASES for variant in variants(name)])
def test_equals_the_definition(name, variant):
    assert_close(in_float32(name)[variant], in_float32(name)["plain"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", JAX_CASES)
def test_equals_jax(name, variant):
    assert_close(in_float32(name)[variant], in_float32(name)["jax"])


@pytest.mark.parametrize("name", REFUSED_BY_TPU)
def test_what_the_kernels_for_tpu_refuse(name, caplog):
    case = CASES[name]
    with pytest.raises(NotImplementedError, match=f"implementation='tpu': {REFUSED_BY_TPU[name]}"):
        ours(case, "tpu")(**case.inputs())
    with caplog.at_level("DEBUG", logger="flaxzoo.layers.kernels.attention.attend"):
        ours(case, "default")(**case.inputs())
    assert REFUSED_BY_TPU[name] in caplog.text


def test_narrow_numbers_for_each_pair_are_left_to_portable():
    """The TPU compiler lacks operations on them; ids that are looked up are widened before."""
    x = jnp.zeros((2, 45, 4, 16))
    narrow = Where(lambda b, h, q, k: (q - k).astype(jnp.uint8) < 3)
    with pytest.raises(NotImplementedError, match="the mask computes with uint8 for each pair; 'portable' can do it"):
        attend(x, x, x, mask=narrow, implementation="tpu")
    ids = jnp.ones((2, 45), jnp.uint8)
    assert jax.eval_shape(lambda ids: attend(x, x, x, mask=Documents(ids), implementation="tpu"), ids).shape == x.shape


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sinks", jnp.float16),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                ("everything", jnp.bfloat16),
                ("everything", jnp.float16),
                ("sinks", jnp.bfloat16),
                ("groups of 2, whole blocks", jnp.bfloat16),
                ("groups of 2, whole blocks", jnp.float16),
            ]
        ),
    ],
)
def test_low_precision_errs_no_more_than_twice_the_plain_definition(name, dtype):
    case = CASES[name]
    assert ours(case, "portable")(**case.inputs(dtype)).dtype == dtype
    # With dropout, four draws: of the few numbers that a gradient by head has, some are right by luck.
    seeds = [{"dropout_seed": seed} for seed in (7, 8, 9, 10)] if "dropout_seed" in case.options else [{}]
    squares: dict[tuple[str, str], float] = {}
    for seed in seeds:
        case = dataclasses.replace(CASES[name], options=CASES[name].options | seed)
        rounded, definition = case.inputs(dtype), functools.partial(plain, case)
        exact = outcomes({n: x.astype(jnp.float32) for n, x in rounded.items()}, plain=definition)["plain"]
        functions = {variant: ours(case, variant) for variant in variants(name)}
        for variant, parts in outcomes(rounded, plain=definition, **functions).items():
            for part, value in parts.items():
                error = float(np.mean((value - exact[part]) ** 2))
                squares[variant, part] = squares.get((variant, part), 0.0) + error
    for (variant, part), square in squares.items():
        assert 0 < square <= 2**2 * squares["plain", part], (variant, part)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", WITHOUT_CAUSE_TO_SEE)
def test_queries_that_see_nothing_give_zeros_and_no_gradient(name, variant):
    seen = np.asarray(visible(CASES[name]))
    blind, unseen = ~seen.any(axis=(1, 3)), ~seen.any(axis=(1, 2))
    found = in_float32(name)[variant]
    assert blind.any()
    assert all(np.isfinite(value).all() for value in found.values())
    for part, rows in (("result", blind), ("q", blind), ("k", unseen), ("v", unseen)):
        assert not found[part][rows].any(), part


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["sinks and nothing", "documents with padding", "soft cap"])
def test_lse_is_that_of_the_visible_logits_and_has_a_gradient(name, variant):
    case = CASES[name]
    inputs = case.inputs()
    seen = visible(case)

    def wanted(q: Any, k: Any, v: Any, sinks: Any = None, **parameters: Any) -> Any:
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, 2, axis=2)) / 4
        if case.score is not None:
            wide = jnp.broadcast_arrays(logits, *indices(case))
            score = jax.vmap(case.score(**parameters))
            logits = score(*(x.reshape(-1) for x in wide)).reshape(logits.shape)
        logits = jnp.where(seen, logits, -jnp.inf)
        if sinks is not None:
            logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[:, None, None], (*logits.shape[:3], 1))], axis=-1)
        top = jnp.maximum(logits.max(-1), -1e30)
        total = jnp.where(logits > -jnp.inf, jnp.exp(logits - top[..., None]), 0.0).sum(-1)
        return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)

    def value(function: Any) -> Any:
        def summed(inputs: Any) -> Any:
            lse = function(**inputs)
            return jnp.sum(
                jnp.where(lse == -jnp.inf, 0.0, lse) * jnp.linspace(0.0, 1.0, lse.size).reshape(lse.shape)
            ), lse

        (_, lse), grads = jax.value_and_grad(summed, has_aux=True)(inputs)
        return {"lse": lse} | grads

    found = value(lambda **x: ours(case, variant, return_lse=True)(**x)[1])
    for part, array in value(wanted).items():
        np.testing.assert_allclose(found[part], array, rtol=1e-5, atol=1e-5, err_msg=part)


@pytest.mark.parametrize("name", ["everything", "score of a user's own", "relative bias", "offset of each sequence"])
def test_forward_mode_equals_that_of_the_definition(name):
    case = CASES[name]
    inputs = case.inputs()
    moves = {n: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for n, x in inputs.items()}

    def tangent(function: Any) -> Any:
        return jax.jvp(lambda inputs: function(**inputs), (inputs,), (moves,))[1]

    wanted = tangent(functools.partial(plain, case))
    for variant in variants(name):
        np.testing.assert_allclose(tangent(ours(case, variant)), wanted, rtol=1e-5, atol=1e-5, err_msg=variant)


def test_gradients_of_each_example_by_vmap():
    case = CASES["groups of 2, whole blocks"]
    inputs = case.inputs()

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(ours(case, "portable in blocks")(q[None], k[None], v[None]) ** 2)

    found = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*inputs.values())
    for row in range(2):
        wanted = jax.grad(loss, (0, 1, 2))(*(x[row] for x in inputs.values()))
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one[row], other, rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    case = CASES["one"]
    q, k, v = case.inputs().values()

    def gradient(implementation: Any) -> Any:
        attention = functools.partial(attend, k=k, v=v, mask=Full(), implementation=implementation)
        return jax.grad(lambda q: jnp.sum(jax.grad(lambda q: jnp.sum(attention(q)))(q)))

    assert np.isfinite(gradient("reference")(q)).all()
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient("portable")(q)


def test_the_same_bits_on_every_call():
    case = CASES["everything"]
    first, second = (outcomes(case.inputs(), ours=ours(case, "portable in blocks"))["ours"] for _ in range(2))
    for part, value in first.items():
        np.testing.assert_array_equal(value, second[part])


def test_documents_packed_equal_documents_apart():
    q, k, v = Case((60, 60, 4, 2, 16, 16)).inputs().values()
    ends = [0, 13, 40, 60]
    packed = jnp.asarray(np.repeat([1, 2, 3], np.diff(ends))[None].repeat(2, 0), jnp.int32)
    for variant in VARIANTS:
        whole = ours(Case(SQUARE, Causal() & Documents(packed)), variant)(q, k, v)
        for start, end in itertools.pairwise(ends):
            apart = ours(Case(SQUARE), variant)(*(x[:, start:end] for x in (q, k, v)))
            np.testing.assert_allclose(whole[:, start:end], apart, rtol=1e-5, atol=1e-5)


def test_huge_logits_overflow_nothing():
    inputs = {name: x * 300 for name, x in CASES["sinks"].inputs().items()}
    for found in outcomes(inputs, **{variant: ours(CASES["sinks"], variant) for variant in VARIANTS}).values():
        assert all(np.isfinite(value).all() for value in found.values())
        assert np.abs(found["result"]).max() > 1


def test_no_array_of_the_size_of_all_pairs():
    """Memory of the compiled program grows with the length, not with its square."""

    def temporary(length: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
        gradient = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, mask=Causal() & Documents(IDS[length]))), (0, 1, 2))
        analysis: Any = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    IDS = {length: jnp.ones((1, length), jnp.int32) for length in (4096, 8192)}
    assert temporary(8192) < 2.2 * temporary(4096)
    assert temporary(8192) < 8192 * 8192 * 4 / 4

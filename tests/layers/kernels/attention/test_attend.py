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
    bent,
    ids,
    indices,
    numbers,
    ours,
    outcomes,
    plain,
    random_table,
    visible,
)
from flaxzoo.layers.kernels.attention import attend, context
from flaxzoo.layers.kernels.attention import pair_function as pairs
from flaxzoo.layers.kernels.attention.masks import BlockSparse, Causal, Dense, Documents, Full, Lengths, Where, Window
from flaxzoo.layers.kernels.attention.scores import Alibi, RelativeBias, SoftCap
from jax.sharding import PartitionSpec as P

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


@pytest.mark.parametrize(
    "name",
    [
        "offset of each sequence",
        "documents with padding",
        "documents of a user's own",
        "everything",
        "of a user's own",
        "per head",
        "alibi",
        "score of a user's own",
        "dense",
    ],
)
def test_split_over_a_mesh(name):
    case = CASES[name]
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"))):
        spec = P("data", None, "tensor", None)
        placed = {
            n: jax.device_put(x, spec if x.ndim == 4 else P("tensor" if n in ("sinks", "slopes") else None))
            for n, x in case.inputs().items()
        }
        call = ours(case, "portable in blocks")
        assert jax.typeof(call(**placed)).sharding.spec == spec
        found = outcomes(placed, split=call)["split"]
    assert_close(found, in_float32(name)["plain"])


def test_masks_of_arrays_split_like_the_batch():
    case = CASES["documents with padding"]
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        placed = {n: jax.device_put(x, P("data")) for n, x in case.inputs().items()}
        for place in (P("data"), P()):
            mask = Causal() & Documents(jax.device_put(ids(45, 10, 29, 40), place))
            found = jax.jit(lambda x, mask: attend(**x, mask=mask))(placed, mask)
            np.testing.assert_allclose(found, in_float32("documents with padding")["plain"]["result"], atol=1e-5)


def test_heads_must_be_split_alike():
    with jax.set_mesh(jax.make_mesh((2,), ("tensor",))):
        x = CASES["sinks"].inputs()
        q = jax.device_put(x["q"], P(None, None, "tensor"))
        k, v = (jax.device_put(x[name], P()) for name in "kv")
        with pytest.raises(ValueError, match="along batch and heads, all alike"):
            attend(q, k, v, mask=Causal())


EVEN = (64, 64, 4, 2, 16, 16)
CONTEXT_CASES = {
    "causal": Case(EVEN),
    "full": Case(EVEN, Full()),
    "window": Case(EVEN, Causal() & Window(9)),
    "both hoisted": Case(EVEN, Window(9, 5)),
    "documents with padding": Case(EVEN, Causal() & Documents(ids(64, 13, 40, 55)), parameters={"sinks": (4,)}),
    "fewer queries": Case((32, 64, 4, 2, 16, 24), Causal() & Window(30), {"query_offset": numbers(5, 32)}),
    "halves that are not whole": Case((40, 40, 4, 2, 16, 16)),
    "nothing in one sequence": Case(EVEN, Lengths(numbers(64, 0))),
    "blocks": Case(EVEN, Causal() & BlockSparse(random_table(1, 4, 8, 8, share=0.4), 8)),
    "dense": Case(EVEN, Dense(random_table(2, 1, 64, 64, share=0.2))),
    "relative bias": Case(EVEN, parameters={"table": (4, 12)}, score=lambda table: RelativeBias(table)),
    "score of a user's own": Case(
        EVEN, Causal() & Window(30), {}, {"slopes": (4,), "rows": (2, 64), "columns": (4, 64)}, bent
    ),
    "everything": Case(
        EVEN,
        Causal() & Window(40) & ~Window(3) & Documents(ids(64, 13, 40, 55)),
        {"scale": 0.5, "dropout_rate": 0.2, "dropout_seed": 7},
        {"sinks": (4,), "slopes": (4,)},
        lambda slopes: lambda score, *index: SoftCap(2.0)(Alibi(slopes)(score, *index)),
    ),
}


@functools.cache
def in_one_piece(name: str) -> dict[str, np.ndarray]:
    case = CONTEXT_CASES[name]
    return outcomes(case.inputs(), plain=functools.partial(plain, case))["plain"]


def split_along_the_length(case: Case) -> dict[str, jax.Array]:
    mesh = jax.sharding.get_abstract_mesh()
    spec = P(*(name if mesh.shape.get(name, 1) > 1 else None for name in ("data", "context", "tensor")))
    return {n: jax.device_put(x, spec if x.ndim == 4 else P()) for n, x in case.inputs().items()}


@pytest.mark.parametrize(
    ("name", "method", "mesh", "variant"),
    [(name, "ring", {"context": 4}, "portable in blocks") for name in CONTEXT_CASES]
    + [(name, "ring", {"context": 8}, "portable in blocks") for name in CONTEXT_CASES]
    + [(name, "all_gather", {"context": 4}, "portable in blocks") for name in CONTEXT_CASES]
    + [("everything", method, {"data": 2, "context": 2, "tensor": 2}, "portable") for method in ("ring", "all_gather")]
    + [
        (name, "ring", {"context": 4}, "tpu")
        for name in ("causal", "documents with padding", "fewer queries", "everything")
    ]
    + [("everything", method, {"context": 4}, "reference") for method in ("ring", "all_gather")],
)
def test_split_along_the_length(name, method, mesh, variant):
    case = CONTEXT_CASES[name]
    with jax.set_mesh(jax.make_mesh(tuple(mesh.values()), tuple(mesh))):
        call = ours(case, variant, context_axis="context", context=method)
        found = outcomes(split_along_the_length(case), split=call)["split"]
    assert_close(found, in_one_piece(name))


@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_forward_mode_and_sums_of_a_split_length(method):
    case = CONTEXT_CASES["everything"]
    options: Any = {"context_axis": "context", "context": method}

    def both(inputs: dict[str, jax.Array], function: Any) -> Any:
        moves = {n: jnp.cos(x) for n, x in inputs.items()}
        return jax.jit(lambda *x: jax.jvp(lambda inputs: function(**inputs), *x))((inputs,), (moves,))

    wanted = both(case.inputs(), ours(case, "reference", return_lse=True))
    with jax.set_mesh(jax.make_mesh((4,), ("context",))):
        placed = split_along_the_length(case)
        found = both(placed, ours(case, "portable in blocks", return_lse=True, **options))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "offset", "wanted"),
    [
        (Causal(), 0, (True, 0, 8)),
        (Full(), 0, (False, 0, 8)),
        (Causal() & Window(8), 0, (False, 0, 2)),  # no key is needed by more than the next device
        (Causal() & Window(10), 0, (False, 0, 3)),
        (Window(9, 9), 0, (False, 7, 3)),
        (Causal() & Documents(jnp.ones((2, 64), jnp.int32)), 0, (True, 0, 8)),
        (Causal() & ~Window(48), 0, (False, 6, 3)),  # the own keys may be seen for all that intervals know
        (Causal() & Window(8), 16, (False, 6, 2)),
    ],
)
def test_the_quickest_way_round(mask, offset, wanted):
    """Balanced order, the first keys and the number of steps for 8 devices of 8 queries and keys each."""
    found = context.plan(pairs.trace(mask.visible), pairs.Sizes(2, 4, 64, 64, offset), "context", 8, "ring")
    assert found is not None
    assert (found.balanced, found.first, found.steps) == wanted


def test_a_length_must_be_split_as_is_said():
    with jax.set_mesh(jax.make_mesh((4,), ("context",))):
        x = CONTEXT_CASES["causal"].inputs()
        split = {n: jax.device_put(array, P(None, "context")) for n, array in x.items()}
        with pytest.raises(ValueError, match="with context_axis=None must be split not along their length, got"):
            attend(**split, mask=Causal())
        for axis in ("context", "sequence"):
            whole = {n: jax.device_put(array, P()) for n, array in x.items()}
            with pytest.raises(ValueError, match=f"must be split along their length over {axis}, got"):
                attend(**whole, mask=Causal(), context_axis=axis)
        with pytest.raises(ValueError, match="the mask hides every key from every query"):
            attend(**split, mask=~Full(), context_axis="context")
        with pytest.raises(Exception, match="unknown context method 'circle'|Type-check"):
            attend(**split, mask=Causal(), context_axis="context", context="circle")  # pyright: ignore


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 3, 8), (2, 5, 2, 8), (2, 5, 2, 8)), "multiple of key/value heads, got N=3, K=2"),
        (((2, 5, 2, 8), (2, 5, 2, 4), (2, 5, 2, 4)), r"got \(2, 5, 2, 8\), \(2, 5, 2, 4\)"),
        (((2, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)), "must be B T N H"),
        (((2, 5, 2, 8), (2, 5, 2, 8), (2, 6, 2, 8)), "must be B T N H"),
        (((2, 5, 2, 8), (2, 5, 2, 8), (2, 5, 1, 8)), "must be B T N H"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message, request):
    if not request.config.getoption("no_jaxtyping"):
        import jaxtyping

        message = f"{message}|parameter"
        expected = (ValueError, jaxtyping.TypeCheckError)
    else:
        expected = ValueError
    with pytest.raises(expected, match=message):
        attend(*(jnp.zeros(shape) for shape in shapes), mask=Causal())


X = jnp.zeros((2, 6, 4, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mask": Documents(jnp.ones((2, 5), jnp.int32))},
            r"Documents\(ids\) must be B T with T 6, got shape \(2, 5\)",
        ),
        (
            {"mask": Documents(jnp.ones((3, 6), jnp.int32))},
            r"Documents\(ids\) must be B T with B 2, got shape \(3, 6\)",
        ),
        ({"mask": Dense(jnp.ones((1, 1, 6, 7), bool))}, r"Dense\(array\) must be 1 1 T S with S 6"),
        ({"mask": BlockSparse(jnp.ones((1, 1, 2, 2), bool), 2)}, r"BlockSparse\(table\) must be 1 1 T S with T 3"),
        ({"mask": Causal(), "score": Alibi(jnp.ones(3))}, r"Alibi\(slopes\) must be N with N 4, got shape \(3,\)"),
        ({"mask": ~Full()}, "the mask hides every key from every query"),
        ({"mask": Causal(), "query_offset": -6}, "the mask hides every key from every query"),
        (
            {"mask": Causal(), "query_offset": jnp.zeros(3, jnp.int32)},
            r"one for each of B=2 sequences, got shape \(3,\)",
        ),
        ({"mask": Causal(), "sinks": jnp.zeros(3)}, "sinks are a logit for each of N=4 query heads"),
        ({"mask": Causal(), "dropout_rate": 1.0, "dropout_seed": 0}, "dropout_rate is at least 0 and below 1"),
        ({"mask": Causal(), "dropout_rate": 0.5}, "needs a dropout_seed"),
        (
            {"mask": Where(lambda b, h, q, k: jnp.arange(3) == q)},
            r"maps scalars to a scalar of type bool, got a result of type bool and shape \(3,\)",
        ),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(Exception, match=f"{message}|Type-check"):  # the tests' own type checker may be first
        attend(X, X, X, **options)


@pytest.mark.parametrize("dtypes", [(jnp.int32,) * 3, (jnp.float32, jnp.bfloat16, jnp.float32), (jnp.float64,) * 3])
def test_types_that_do_not_fit(dtypes):
    arrays = [np.zeros((1, 2, 2, 8), dtype) for dtype in dtypes]
    with pytest.raises(Exception, match=r"must all be float32, bfloat16 or float16|Float\[Array"):
        attend(*arrays, mask=Causal())  # pyright: ignore


def test_unknown_implementation_names_what_is_close():
    with pytest.raises(Exception, match="portable"):
        attend(X, X, X, mask=Causal(), implementation="portible")  # pyright: ignore[reportArgumentType]


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

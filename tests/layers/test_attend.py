"""Every implementation of attend against the plain definition and JAX's own, forward and gradients."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.kernels import attend
from flaxzoo.layers.masks import Causal, Documents, Mask, Window
from jax.sharding import PartitionSpec as P

pytestmark = pytest.mark.usefixtures("quick_compiler")
IMPLEMENTATIONS = ("reference", "portable")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Strided(Mask):
    """A mask of a user's own, different in every head."""

    def visible(self, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query - key) % (head + 2) == 0


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int, int, int]
    """T, S, N, K, H, Hv; B is 2."""
    mask: Mask | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False

    def inputs(self, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        t, s, n, k, h, hv = self.shape
        shapes = {"q": (2, t, n, h), "k": (2, s, k, h), "v": (2, s, k, hv)} | ({"sinks": (n,)} if self.sinks else {})
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return {
            name: jax.random.normal(key, shapes[name]).astype(dtype) for key, name in zip(keys, shapes, strict=True)
        }


def ids(length: int, *ends: int) -> jax.Array:
    """Two rows of documents 1, 2, ... that end at these places, the second row's 3 earlier; then padding."""
    rows = [np.searchsorted(np.array(ends) - shift, np.arange(length), side="right") + 1 for shift in (0, 3)]
    return jnp.asarray([np.where(row > len(ends), 0, row) for row in rows], jnp.int32)


def offset(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


SQUARE = (140, 140, 4, 2, 16, 16)  # two blocks of queries
CASES = {
    "one": Case((1, 1, 1, 1, 8, 8)),
    "heads apart, odd": Case((37, 37, 3, 3, 40, 40)),
    "groups of 2, three blocks": Case((257, 257, 4, 2, 64, 64)),
    "groups of 4": Case((131, 131, 8, 2, 80, 80)),
    "multi-query": Case((129, 129, 4, 1, 16, 16)),
    "narrow values": Case((130, 130, 4, 2, 40, 24)),
    "wide values": Case((33, 33, 4, 2, 8, 40)),
    "decoding": Case((1, 200, 4, 2, 16, 16), Causal(150)),
    "static offset": Case((140, 300, 4, 2, 16, 16), Causal(160)),
    "offset of each sequence": Case(
        (140, 300, 4, 2, 16, 16), Causal(offset(0, 100)) & Window(30, offset=offset(0, 100))
    ),
    "fewer keys than queries": Case((140, 50, 4, 2, 16, 16)),
    "window": Case(SQUARE, Causal() & Window(20)),
    "window, offset": Case((140, 300, 4, 2, 16, 16), Causal(160) & Window(20, offset=160)),
    "both sides": Case(SQUARE, Window(20, 9)),
    "documents with padding": Case(SQUARE, Causal() & Documents(ids(140, 30, 90, 120), ids(140, 30, 90, 120))),
    "either": Case(SQUARE, (Causal() & Window(8)) | (~Causal() & Window(1, 3)) | Causal(-130)),
    "not": Case(SQUARE, Causal() & ~Window(8)),
    "all but nothing": Case(SQUARE, Window(5, offset=130)),
    "nothing": Case(SQUARE, Window(5, offset=1000)),
    "of a user's own": Case(SQUARE, Causal() & Strided()),
    "soft cap": Case(SQUARE, options={"soft_cap": 1.5}),
    "sinks": Case(SQUARE, sinks=True),
    "scale": Case(SQUARE, options={"scale": 0.7}),
    "everything": Case(SQUARE, Causal() & Window(20) & ~Window(3), {"soft_cap": 2.0, "scale": 0.5}, sinks=True),
    "sinks and nothing": Case(SQUARE, Window(5, offset=1000), sinks=True),
}


JAX_CASES = ("groups of 2, three blocks", "multi-query", "static offset", "both sides", "scale")


def visible(case: Case) -> jax.Array:
    """B N T S."""
    t, s, n = case.shape[:3]
    mask = Causal() if case.mask is None else case.mask
    index = [jnp.arange(size).reshape(-1, *(1,) * (3 - dim)) for dim, size in enumerate((2, n, t, s))]
    return jnp.broadcast_to(mask.visible(*index), (2, n, t, s))


def plain(case: Case, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """The definition, one key/value head for every query head, in the dtype of the inputs but for the softmax."""
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k).astype(jnp.float32) * case.options.get("scale", q.shape[-1] ** -0.5)
    cap = case.options.get("soft_cap")
    logits = logits if cap is None else jnp.tanh(logits / cap) * cap
    seen = visible(case)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(jnp.float32))[:, None, None]
    weights = weights / jnp.where(total == 0, 1.0, total)
    return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v.dtype), v)


def outcomes(inputs: dict[str, jax.Array], **functions: Any) -> dict[str, dict[str, np.ndarray]]:
    """Of each function its result, and the gradient in every input for a fixed random cotangent."""

    def outcome(function: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        result, back = jax.vjp(lambda inputs: function(**inputs), inputs)
        cotangent = jax.random.normal(jax.random.key(9), result.shape).astype(result.dtype)
        spec = jax.typeof(result).sharding.spec
        cotangent = cotangent if all(axis is None for axis in spec) else jax.reshard(cotangent, spec)
        return {"result": result} | back(cotangent)[0]

    found = jax.jit(lambda x: {name: outcome(function, x) for name, function in functions.items()})(inputs)
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), found)


def ours(case: Case, implementation: str) -> Any:
    return lambda **x: attend(**x, mask=case.mask, implementation=implementation, **case.options)  # pyright: ignore


@functools.cache
def in_float32(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Outcomes of the definition ("plain"), JAX's own where it can say so ("jax"), and every implementation."""
    case = CASES[name]
    functions = {implementation: ours(case, implementation) for implementation in IMPLEMENTATIONS}
    if name in JAX_CASES:
        scale = case.options.get("scale")
        functions["jax"] = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=visible(case), scale=scale)
    return outcomes(case.inputs(), plain=lambda **x: plain(case, **x), **functions)


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for part, value in wanted.items():
        np.testing.assert_allclose(found[part], value, rtol=1e-5, atol=1e-5, err_msg=part)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name, implementation):
    assert_close(in_float32(name)[implementation], in_float32(name)["plain"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", JAX_CASES)
def test_equals_jax(name, implementation):
    assert_close(in_float32(name)[implementation], in_float32(name)["jax"])


def test_bfloat16_errs_no_more_than_twice_the_plain_definition():
    case = CASES["everything"]
    rounded = case.inputs(jnp.bfloat16)
    exact = outcomes({n: x.astype(jnp.float32) for n, x in rounded.items()}, plain=lambda **x: plain(case, **x))[
        "plain"
    ]
    functions = {implementation: ours(case, implementation) for implementation in IMPLEMENTATIONS}
    found = outcomes(rounded, plain=lambda **x: plain(case, **x), **functions)
    assert attend(**rounded, mask=case.mask, **case.options).dtype == jnp.bfloat16
    for implementation in IMPLEMENTATIONS:
        for part, value in found[implementation].items():
            error, allowed = (np.sqrt(np.mean((x - exact[part]) ** 2)) for x in (value, found["plain"][part]))
            assert 0 < error <= 2 * allowed, (implementation, part)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["documents with padding", "not", "all but nothing", "nothing", "sinks and nothing"])
def test_queries_that_see_nothing_give_zeros_and_no_gradient(name, implementation):
    seen = np.asarray(visible(CASES[name]))
    blind, unseen = ~seen.any(axis=(1, 3)), ~seen.any(axis=(1, 2))
    found = in_float32(name)[implementation]
    assert blind.any()
    assert all(np.isfinite(value).all() for value in found.values())
    for part, rows in (("result", blind), ("q", blind), ("k", unseen), ("v", unseen)):
        assert not found[part][rows].any(), part


def test_huge_logits_overflow_nothing():
    inputs = {name: x * 300 for name, x in CASES["sinks"].inputs().items()}
    functions = {implementation: ours(CASES["sinks"], implementation) for implementation in IMPLEMENTATIONS}
    for found in outcomes(inputs, **functions).values():
        assert all(np.isfinite(value).all() for value in found.values())
        assert np.abs(found["result"]).max() > 1


@pytest.mark.parametrize("name", ["offset of each sequence", "documents with padding", "everything", "of a user's own"])
def test_split_over_a_mesh(name):
    case = CASES[name]
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"))):
        spec = P("data", None, "tensor", None)
        mask = jax.tree.map(lambda x: jax.device_put(x, P("data")) if isinstance(x, jax.Array) else x, case.mask)
        placed = {n: jax.device_put(x, spec if x.ndim == 4 else P("tensor")) for n, x in case.inputs().items()}
        call = lambda **x: attend(**x, mask=mask, **case.options)  # noqa: E731
        assert jax.typeof(call(**placed)).sharding.spec == spec
        found = outcomes(placed, split=call)["split"]
    assert_close(found, in_float32(name)["plain"])


@pytest.mark.parametrize("name", ["offset of each sequence", "documents with padding"])
def test_masks_must_be_split_like_the_queries(name):
    """Else every device would read the mask of the first sequences."""
    case = CASES[name]
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        placed = {n: jax.device_put(x, P("data")) for n, x in case.inputs().items()}
        mask = jax.tree.map(lambda x: jax.device_put(x, P()) if isinstance(x, jax.Array) else x, case.mask)
        with pytest.raises(ValueError, match=r"like the queries' batch, got None for shape .* and data"):
            attend(**placed, mask=mask)


def test_heads_must_be_split_alike():
    with jax.set_mesh(jax.make_mesh((2,), ("tensor",))):
        x = CASES["sinks"].inputs()
        q = jax.device_put(x["q"], P(None, None, "tensor"))
        k, v = (jax.device_put(x[name], P()) for name in "kv")
        with pytest.raises(ValueError, match="split alike"):
            attend(q, k, v)


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
        attend(*(jnp.zeros(shape) for shape in shapes))


def test_unknown_implementation_names_what_is_close():
    x = jnp.zeros((1, 2, 2, 8))
    with pytest.raises(Exception, match="portable"):
        attend(x, x, x, implementation="portible")  # pyright: ignore[reportArgumentType]


def test_a_numpy_mask_is_split_like_any_other():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 8, 2, 16)) for i in range(3))
    ids: Any = np.array([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 2, 2]], np.int32)
    want = attend(q, k, v, mask=Causal() & Documents(ids, ids))
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        q, k, v = (jax.device_put(x, P("data")) for x in (q, k, v))
        with pytest.raises(ValueError, match="split over the mesh like the queries' batch"):
            attend(q, k, v, mask=Causal() & Documents(ids, ids))
        placed = jax.device_put(ids, P("data"))
        np.testing.assert_allclose(attend(q, k, v, mask=Causal() & Documents(placed, placed)), want, atol=1e-6)

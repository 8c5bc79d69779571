"""Attention on a mesh: split over batch and heads, and along the length, against the definition on one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import CASES, Case, assert_close, bent, ids, numbers, ours, outcomes, plain, random_table
from flaxzoo.layers.kernels.attention import attend, context
from flaxzoo.layers.kernels.attention import pair_function as pairs
from flaxzoo.layers.kernels.attention.masks import BlockSparse, Causal, Dense, Documents, Full, Lengths, Window
from flaxzoo.layers.kernels.attention.scores import Alibi, RelativeBias, SoftCap
from jax.sharding import PartitionSpec as P

pytestmark = pytest.mark.usefixtures("quick_compiler")


@functools.cache
def definition(name: str) -> dict[str, np.ndarray]:
    """The result and the gradients of a case by the plain definition."""
    case = CASES[name]
    return outcomes(case.inputs(), plain=functools.partial(plain, case))["plain"]


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
    assert_close(found, definition(name))


def test_masks_of_arrays_split_like_the_batch():
    case = CASES["documents with padding"]
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        placed = {n: jax.device_put(x, P("data")) for n, x in case.inputs().items()}
        for place in (P("data"), P()):
            mask = Causal() & Documents(jax.device_put(ids(45, 10, 29, 40), place))
            found = jax.jit(lambda x, mask: attend(**x, mask=mask))(placed, mask)
            np.testing.assert_allclose(found, definition("documents with padding")["result"], atol=1e-5)


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

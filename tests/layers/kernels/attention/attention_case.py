"""Cases of attention, the plain definition of it, and ways to run `attend`: shared by the tests of this folder."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.kernels.attention import attend, dropout, portable
from flaxzoo.layers.kernels.attention.masks import (
    BlockSparse,
    Causal,
    Chunked,
    Dense,
    Documents,
    Full,
    GlobalTokens,
    Lengths,
    Mask,
    PerHead,
    Prefix,
    Where,
    Window,
)
from flaxzoo.layers.kernels.attention.scores import Alibi, RelativeBias, SoftCap
from flaxzoo.layers.kernels.attention.tpu import backward as tpu_backward
from flaxzoo.layers.kernels.attention.tpu import forward as tpu_forward
from flaxzoo.layers.kernels.attention.tpu import implementation as tpu


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int, int, int]
    """T, S, N, K, H, Hv; B is 2."""
    mask: Mask = field(default_factory=Causal)
    options: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of more arrays: `sinks`, or what `score` is made of."""
    score: Callable[..., Any] | None = None
    """From the parameters to a score function."""

    def inputs(self, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        t, s, n, k, h, hv = self.shape
        shapes = {"q": (2, t, n, h), "k": (2, s, k, h), "v": (2, s, k, hv)} | self.parameters
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return {
            name: jax.random.normal(key, shapes[name]).astype(dtype if name in "qkv" else jnp.float32)
            for key, name in zip(keys, shapes, strict=True)
        }


def ids(length: int, *ends: int) -> jax.Array:
    """Two rows of documents 1, 2, ... that end at these places, the second row's 3 earlier; then padding."""
    rows = [np.searchsorted(np.array(ends) - shift, np.arange(length), side="right") + 1 for shift in (0, 3)]
    return jnp.asarray([np.where(row > len(ends), 0, row) for row in rows], jnp.int32)


def numbers(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def random_table(*shape: int, share: float) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random(shape) < share)


def strided(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A mask of a user's own, different in every head."""
    return ((query - key) % (head + 2) == 0) | (key == head)


def bent(slopes: Any, rows: Any, columns: Any) -> Any:
    """A score of a user's own, with parameters for heads, queries and keys."""

    def score(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        far = (query - key).astype(jnp.float32)
        return jnp.sin(score) * jnp.exp(slopes[head] * far * 0.01) + rows[batch, query] * columns[head, key]

    return score


def positive_alibi(slopes: Any) -> Alibi:
    """The farther, the less: else a gradient is the difference of sums thousands of times as large."""
    return Alibi(jnp.abs(slopes))


def divided(rows: Any, columns: Any) -> Any:
    """A score that is no number where zeros stand in for a query or a key that is not there."""
    return lambda score, batch, head, query, key: score / (1 + jnp.abs(rows[query])) / (1 + jnp.abs(columns[key]))


SQUARE = (45, 45, 4, 2, 16, 16)
LONG = (23, 70, 4, 2, 16, 16)
DOCUMENTS = Causal() & Documents(ids(45, 10, 29, 40))
CASES = {
    "one": Case((1, 1, 1, 1, 8, 8)),
    "heads apart, odd": Case((37, 37, 3, 3, 40, 40)),
    "groups of 2, whole blocks": Case((64, 64, 4, 2, 64, 64)),
    "groups of 4": Case((33, 33, 8, 2, 80, 80)),
    "multi-query": Case((35, 35, 4, 1, 16, 16)),
    "narrow values": Case((34, 34, 4, 2, 40, 24)),
    "wide values": Case((33, 33, 4, 2, 8, 40)),
    "large heads": Case((17, 17, 2, 1, 192, 128)),
    "full": Case(SQUARE, Full()),
    "decoding": Case((1, 70, 4, 2, 16, 16), options={"query_offset": 55}),
    "decoding, each sequence and head its own": Case(
        (3, 70, 8, 2, 16, 24),
        PerHead((Causal(), Causal() & Window(9)), (0, 1, 1, 0) * 2) & Lengths(keys=numbers(50, 70)),
        {"query_offset": numbers(5, 60), "dropout_rate": 0.3, "dropout_seed": 5},
        {"sinks": (8,), "slopes": (8,)},
        positive_alibi,
    ),
    "decoding, keys with a score for each head": Case(
        (2, 40, 4, 2, 16, 16),
        options={"query_offset": 30},
        parameters={"slopes": (4,), "rows": (2, 32), "columns": (4, 40)},
        score=bent,
    ),
    "offset": Case(LONG, options={"query_offset": 40}),
    "offset of each sequence": Case(LONG, Causal() & Window(12), {"query_offset": numbers(0, 40)}),
    "fewer keys than queries": Case((45, 20, 4, 2, 16, 16)),
    "window": Case(SQUARE, Causal() & Window(9)),
    "both hoisted": Case(SQUARE, Window(9, 5)),
    "window, offset": Case(LONG, Causal() & Window(9), {"query_offset": 40}),
    "chunks": Case(SQUARE, Causal() & Chunked(11)),
    "prefix": Case(SQUARE, Causal() | Prefix(numbers(5, 31))),
    "documents with padding": Case(SQUARE, DOCUMENTS),
    "lengths": Case(SQUARE, Lengths(numbers(45, 9), numbers(20, 45))),
    "global tokens": Case(SQUARE, Causal() & (GlobalTokens(3) | Window(7))),
    "marked tokens": Case(SQUARE, GlobalTokens(random_table(2, 45, share=0.1)) | Window(4, 4)),
    "blocks": Case(SQUARE, Causal() & BlockSparse(random_table(1, 4, 6, 6, share=0.4), 8)),
    "dense": Case(SQUARE, Dense(random_table(2, 1, 45, 45, share=0.2))),
    "per head": Case(SQUARE, PerHead((Causal(), Causal() & Window(5)), (0, 1, 1, 0))),
    "either": Case(SQUARE, (Causal() & Window(8)) | (~Causal() & Window(1, 3))),
    "not": Case(SQUARE, Causal() & ~Window(8)),
    "nothing in one sequence": Case(SQUARE, Lengths(numbers(45, 0))),
    "of a user's own": Case(SQUARE, Causal() & Where(strided)),
    "documents of a user's own": Case(SQUARE, Where(lambda b, h, q, k: (OWN[b, q] == OWN[b, k]) & (k <= q))),
    "soft cap": Case(SQUARE, score=lambda: SoftCap(1.5)),
    "alibi": Case(SQUARE, DOCUMENTS, {"query_offset": 0}, {"slopes": (4,)}, Alibi),
    "alibi, offset": Case(LONG, Causal(), {"query_offset": numbers(40, 3)}, {"slopes": (4,)}, positive_alibi),
    "relative bias": Case(
        SQUARE, parameters={"table": (4, 12)}, score=lambda table: RelativeBias(table, max_distance=30)
    ),
    "relative bias, both ways": Case(
        SQUARE, Full(), {}, {"table": (4, 12)}, lambda table: RelativeBias(table, True, 30)
    ),
    "score of a user's own": Case(
        SQUARE, Causal() & Window(30), {}, {"slopes": (4,), "rows": (2, 45), "columns": (4, 45)}, bent
    ),
    "a score that divides": Case(SQUARE, parameters={"rows": (45,), "columns": (45,)}, score=divided),
    "sinks": Case(SQUARE, parameters={"sinks": (4,)}),
    "sinks and nothing": Case(SQUARE, Lengths(numbers(45, 0)), parameters={"sinks": (4,)}),
    "scale": Case(SQUARE, options={"scale": 0.7}),
    "dropout": Case(SQUARE, DOCUMENTS, {"dropout_rate": 0.3, "dropout_seed": 5}),
    "everything": Case(
        SQUARE,
        Causal() & Window(20) & ~Window(3) & Documents(ids(45, 10, 29, 40)),
        {"scale": 0.5, "dropout_rate": 0.2, "dropout_seed": 7},
        {"sinks": (4,), "slopes": (4,)},
        lambda slopes: lambda score, *index: SoftCap(2.0)(Alibi(slopes)(score, *index)),
    ),
}
OWN = ids(45, 10, 29, 40)


def indices(case: Case) -> list[jax.Array]:
    """Of batch, head, query (its position) and key, to broadcast to B N T S."""
    t, s, n = case.shape[:3]
    batch, head, query, key = (jnp.arange(x).reshape(-1, *(1,) * (3 - dim)) for dim, x in enumerate((2, n, t, s)))
    offset = jnp.asarray(case.options.get("query_offset", 0))
    return [batch, head, query + offset.reshape(-1, 1, 1, 1), key]


def visible(case: Case) -> jax.Array:
    """B N T S."""
    t, s, n = case.shape[:3]
    return jnp.broadcast_to(case.mask.visible(*indices(case)), (2, n, t, s))


def plain(case: Case, q: Any, k: Any, v: Any, sinks: Any = None, **parameters: Any) -> jax.Array:
    """The definition, one key/value head for every query head, in the dtype of the inputs but for the softmax.

    What dropout keeps is taken from the hash that attend uses; test_dropout.py looks at that.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k).astype(jnp.float32) * case.options.get("scale", q.shape[-1] ** -0.5)
    if case.score is not None:
        wide = jnp.broadcast_arrays(logits, *indices(case))
        score = jax.vmap(case.score(**parameters))
        logits = score(*(x.reshape(-1) for x in wide)).reshape(logits.shape)
    seen = visible(case)
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, -1, keepdims=True), -1e30))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(jnp.minimum(sinks.astype(jnp.float32)[:, None, None] - top, 80.0))
    weights = weights / jnp.where(total == 0, 1.0, total)
    rate = case.options.get("dropout_rate", 0.0)
    if rate:
        batch, _, query, key = indices(case)
        rows = dropout.rows(jnp.int32(case.options["dropout_seed"]), 2, q.shape[2])[..., None]
        weights = jnp.where(dropout.kept(rows, query + 0 * batch, key, rate), weights / (1 - rate), 0.0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v.dtype), v)


def outcomes(inputs: dict[str, jax.Array], **functions: Any) -> dict[str, dict[str, np.ndarray]]:
    """Of each function its result, and the gradient in every input for a fixed random cotangent."""

    def outcome(function: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        result, back = jax.vjp(lambda inputs: function(**inputs), inputs)
        cotangent = jax.random.normal(jax.random.key(9), result.shape).astype(result.dtype)
        spec = jax.typeof(result).sharding.spec
        cotangent = cotangent if all(axis is None for axis in spec) else jax.reshard(cotangent, spec)
        return {"result": result} | back(cotangent)[0]

    found = {}
    for name, function in functions.items():
        with getattr(function, "context", contextlib.nullcontext)():  # kernels are traced when a program is lowered
            run = functools.partial(outcome, function)
            found[name] = run(inputs) if getattr(function, "eager", False) else jax.jit(run)(inputs)
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), found)


def ours(case: Case, variant: str, **more: Any) -> Any:
    """`attend` on this case, by an implementation of VARIANTS, to be compiled in the context of that."""
    context = (VARIANTS | DEFAULT)[variant]

    def call(q: Any, k: Any, v: Any, sinks: Any = None, **parameters: Any) -> Any:
        score = None if case.score is None else case.score(**parameters)
        with context():
            return attend(
                q,
                k,
                v,
                mask=case.mask,
                score=score,
                sinks=sinks,
                implementation=None if variant == "default" else variant.split()[0],  # pyright: ignore
                **case.options,
                **more,
            )

    call.context = context  # pyright: ignore[reportFunctionMemberAccess]
    return call


@contextlib.contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Portable attention in blocks of so many queries and keys."""
    before, portable.BLOCK = portable.BLOCK, size
    try:
        yield
    finally:
        portable.BLOCK = before


@contextlib.contextmanager
def tpu_blocks(block_q: int, block_k: int, strip: int, in_vmem: bool) -> Iterator[None]:
    """The kernels for TPU, interpreted, in such blocks; what a head needs is held in VMEM or streamed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "sizes", lambda *_: tpu.BlockSizes(block_q, block_k, strip))
        if not in_vmem:
            patch.setattr(tpu_forward, "RESIDENT_SHARE", 0.0)
            patch.setattr(tpu_backward, "RESIDENT_SHARE", 0.0)
        yield


DEFAULT = {"default": contextlib.nullcontext}
VARIANTS: dict[str, Any] = {
    "reference": contextlib.nullcontext,
    "portable": contextlib.nullcontext,
    "portable in blocks": functools.partial(blocks_of, 16),
    "tpu": functools.partial(tpu_blocks, 16, 16, 8, True),
    "tpu streamed": functools.partial(tpu_blocks, 16, 32, 16, False),
}


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for part, value in wanted.items():
        # A parameter's gradient is a sum over all pairs, in another order: its terms are as large as they are many.
        size = 1.0 if part in ("result", "q", "k", "v") else max(1.0, np.abs(value).max())
        np.testing.assert_allclose(found[part], value, rtol=1e-5, atol=1e-5 * size, err_msg=part)


def errs_no_more_than_twice(case: Case, dtype: Any, functions: dict[str, Any], calls: int = 2) -> None:
    """As the plain definition in this precision; and a second call gives the same bits, if there is one."""
    rounded = case.inputs(dtype)
    with jax.default_matmul_precision("highest"):
        exact = outcomes({n: x.astype(jnp.float32) for n, x in rounded.items()}, plain=functools.partial(plain, case))
    found, *more = (outcomes(rounded, plain=functools.partial(plain, case), **functions) for _ in range(calls))
    for name in functions:
        for part, value in found[name].items():
            error, allowed = (np.sqrt(np.mean((x - exact["plain"][part]) ** 2)) for x in (value, found["plain"][part]))
            assert error <= 2 * allowed, (name, part)
            for again in more:
                np.testing.assert_array_equal(value, again[name][part], err_msg=f"{name} {part}")

"""The kernels for TPU, compiled by the compiler of real TPUs, and looked over for races by Pallas's interpreter."""

import functools
import itertools
import json
import re
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import Case, assert_close, bent, numbers, ours, outcomes, plain, tpu_blocks
from flaxzoo.layers.kernels.attention import attend
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
    Where,
    Window,
)
from flaxzoo.layers.kernels.attention.scores import SoftCap
from flaxzoo.layers.kernels.attention.tpu import backward as tpu_backward
from flaxzoo.layers.kernels.attention.tpu import implementation as tpu
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

attend_module = sys.modules["flaxzoo.layers.kernels.attention.attend"]
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64 alone")
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclass(frozen=True)
class Shape:
    mask: Mask = field(default_factory=Causal)
    length: int = 2048
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (128, 128)
    dtype: Any = jnp.bfloat16
    documents: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def random_table(cells: int) -> Any:
    """Made by numpy: nothing may run on the devices that are compiled for."""
    return np.random.default_rng(0).random((1, 1, cells, cells)) < 0.3


def parameters(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A score with parameters of each head, query and key, which get gradients whether they are asked for or not."""
    slope, rows = np.linspace(0, 1, 4, dtype=np.float32), np.linspace(0, 1, 32768, dtype=np.float32)
    far = (query - key).astype(jnp.float32)
    return score * jnp.asarray(rows)[query] + jnp.sin(jnp.asarray(slope)[head] * far) + jnp.asarray(rows)[key]


SHAPES = {
    "causal": Shape(),
    "full": Shape(Full()),
    "window": Shape(Causal() & Window(512)),
    "documents": Shape(documents=True),
    "soft cap": Shape(options={"score": SoftCap(30.0)}),
    "chunks": Shape(Causal() & Chunked(1000)),
    "holes": Shape(Causal() & (GlobalTokens(5) | Window(20))),
    "head dim 64": Shape(dims=(64, 64)),
    "head dim 256": Shape(dims=(256, 256)),
    "MLA": Shape(heads=(4, 4), dims=(192, 128)),
    "float32": Shape(dtype=jnp.float32, length=1024),
    "odd": Shape(length=1000, dims=(80, 80)),
    "streamed": Shape(length=32768, heads=(2, 1)),
    "blocks": Shape(Causal() & BlockSparse(random_table(32), 64)),
    "dense": Shape(Dense(random_table(1024)), length=1024),
    "dropout": Shape(options={"dropout_rate": 0.1, "dropout_seed": 3}),
    "parameters": Shape(options={"score": parameters}),
    "parameters, streamed": Shape(length=32768, heads=(2, 1), options={"score": parameters}),
    "float16": Shape(dtype=jnp.float16, length=1024),
}
QUICK = [
    ("v5e", "documents"),
    ("v6e", "MLA"),
    ("tpu7x", "window"),
    ("v5e", "streamed"),
    ("v6e", "blocks"),
    ("v5p", "dropout"),
]


def devices_of(chip: str, count: int, axis: str) -> Mesh:
    """So many devices of a chip, that are there to compile for."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    return Mesh(np.array(devices[:count]), (axis,), axis_types=(AxisType.Explicit,))


def compiled(chip: str, shape: Shape) -> Any:
    """The gradient of attention, for a chip."""
    mesh = devices_of(chip, 1, "x")

    def of(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(q: Any, k: Any, v: Any, ids: Any) -> Any:
        mask = shape.mask & Documents(ids) if shape.documents else shape.mask
        return jnp.sum(attend(q, k, v, mask=mask, **shape.options).astype(jnp.float32))

    (heads, kv_heads), (size, value_size), t = shape.heads, shape.dims, shape.length
    arrays = [of(shape.dtype, 1, t, n, h) for n, h in ((heads, size), (kv_heads, size), (kv_heads, value_size))]
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays, of(jnp.int32, 1, t))
        return traced.lower(lowering_platforms=("tpu",)).compile()


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "name"),
    [
        pytest.param(chip, name, marks=() if (chip, name) in QUICK else pytest.mark.slow)
        for chip in TOPOLOGIES
        for name in SHAPES
    ],
)
def test_compiles_for(chip: str, name: str) -> None:
    program = compiled(chip, SHAPES[name])
    text = program.as_text()
    assert "attention_forward" in text
    assert "attention_backward" in text
    shape = SHAPES[name]
    queries = 4 * shape.length * shape.heads[0] * 256  # in float32 and the widest heads
    assert program.memory_analysis().temp_size_in_bytes < 3 * queries < 4 * shape.heads[0] * shape.length**2


@needs_libtpu
@pytest.mark.parametrize(
    "chip", ["v5e", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5p", "v6e", "tpu7x"))]
)
def test_decoding_copies_no_cache(chip: str) -> None:
    """A cache in the order B K S H is what the kernel reads."""
    mesh = devices_of(chip, 1, "x")

    def of(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def decode(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        def step(_: Any, state: Any) -> Any:
            q, k, v, lengths = state
            out = attend(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask=Causal(), query_offset=lengths)
            put = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
            k, v = put(k, q[:, 0, :8, None], lengths, 1), put(v, out[:, 0, :8, None], lengths, 1)
            return q + out, k, v, lengths + 1

        return jax.lax.fori_loop(0, 16, step, (q, k, v, lengths))

    shapes = of(jnp.bfloat16, 8, 1, 32, 128), *[of(jnp.bfloat16, 8, 8, 8192, 128)] * 2, of(jnp.int32, 8)
    with jax.set_mesh(mesh):
        traced = jax.jit(decode, donate_argnums=(1, 2)).trace(*shapes)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text() or ""
    (body,) = (part for part in text.split("\n\n") if re.search(r"%attention_forward\S* = .* custom-call\(", part))
    assert "bf16[8,8,8192,128]" in body
    assert not re.search(r"= bf16\[8,(8,8192|8192,8),128\]\S* (copy|transpose)\(", body)


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", pytest.param("tpu7x", marks=pytest.mark.slow)])
def test_in_a_ring_keys_travel_while_a_kernel_runs(chip: str) -> None:
    mesh = devices_of(chip, 4, "context")
    place = NamedSharding(mesh, PartitionSpec(None, "context"))
    shapes = [jax.ShapeDtypeStruct((1, 8192, n, 128), jnp.bfloat16, sharding=place) for n in (4, 2, 2)]

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(attend(q, k, v, mask=Causal(), context_axis="context").astype(jnp.float32))

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text() or ""
    assert "all-gather" not in text
    kernels = r"%(attention_\w+)\.\d+ = .* custom-call\("
    bodies = [
        body for body in re.findall(r"^%.*? \{$.*?^\}$", text, re.MULTILINE | re.DOTALL) if re.search(kernels, body)
    ]
    assert sorted(name for body in bodies for name in re.findall(kernels, body)) == [
        "attention_backward",
        "attention_forward",
    ]
    for body, arrays in zip(bodies, (3, 5), strict=True):  # k, v and positions; and the gradients of k and v
        events = re.findall(r"= .* (collective-permute-start|custom-call|collective-permute-done)\(", body)
        events = [event.removeprefix("collective-permute-") for event in events]
        assert [event for event, _ in itertools.groupby(events)] == ["start", "custom-call", "done"]
        assert events.count("start") == events.count("done") == arrays


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p", "v6e"])
@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(4096)], ids=str)
def test_a_million_tokens_compile_for(chip: str, mask: Mask) -> None:
    memory = compiled(chip, Shape(mask, length=2**20, heads=(8, 1))).memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    print(f"{chip} {mask}: {used / 2**30:.1f} GiB, of which temporary {memory.temp_size_in_bytes / 2**30:.1f}")
    assert used < {"v5p": 95, "v6e": 31}[chip] * 2**30


RACES = {
    "causal": Case((60, 60, 4, 2, 16, 16)),
    "holes, and queries that see nothing": Case(
        (60, 60, 4, 2, 16, 16), (GlobalTokens(5) | Window(4)) & Lengths(40, 60)
    ),
    "decoding": Case((3, 60, 4, 2, 16, 16), Causal() & ~Window(3), {"query_offset": numbers(0, 50)}),
    "everything": Case(
        (60, 60, 4, 2, 16, 16),
        Causal() & BlockSparse(random_table(8), 8),
        {"dropout_rate": 0.2, "dropout_seed": 1},
        {"slopes": (4,), "rows": (2, 60), "columns": (4, 60)},
        bent,
    ),
}


QUICK_RACES = [("causal", "streamed"), ("everything", "resident"), ("decoding", "resident")]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param(name, where, marks=() if (name, where) in QUICK_RACES else pytest.mark.slow)
        for name in RACES
        for where in ("resident", "streamed")
    ],
)
def test_kernels_have_no_races(monkeypatch: pytest.MonkeyPatch, name: str, where: str) -> None:
    """Pallas's interpreter carries copies out as a TPU would, and notices what is read before it is there.

    Rows have up to four blocks, so that every buffer is used again; with two sequences, a program's copies begin in the
    one before.
    """
    case = RACES[name]
    inputs = case.inputs()
    rest = {name: x for name, x in inputs.items() if name not in "qkv"}
    q, k, v = (inputs[name] for name in "qkv")
    wanted, back = jax.vjp(lambda q, k, v: ours(case, "portable")(q, k, v, **rest), q, k, v)
    taken: list[Any] = []

    def take(functions: Any, arguments: Any, like: Any, **_: Any) -> Any:
        taken.extend([functions["default"].args[0], *arguments])
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    with monkeypatch.context() as patch:
        patch.setattr(attend_module, "by_platform", take)
        ours(case, "tpu")(**inputs)
    problem, operands = taken
    interpret = pltpu.InterpretParams(detect_races=True)  # which raises where there is one
    g = jax.random.normal(jax.random.key(9), wanted.shape)
    with tpu_blocks(16, 16, 8, where == "resident"):
        out, lse = jax.jit(lambda operands: tpu.forward(problem, operands, interpret=interpret))(operands)
        delta = jnp.einsum("BTNV,BTNV->BNT", out, g)
        grads = jax.jit(lambda *x: tpu.backward(problem, *x, interpret=interpret))(operands, lse, delta, g)
    for found, expected in zip((out, *grads[:3]), (wanted, *back(g)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("together", "cores"), [(2, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, 1), (1, 2), (2, 1)])]
)
def test_heads_that_share_keys_pass_by_in_parts(monkeypatch: pytest.MonkeyPatch, together: int, cores: int) -> None:
    """Where dq of all of them does not fit into VMEM; on a chip of two cores no copy begins in another's program."""
    case = Case((60, 60, 4, 1, 16, 16), Causal(), {}, {"slopes": (4,), "rows": (2, 60), "columns": (4, 60)}, bent)
    monkeypatch.setattr(tpu_backward, "_together", lambda *_: (together, 1))
    monkeypatch.setattr(tpu, "sizes", lambda *_: tpu.BlockSizes(16, 16, 8, cores=cores))
    found = outcomes(case.inputs(), ours=lambda **x: ours(case, "tpu")(**x))["ours"]  # in the blocks set here
    assert_close(found, outcomes(case.inputs(), plain=functools.partial(plain, case))["plain"])


def test_decoding_in_the_blocks_it_has() -> None:
    """A cache of more than one of the larger blocks that decoding takes; nothing is patched."""
    case = Case((2, 2300, 8, 2, 64, 64), Causal() & Window(2200), {"query_offset": numbers(5, 2250)})
    inputs = case.inputs()
    found = jax.jit(lambda x: attend(**x, mask=case.mask, implementation="tpu", **case.options))(inputs)
    np.testing.assert_allclose(found, plain(case, **inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_tables_of_several_words_a_strip(size: int) -> None:
    cells = -(-150 // size)
    mask = Dense(random_table(cells)) if size == 1 else BlockSparse(random_table(cells), size)
    case = Case((150, 150, 2, 1, 16, 16), Causal() & mask)
    with tpu_blocks(64, 128, 64, True):
        found = outcomes(case.inputs(), ours=lambda **x: attend(**x, mask=case.mask, implementation="tpu"))["ours"]
    assert_close(found, outcomes(case.inputs(), plain=functools.partial(plain, case))["plain"])


def test_vmap_lowers_for_tpu() -> None:
    """One by one: blocks of HBM are taken as they are, without one more dimension."""

    def each(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(attend(q[None], k[None], v[None], mask=Causal(), query_offset=jnp.int32(9)) ** 2)

    shapes = [jax.ShapeDtypeStruct((2, *shape), jnp.float32) for shape in ((1, 4, 128), (2048, 1, 128), (2048, 1, 128))]
    mapped = jax.jit(jax.vmap(jax.value_and_grad(each, (0, 1, 2))))
    text = mapped.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert "attention_forward" in text
    assert "attention_backward" in text


def test_vmap_of_kernels_equals_one_by_one() -> None:
    case = Case((3, 40, 4, 2, 16, 16), options={"query_offset": 30})

    def one(q: Any, k: Any, v: Any) -> Any:
        out = attend(q[None], k[None], v[None], mask=case.mask, implementation="tpu", **case.options)
        return jnp.sum(jnp.sin(out))

    inputs = case.inputs()
    found = jax.jit(jax.vmap(jax.grad(one, (0, 1, 2))))(*inputs.values())
    wanted = jax.grad(lambda *x: sum(one(*(a[row] for a in x)) for row in (0, 1)), (0, 1, 2))(*inputs.values())
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_blocks_that_ship_are_the_fastest_of_those_tried() -> None:
    """The table of the kernels is the tuner's finding, for each chip, head dim and pass."""
    kinds = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    rows = json.loads(Path("benchmarks/results/attention_blocks.json").read_text())["found"]["blocks"]
    assert {(row["chip"], row["dims"]) for row in rows} == set(
        itertools.product(kinds, ("64", "128", "192/128", "256"))
    )
    for row in rows:
        ships = tpu.CHIPS.get(kinds[row["chip"]], tpu.USUAL)
        settings = {name: getattr(ships, name) for name in ("block_q", "block_k", "strip")}
        times = {tuple(each["settings"].items()): each["us"] for each in row["tried"] if "us" in each}
        assert times[tuple(settings.items())] <= 1.01 * min(times.values()), row


@needs_libtpu
def test_pairs_are_not_evaluated_on_devices_that_exist_only_to_compile_for() -> None:
    """A mask of operations without an interval rule, under the mesh of a topology."""
    mesh = devices_of("v5e", 1, "x")
    x = jax.ShapeDtypeStruct((1, 600, 1, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    mask = Where(lambda b, h, q, k: ((q ^ k) >> 3) < 9)
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(lambda x: jnp.sum(attend(x, x, x, mask=mask).astype(jnp.float32)))).trace(x)
        assert "attention_backward" in traced.lower(lowering_platforms=("tpu",)).as_text()

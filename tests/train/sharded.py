"""Small runs on meshes: what comes of them, and what their devices exchange."""

import functools
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
from flax import nnx
from flaxzoo.configs import Run, models
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.step import Batch, _gradients
from flaxzoo.zoo import MLA, GatedMLP, MoE, Router
from flaxzoo.zoo.parameters import describe, shardings, split

B, T, D = 16, 32, 32


@functools.cache
def run_of(kind: str) -> Run:
    """Two layers; heads, features, vocabulary and experts can all be split."""
    model = models.small(vocab=304, dim=D, layers=2, heads=8, kv_heads=8, hidden=64, tied=kind != "gqa")
    if kind in ("gqa", "moe"):
        model = model.replace(**{"block.0.mixer.kv_heads": 4})
    if kind == "moe":
        expert = GatedMLP(hidden=24)
        ffn = MoE(experts=8, expert=expert, router=Router(top_k=2), shared=GatedMLP(hidden=64))
        model = model.replace(block=(model.block[0].replace(ffn=ffn),))
    if kind == "mla":
        mixer = MLA(heads=8, kv_rank=16, nope_dim=4, rope_dim=4, value_dim=4, query_rank=16)
        model = model.replace(block=(model.block[0].replace(mixer=mixer),))
    return Run(model=model, batch=B, length=T, mesh="fsdp=1", steps=3)


def rows(run: Run) -> dict[str, np.ndarray]:
    """Random tokens, in documents and with weights of all sorts."""
    source = np.random.default_rng(0)
    shape = (run.batch, run.length)
    begins = source.random(shape) < 0.1
    begins[:, 0] = True
    time = np.arange(run.length)
    named = {
        "tokens": source.integers(0, 304, shape),
        "targets": source.integers(0, 304, shape),
        "segments": np.cumsum(begins, axis=-1),
        "positions": time - np.maximum.accumulate(np.where(begins, time, 0), axis=-1),
    }
    named = {name: x.astype(np.int32) for name, x in named.items()}
    return named | {"weights": source.random(shape).astype(np.float32)}


def outcome(run: Run, named: dict[str, np.ndarray] | None = None) -> tuple[Any, str]:
    """Loss, likelihood and gradients on the mesh of a run, of a batch or of `rows`, and the compiled program."""
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        places = shardings(describe(run.model.abstract()), mesh)
        fresh = split(run.model.build(rngs=nnx.Rngs(0)))
        params = {name: jax.device_put(np.asarray(x), places[name]) for name, x in fresh.items()}
        batch: Batch = meshes.place(rows(run) if named is None else named, mesh)
        program = jax.jit(functools.partial(_gradients, run, run.model.abstract())).lower(params, batch).compile()
        found = program(params, batch)
        for name, gradient in found[2].items():
            assert gradient.sharding.is_equivalent_to(places[name], gradient.ndim), name
    text = program.as_text()
    assert text is not None
    return jax.device_get(found[:3]), text


@functools.cache
def alone(kind: str) -> Any:
    return outcome(run_of(kind))[0]


Moved = dict[str, Counter[tuple[int, ...]]]


def collectives(text: str) -> Moved:
    """The shapes of what each kind of collective gives, in the program of one device."""
    found: Moved = {}
    pattern = r"= (\(.*?\)|\S+) (all-\w+(?:-to-all)?|reduce-scatter|collective-permute|ragged-all-to-all)(?:-start)?\("
    for results, name in re.findall(pattern, text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", results)
        found.setdefault(name, Counter()).update(tuple(int(n) for n in shape.split(",") if n) for shape in shapes)
    return found


def matrices(run: Run, *, but: str = " ") -> set[tuple[int, ...]]:
    """The shapes of the matrices of a layer, and of the embedding."""
    known = describe(run.model.abstract())
    kept = [what for name, what in known.items() if what.inputs and but not in name]
    shapes = [what.shape[what.axes.split().count("L") :] for what in kept]
    return {shape for shape in shapes if len(shape) > 1}


def small(shapes: Counter[tuple[int, ...]], most: int) -> bool:
    """Whether all of these have few numbers."""
    return all(np.prod(shape) <= most for shape in shapes)


def assert_same(found: Any, expected: Any) -> None:
    """Loss, likelihood and every gradient to 1e-5."""
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-5)
    for name, gradient in found[2].items():
        scale = np.abs(expected[2][name]).max()
        np.testing.assert_allclose(gradient, expected[2][name], rtol=0, atol=1e-5 * scale, err_msg=name)

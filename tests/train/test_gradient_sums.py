"""Gradients of the whole step in bfloat16 against float32, over thousands of rows, on meshes and stages."""

import functools
from typing import Any

import numpy as np
import pytest
from flaxzoo.configs import Run
from flaxzoo.zoo import MLP, LayerNorm, MoE, Router
from sharded import D, outcome, rows, run_of

pytestmark = pytest.mark.usefixtures("quick_compiler")


@functools.cache
def skewed() -> tuple[Run, dict[str, np.ndarray]]:
    """Biases and learned positions everywhere, every expert chosen, and one token nine times of ten."""
    run = run_of("gqa").replace(batch=128, length=32)
    experts = MoE(experts=2, expert=MLP(hidden=16), router=Router(top_k=2))
    block = run.model.block[0].replace(
        **{"mixer.bias": True, "mixer.output_bias": True, "ffn": experts, "norm": LayerNorm()}
    )
    run = run.replace(model=run.model.replace(block=(block,), dim=D, max_positions=32))
    frequent = np.random.default_rng(1).random((run.batch, run.length)) < 0.9
    batch = rows(run)
    return run, batch | {name: np.where(frequent, 7, batch[name]).astype(np.int32) for name in ("tokens", "targets")}


@functools.cache
def in_float32() -> Any:
    return outcome(*skewed())[0][2]


@pytest.mark.parametrize(
    "mesh", ["pipeline=2,expert=2,tensor=2", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)]
)
def test_gradients_are_summed_in_float32(mesh: str) -> None:
    run, batch = skewed()
    run = run.replace(mesh=mesh, dtype="bfloat16", accumulate=4 if "pipeline" in mesh else 1)
    for parameter, gradient in outcome(run, batch)[0][2].items():
        expected = in_float32()[parameter]
        error = np.abs(gradient - expected)
        largest = np.abs(expected).argmax()
        assert np.linalg.norm(error) < 0.025 * np.linalg.norm(expected), parameter
        assert error.flat[largest] < 0.025 * np.abs(expected).max(), parameter

"""What makes a step faster or smaller, compiled for real TPUs: 8 bits, the host's memory, collectives beside."""

import re
from importlib.util import find_spec
from typing import Any

import jax
import pytest
from flaxzoo import configs
from flaxzoo.configs import Run, models
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.plan.chips import chips, compiler_options
from flaxzoo.train.plan.plan import devices_of
from flaxzoo.train.step import abstract_batch, abstract_state, make_evaluation, make_step
from flaxzoo.zoo import GatedMLP, MoE, Router

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64 alone")


def small_run(**changes: Any) -> Run:
    return configs.get_run("bench_cpu").replace(
        **{"model.layers": 4, "length": 256, "batch": 8, "dtype": "bfloat16", "mesh": "fsdp=1"} | changes
    )


def compiled(run: Run, topology: str) -> tuple[str, Any]:
    """The text of the step of a run, and its memory."""
    mesh, _ = meshes.make(run, devices_of(topology))
    with jax.set_mesh(mesh):
        step: Any = make_step(run)
        program = step.trace(abstract_state(run, mesh), abstract_batch(run, mesh)).lower().compile()
    return program.as_text(), program.memory_analysis()


@needs_libtpu
@pytest.mark.slow
def test_products_in_8_bits_and_blocks_kept_by_the_host() -> None:
    text, memory = compiled(small_run(quantize="int8", remat="full_offload"), "v5e:1x1")
    assert text.count("= s8[") > 3 * 7  # both sides of three products with seven weights; some share a fusion
    inputs = 4 * 8 * 256 * small_run().model.dim * 2  # of four blocks, in bfloat16
    assert inputs <= memory.host_temp_size_in_bytes < 1.1 * inputs


@needs_libtpu
def test_what_is_gathered_on_v6e_is_gathered_by_the_sparse_cores() -> None:
    text, _ = compiled(small_run(mesh="fsdp=4", remat="full"), "v6e:2x2")
    gathers = re.findall(r"%all-gather\S*call-start = .*", text)
    assert len(gathers) >= 7
    assert all('async_execution_thread="sparsecore"' in line for line in gathers)


def test_options_are_for_several_devices_of_a_tpu() -> None:
    assert compiler_options() == {}
    with jax.set_mesh(jax.make_mesh((8,), ("fsdp",))):
        assert compiler_options() == {}
    if find_spec("libtpu"):
        for topology, options in (("v6e:1x1", {}), ("v6e:2x2", chips()["TPU v6 lite"].options), ("v5e:2x2", {})):
            devices = devices_of(topology)
            with jax.set_mesh(jax.make_mesh((len(devices),), ("fsdp",), devices=devices)):
                assert compiler_options() == options
    assert chips()["TPU v6 lite"].options


def test_experts_are_not_in_8_bits() -> None:
    model = models.small()
    block = model.block[0].replace(ffn=MoE(experts=4, expert=GatedMLP(hidden=64), router=Router(top_k=2)))
    with pytest.raises(ValueError, match="experts have no matmuls in 8 bits, got quantize='fp8'; leave it at 'none'"):
        small_run().replace(model=model.replace(block=(block,)), quantize="fp8")


@pytest.mark.parametrize("first", ["evaluation", "training"])
def test_evaluation_is_not_in_8_bits_whichever_comes_first(first: str) -> None:
    """JAX keeps what it traced of a function: blocks outside of the stack must not be taken for each other's."""
    model = models.small(vocab=64, dim=16, layers=3, heads=2, kv_heads=2, hidden=32)
    model = model.replace(block=model.block * 2)  # one whole repeat, and a block after it
    run = small_run().replace(model=model, quantize="int8", remat="full", length=16, batch=2, dtype="float32")
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        state, batch = abstract_state(run, mesh), abstract_batch(run, mesh)
        step, evaluation = make_step(run), make_evaluation(run)

        def count(program: Any, *arguments: Any) -> int:
            return str(program.trace(*arguments).jaxpr).count("preferred_element_type=int32")

        if first == "evaluation":
            assert count(evaluation, state["params"], batch) == 0
        # Seven weights of three blocks: forward, again (but for the last product of the repeat and of the block after
        # it, which no gradient needs), and two gradients.
        assert count(step, state, batch) == 3 * 7 * 4 - 2
        assert count(evaluation, state["params"], batch) == 0


def test_stages_keep_what_waits_on_the_chip() -> None:
    run = small_run(mesh="pipeline=2", remat="dots_offload", batch=8)
    with pytest.raises(ValueError, match=r"got remat='dots_offload' with pipeline=2; set remat to 'dots'"):
        meshes.make(run)

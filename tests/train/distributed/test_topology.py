"""The training step, compiled by the compiler of real TPUs: no TPU is needed."""

import math
from importlib.util import find_spec
from typing import Any

import jax
import pytest
from flaxzoo.configs import Balance, Run
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.step import abstract_batch, abstract_state, make_step
from flaxzoo.zoo import MLA, Block, GatedMLP, MoE, Router
from jax.experimental import topologies

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64 alone")


def compiled(run: Run, topology: str) -> tuple[jax.stages.Compiled, int]:
    """The step, and the bytes of state on a device."""
    host = (1, 1, 1) if topology.endswith("1x1") else (2, 2, 1)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, chips_per_host_bounds=host).devices
    mesh, line = meshes.make(run, list(devices))
    assert line == f"{run.mesh} on {len(devices)} x TPU v5 lite"
    with jax.set_mesh(mesh):
        state = abstract_state(run, mesh)
        batch = abstract_batch(run, mesh)
        step: Any = make_step(run)
        program = step.trace(state, batch).lower().compile()
    numbers = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in state["params"].values())
    return program, 3 * 4 * numbers  # parameters and two moments, float32


@pytest.mark.parametrize(("topology", "mesh"), [("v5e:1x1", "fsdp=1"), ("v5e:2x2", "fsdp=2,tensor=2")])
def test_compiles_for_tpus(tiny: Run, topology: str, mesh: str) -> None:
    model = tiny.model.replace(vocab=512, dim=128, **{"block.0.mixer.head_dim": 64, "block.0.ffn.hidden": 256})
    run = tiny.replace(model=model, length=128, mesh=mesh, dtype="bfloat16", remat="dots")
    program, state_bytes = compiled(run, topology)
    memory = program.memory_analysis()
    assert memory is not None
    print(topology, memory)
    # All of the state goes in, in tiles that are not all full, and comes out in the same place.
    assert state_bytes <= memory.argument_size_in_bytes < 1.6 * state_bytes
    assert memory.alias_size_in_bytes >= state_bytes
    assert memory.temp_size_in_bytes < 16 * 2**20  # nowhere near B x T x V or B x N x T x T of every layer at once
    text = program.as_text()
    assert text is not None
    assert ("all-gather" in text) == (mesh != "fsdp=1")  # of parameters, over fsdp


def test_experts_and_latent_attention_compile_for_tpus(tiny: Run) -> None:
    """And the products of experts stay ragged, no row is multiplied by the matrices of all; rows travel to experts."""
    router = Router(top_k=2, score="sigmoid", correction=True)
    block = Block(
        mixer=MLA(heads=2, kv_rank=128, nope_dim=64, rope_dim=64, value_dim=64),
        ffn=MoE(experts=8, expert=GatedMLP(hidden=256), router=router, shared=GatedMLP(hidden=256)),
    )
    model = tiny.model.replace(vocab=512, dim=128, block=(block,))
    balance = Balance(loss=0.01, bias_rate=0.001)
    run = tiny.replace(model=model, length=128, mesh="expert=2,tensor=2", dtype="bfloat16", balance=balance)
    program, state_bytes = compiled(run, "v5e:2x2")
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= state_bytes
    text = program.as_text()
    assert text is not None
    assert "ragged_dot_tiling" in text
    assert "ragged-all-to-all" in text

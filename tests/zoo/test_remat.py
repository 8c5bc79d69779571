"""Rematerialisation saves memory, in a scanned stack and in unrolled blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flaxzoo.configs.models import small
from flaxzoo.layers.stack import Execution
from flaxzoo.zoo import Decoder

ONE = small(vocab=64, dim=64, layers=6, heads=4, kv_heads=2, hidden=256)
STACKS = {"scanned": ONE, "unrolled": ONE.replace(layers=6, first=ONE.block * 6)}


def temporary_bytes(spec: Decoder, remat: Any) -> int:
    def loss(model, tokens):
        return jnp.sum(model.hidden(tokens, execution=Execution(remat=remat)).x)

    model = jax.eval_shape(lambda: spec.build(rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(model, tokens).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("stack", STACKS)
def test_less_is_stored_the_more_is_recomputed(stack):
    none, dots, full = (temporary_bytes(STACKS[stack], remat) for remat in ("none", "dots_no_batch", "full"))
    assert full < 0.6 * none
    assert full < dots < none

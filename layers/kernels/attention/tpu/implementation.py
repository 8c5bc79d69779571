"""Flash attention for TPU: the supported arguments, and block sizes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blocks import block_size
from ..problem import Gradients, Operands, Problem, gradients_like
from . import backward as tpu_backward
from . import forward as tpu_forward
from .parts import BlockSizes as BlockSizes
from .parts import untabled

CHIPS = {
    "TPU v4": BlockSizes(512, 512, 128, 14 * 2**20, cores=2),
    "TPU v5": BlockSizes(1024, 1024, 128, 56 * 2**20, cores=2),
    "TPU v6 lite": BlockSizes(1024, 1024, 256),
    "TPU7x": BlockSizes(1024, 1024, 256, 56 * 2**20),
}
"""The fastest blocks by the schedules of the TPU compiler, by device kind, where they are not `USUAL`.

They are the fastest for head dims of 64, 128, 192 and 256, in both passes (benchmarks/results/attention_blocks.md), and
are used for other head dims too. Blocks of 2048 are up to 9 % faster and take five times as long to compile.
"""
USUAL = BlockSizes(1024, 1024, 128)
NUMBERS = {"bool", "int32", "uint32", "float32", "bfloat16"}
"""The dtypes that a mask or score may compute with for each pair; for others, the TPU compiler lacks operations."""


def refusal(problem: Problem, operands: Operands) -> str | None:
    """The reason why the kernels do not support the arguments; None if they do."""
    for name, function in (("mask", problem.mask), ("score", problem.score)):
        for operation in [] if function is None else function.per_pair:
            dtypes = {value.dtype.name for value in (*operation.inputs, *operation.outputs)} - NUMBERS
            if dtypes:
                return f"the {name} computes with {' and '.join(sorted(dtypes))} for each pair"
        for operation in [] if function is None else function.lookups:
            reason = untabled(operation, operands.k.shape[1], sizes(operands))
            if reason is None and name == "score":
                reason = "looks up an array by query and key at once"
            if reason is None and operands.key_positions is not None:
                reason = "has a table, and context_axis puts the keys into another order"
            if reason is not None:
                return f"the {name} {reason}"
    return None


def sizes(operands: Operands, as_one: int = 1) -> BlockSizes:
    """The blocks for these shapes, on the chip that the program is lowered for.

    `as_one` heads are processed as one if their queries fit a block. Such a block is computed faster than its keys are
    read, so larger blocks leave fewer gaps between the copies.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    best = CHIPS.get(device.device_kind if device else jax.devices()[0].device_kind, USUAL)
    queries, keys = operands.q.shape[1], operands.k.shape[1]
    few = as_one > 1 and queries * as_one <= best.block_q
    block_q = block_size(queries * as_one if few else queries, best.block_q, 128)
    return replace(best, block_q=block_q, block_k=block_size(keys, best.block_k * (2 if few else 1), 128))


def forward(
    problem: Problem, operands: Operands, *, interpret: Any = False, chosen: BlockSizes | None = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row, -inf where a query sees no key."""
    chosen = chosen or sizes(operands, operands.q.shape[2] // operands.k.shape[2])
    if operands.q.dtype == jnp.float16:
        out, lse = forward(replace(problem, out_dtype=jnp.float32), _wide(operands), interpret=interpret, chosen=chosen)
        return out.astype(problem.out_dtype), lse

    @jax.custom_batching.sequential_vmap  # a batch dimension would change the blocks in HBM
    def call(operands: Operands) -> tuple[Array, Array]:
        return tpu_forward.forward(problem, operands, chosen, interpret)

    return call(operands)


def backward(
    problem: Problem,
    operands: Operands,
    lse: Array,
    delta: Array,
    out_grad: Array,
    *,
    interpret: Any = False,
    chosen: BlockSizes | None = None,
) -> Gradients:
    """Gradients; `delta` is the sum over Hv of out * out_grad, less the cotangent of lse (B N T)."""
    chosen = chosen or sizes(operands)
    if operands.q.dtype == jnp.float16:
        arguments = _wide(operands), lse, delta, out_grad.astype(jnp.float32)
        found = backward(replace(problem, gradient_dtype=jnp.float32), *arguments, interpret=interpret, chosen=chosen)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), found, gradients_like(problem, operands))

    @jax.custom_batching.sequential_vmap
    def call(operands: Operands, lse: Array, delta: Array, out_grad: Array) -> Gradients:
        return tpu_backward.backward(problem, operands, lse, delta, out_grad, chosen, interpret)

    return call(operands, lse, delta, out_grad)


def _wide(operands: Operands) -> Operands:
    """The operands in float32, since the matrix unit has no float16."""
    return operands._replace(**{name: getattr(operands, name).astype(jnp.float32) for name in "qkv"})

"""Flash attention for TPU: which problems the kernels can do, and in which blocks."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import tpu_backward, tpu_forward
from .blocks import block_size
from .problem import Gradients, Operands, Problem, differentiable
from .tpu_parts import BlockSizes as BlockSizes

CHIPS = {
    "TPU v4": BlockSizes(512, 512, 128, 14 * 2**20),
    "TPU v6 lite": BlockSizes(1024, 1024, 256),
    "TPU7x": BlockSizes(1024, 1024, 256),
}
"""The best by the schedules of the TPU compiler, by device kind, where they are not `USUAL`.

Blocks of 2048 are up to 9 % faster and take five times as long to compile.
"""
USUAL = BlockSizes(1024, 1024, 128)


def refusal(problem: Problem, operands: Operands) -> str | None:
    """Why the kernels can't do this; None where they can."""
    for name, function in (("mask", problem.mask), ("score", problem.score)):
        if function is not None and not function.elementwise:
            return f"the {name} looks up an array by query and key at once"
    return None


def sizes(operands: Operands) -> BlockSizes:
    """The blocks for these shapes, on the chip that is lowered for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    best = CHIPS.get(device.device_kind if device else jax.devices()[0].device_kind, USUAL)
    queries, keys = operands.q.shape[1], operands.k.shape[1]
    return replace(best, block_q=block_size(queries, best.block_q, 128), block_k=block_size(keys, best.block_k, 128))


def forward(
    problem: Problem, operands: Operands, *, interpret: Any = False, chosen: BlockSizes | None = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row, -inf where a query sees no key."""
    return tpu_forward.forward(problem, operands, chosen or sizes(operands), interpret)


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
    return tpu_backward.backward(problem, operands, lse, delta, out_grad, chosen or sizes(operands), interpret)

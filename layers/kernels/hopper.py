"""Flash attention on Hopper GPUs (H100, H200) for any mask without an array by query and key: what is asked of kernels.

The kernels are hopper_forward.py and hopper_backward.py.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .gpu import capability
from .problem import Gradients, Operands, Problem

LEAST = 64
"""Queries: matrix units take so many rows, and would multiply zeros for fewer."""
LARGEST = 128
"""Head dim: sums of more do not fit the registers."""


def refusal(problem: Problem, operands: Operands) -> str | None:
    """Why the kernels can't do this; None where they can."""
    (queries, size), value_size = operands.q.shape[1::2], operands.v.shape[3]
    if capability() != "9.0":
        return "our kernels are for Hopper GPUs, of compute capability 9.0"
    if operands.q.dtype == jnp.float32:
        return "the kernels for Hopper have no float32 attention"
    if queries < LEAST:
        return f"the kernels for Hopper take {LEAST} queries or more, got T={queries}"
    if max(size, value_size) > LARGEST:
        return f"the kernels for Hopper have head dims up to {LARGEST}, got H={size}, Hv={value_size}"
    if problem.score is not None or problem.dropout_rate:
        return "scores and dropout are not in the kernels for Hopper"
    if problem.context is not None or problem.out_dtype != operands.q.dtype:
        return "the kernels for Hopper round results to the type of q, and sinks and context_axis need float32"
    if problem.mask.lookups:
        return "the kernels for Hopper look up no array by query and key"
    return None


def forward(
    problem: Problem, operands: Operands, *, interpret: Any = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row, -inf where a query sees no key."""
    from .hopper_forward import attention  # with Pallas for GPUs, which takes a quarter of a second to import

    return attention(problem, operands, interpret)


def backward(
    problem: Problem, operands: Operands, lse: Array, delta: Array, out_grad: Array, *, interpret: Any = None
) -> Gradients:
    """Gradients; `delta` is the sum over Hv of out * out_grad, less the cotangent of lse (B N T)."""
    from .hopper_backward import gradients

    return gradients(problem, operands, lse, delta, out_grad, interpret)

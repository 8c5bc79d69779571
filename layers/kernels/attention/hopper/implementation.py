"""Flash attention on Hopper GPUs (H100, H200), for any mask that indexes no array by query and key.

The kernels are forward.py and backward.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..gpu import capabilities
from ..problem import Gradients, Operands, Problem

LEAST = 64
"""The least number of queries: matrix units process this many rows."""
LARGEST = 128
"""The largest head dim: accumulators of larger ones do not fit the registers."""

COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "select_n", "convert_element_type"}
NUMBERS = {"bool", "int32", "uint32", "float32"}
OPERATIONS: tuple[tuple[set[str], set[str]], ...] = (
    (COMPARISONS, NUMBERS),
    ({"and", "or", "xor", "not"}, NUMBERS - {"float32"}),
    ({"add", "sub", "mul", "neg", "abs", "max", "min"}, NUMBERS - {"bool"}),
    ({"div", "rem", "shift_left", "shift_right_logical", "shift_right_arithmetic"}, {"int32", "uint32"}),
)
"""Per-pair operations of a mask and their dtypes: those of Pallas for Hopper, except approximate ones."""


def refusal(problem: Problem, operands: Operands) -> str | None:
    """The reason why the kernels do not support the arguments; None if they do."""
    (queries, size), value_size = operands.q.shape[1::2], operands.v.shape[3]
    if capabilities() != {"9.0"}:
        return "our kernels are for Hopper GPUs, of compute capability 9.0"
    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
        return "XLA can't divide the kernels for Hopper among devices: make the mesh's axes explicit"
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
    for operation in problem.mask.per_pair:
        kinds = {np.dtype(value.dtype).name for value in (*operation.inputs, *operation.outputs)}
        if not any(operation.name in names and kinds <= types for names, types in OPERATIONS):
            return f"the kernels for Hopper have no {operation.name} of {' and '.join(sorted(kinds))} for each pair"
    return None


def forward(
    problem: Problem, operands: Operands, *, interpret: Any = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row, -inf where a query sees no key."""
    from .forward import attention  # with Pallas for GPUs, which takes a quarter of a second to import

    return attention(problem, operands, interpret)


def backward(
    problem: Problem, operands: Operands, lse: Array, delta: Array, out_grad: Array, *, interpret: Any = None
) -> Gradients:
    """Gradients; `delta` is the sum over Hv of out * out_grad, less the cotangent of lse (B N T)."""
    from .backward import gradients

    return gradients(problem, operands, lse, delta, out_grad, interpret)

"""Flash attention for TPU: which problems the kernels can do, and in which blocks."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import tpu_backward, tpu_forward
from .problem import Gradients, Operands, Problem, differentiable


@dataclass(frozen=True)
class Sizes:
    """Queries and keys of a block, and the keys of it that are worked on at a time."""

    block_q: int
    block_k: int
    strip: int


def refusal(problem: Problem, operands: Operands) -> str | None:
    """Why the kernels can't do this; None where they can."""
    if operands.q.dtype == jnp.float16:
        return "TPU has no float16 products: use bfloat16"
    if operands.dropout_rows is not None:
        return "dropout is not in the kernels"
    for name, function in (("mask", problem.mask), ("score", problem.score)):
        if function is not None and not function.elementwise:
            return f"the {name} looks up an array by query and key at once"
    if any(differentiable(side) for side in operands.score_sides):
        return "the score has parameters that get gradients"
    return None


def sizes(operands: Operands) -> Sizes:
    """The blocks for these shapes."""
    queries, keys = operands.q.shape[1], operands.k.shape[1]
    return Sizes(min(1024, _round_up(queries, 128)), min(1024, _round_up(keys, 128)), 128)


def forward(
    problem: Problem, operands: Operands, *, interpret: Any = False, chosen: Sizes | None = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row, -inf where a query sees no key."""
    return tpu_forward.forward(problem, operands, **_options(operands, chosen), interpret=interpret)


def backward(
    problem: Problem,
    operands: Operands,
    lse: Array,
    delta: Array,
    out_grad: Array,
    *,
    interpret: Any = False,
    chosen: Sizes | None = None,
) -> Gradients:
    """Gradients; `delta` is the sum over Hv of out * out_grad, less the cotangent of lse (B N T)."""
    return tpu_backward.backward(
        problem, operands, lse, delta, out_grad, **_options(operands, chosen), interpret=interpret
    )


def _options(operands: Operands, chosen: Sizes | None) -> dict[str, Any]:
    chosen = chosen or sizes(operands)
    return {"block_q": chosen.block_q, "block_k": chosen.block_k, "strip": chosen.strip}


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

"""Flash attention of cuDNN, through `jax.nn.dot_product_attention`, for the arguments that it supports exactly.

For others there are our own kernels (hopper/) and portable.py.
"""

import logging
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import portable
from .gpu import capabilities
from .hopper import implementation as hopper
from .problem import Gradients, Operands, Problem

_log = logging.getLogger(__name__)

DETERMINISTIC = re.compile(r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|True|1))?(\s|$)")
LEAST_CAPABILITY = "8.0"
"""The least compute capability with flash attention in cuDNN; assumed if the process has no GPU."""


def refusal(problem: Problem, operands: Operands) -> str | None:
    """The reason why cuDNN does not support the arguments; None if it does.

    It depends on the GPUs of the process. Without any, a program is for all GPUs from compute capability 8.0 on.
    """
    (size, value_size), least = (operands.q.shape[3], operands.v.shape[3]), LEAST_CAPABILITY
    here = min(capabilities(), key=float, default=None)
    if operands.q.dtype == jnp.float32:
        return "cuDNN has no float32 attention"
    if problem.score is not None or problem.dropout_rate:
        return "scores and dropout are not in cuDNN"
    if problem.wants_lse:
        return "cuDNN gives sums of the softmax no gradient, which sinks, return_lse and context_axis need"
    if _window(problem, operands) is None:
        return "cuDNN knows full masks, and causal ones with or without a window for as many queries as keys"
    if size != value_size:
        return f"cuDNN wants keys and values of one head dim here, got H={size}, Hv={value_size}"
    where = f"any from {least}" if here is None else f"compute capability {here}, the least of all GPUs here"
    if float(here or least) < float(least):
        return f"cuDNN has no flash attention for a GPU of {where}"
    if size > 128 and int(float(here or least)) != 9:
        return f"cuDNN has head dims over 128 for compute capability 9.0, got H={size} for a GPU of {where}"
    try:
        jax.eval_shape(lambda *x: _with_pullback(problem, operands, *x)[0], operands.q, operands.k, operands.v)
    except (NotImplementedError, RuntimeError) as error:  # of this version of JAX and cuDNN
        return f"cuDNN: {str(error).splitlines()[0].rstrip('.')}"
    return None


def forward(problem: Problem, operands: Operands) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row."""
    out, pullback = _with_pullback(problem, operands, operands.q, operands.k, operands.v)
    (lse,) = (x for x in jax.tree.leaves(pullback) if x.dtype == jnp.float32)
    return out, lse


def backward(problem: Problem, operands: Operands, lse: Array, delta: Array, out_grad: Array) -> Gradients:
    """Gradients: by cuDNN if XLA_FLAGS request deterministic operations, else by other kernels.

    Otherwise cuDNN sums the gradients of queries in another order on every call.
    """
    if not DETERMINISTIC.search(os.environ.get("XLA_FLAGS", "")):
        other = portable if hopper.refusal(problem, operands) else hopper
        _log.debug(
            "on cuda, gradients are left to '%s': those of cuDNN have the same bits on every call only with "
            "XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true",
            other.__name__.rpartition(".")[2],
        )
        return other.backward(problem, operands, lse, delta, out_grad)
    out, pullback = _with_pullback(problem, operands, operands.q, operands.k, operands.v)
    # The results of the forward pass replace those computed here, which the compiler then removes.
    leaves, tree = jax.tree.flatten(pullback)
    assert sum(leaf is out for leaf in leaves) == 1
    assert operands.out is not None
    leaves = [operands.out if x is out else lse if x.dtype == jnp.float32 else x for x in leaves]
    return *tree.unflatten(leaves)(out_grad), []


def _with_pullback(problem: Problem, operands: Operands, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    """Attention and its pullback, a pytree that contains the output and the lse, its only float32 array."""
    window = _window(problem, operands)
    assert window is not None
    causal, left = window

    def attention(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=problem.scale,
            is_causal=causal,
            local_window_size=None if left is None else (left - 1, 0),
            implementation="cudnn",
        )

    return jax.vjp(attention, q, k, v)


def _window(problem: Problem, operands: Operands) -> tuple[bool, int | None] | None:
    """Whether the mask is causal, and the length of its window (None: no window); None for other masks."""
    queries, keys = operands.q.shape[1], operands.k.shape[1]
    if problem.band == (None, None):
        return False, None
    if problem.band is None or queries != keys or operands.query_positions is not None or problem.query_offset:
        return None
    left, right = (None if bound is None or bound >= keys else bound for bound in problem.band)
    return (right == 1, left) if right == 1 or left is right is None else None

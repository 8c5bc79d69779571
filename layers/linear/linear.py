"""Linear maps between named axes."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..sharding.axes import parameter
from ..sharding.collectives import gather
from .einsum import einsums
from .expand import add_bias
from .matmul import Kind


class Linear(nnx.Module):
    """y = x W + b between named axes: `Linear("D -> N H", {"D": 64, "N": 4, "H": 16}, ...)` maps B T D to B T N H.

    The initial W is normal with standard deviation 1 / sqrt(input size), the initial b zero.
    """

    def __init__(self, axes: str, sizes: Mapping[str, int], *, rngs: nnx.Rngs, bias: bool = False):
        inputs, outputs = (side.split() for side in axes.split("->"))
        fan_in = math.prod(sizes[letter] for letter in inputs)
        shape = tuple(sizes[letter] for letter in inputs + outputs)
        value = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(fan_in)
        self.axes = axes
        self.weight = parameter(" ".join(inputs + outputs), value, inputs=len(inputs))
        self.bias = parameter(" ".join(outputs), jnp.zeros(shape[len(inputs) :])) if bias else None

    def __call__(self, x: Float[Array, "B T ..."], *, kind: Kind = "none") -> Float[Array, "B T ..."]:
        """Maps the last axes of `x`, in the dtype of `x`; `kind` is the number format of the matmul."""
        return apply_linears((self,), x, kind=kind)[0]

    def with_bias(self, y: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """The output x W + b, given y = x W."""
        # Remat policies save y by this name: they see no matmul inside a function with a custom gradient.
        y = checkpoint_name(y, "product")
        return y if self.bias is None else add_bias(y, self.bias[...])

    def matrix(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """W in `dtype`, gathered over the mesh axes that split it only at rest; its input axes come first."""
        return gather(self.weight[...], dtype)


class FusedTransposed(nnx.Module):
    """Linear maps of the same x, fused into one matrix whose rows are the outputs, for decoding on a CPU.

    Each output reads one contiguous stretch of memory. XLA's CPU compiler transposes a weight of more than two
    dimensions in memory at every matmul and makes a float32 copy of one in bfloat16, which takes longer than the matmul
    of a few tokens. It computes a sum of products in one pass, but two that share x write x to memory once per row.
    """

    def __init__(self, *linears: Linear):
        weights = [linear.weight[...] for linear in linears]
        biases = [linear.bias[...].reshape(-1) for linear in linears if linear.bias is not None]
        inputs = len(linears[0].axes.split("->")[0].split())
        self.shapes = tuple((weight.shape[:inputs], weight.shape[inputs:]) for weight in weights)
        """Input and output sizes of each map."""
        columns = [weight.reshape(math.prod(weight.shape[:inputs]), -1) for weight in weights]
        self.rows = parameter("F D", jnp.concatenate(columns, axis=1).T, inputs=1)
        assert len(biases) in (0, len(linears)), linears
        self.bias = parameter("F", jnp.concatenate(biases)) if biases else None

    def __call__(self, x: Float[Array, "B T ..."], *, kind: Kind = "none") -> Float[Array, "B T ..."]:
        """Maps the last axes of `x`, in the dtype of `x`, by the only map."""
        (y,) = self.outputs(x, kind=kind)
        return y

    def outputs(self, x: Float[Array, "B T ..."], *, kind: Kind = "none") -> list[Float[Array, "B T ..."]]:
        """The output of each map for `x`, in the dtype of `x`. Raises NotImplementedError for 8-bit matmuls."""
        if kind != "none":
            raise NotImplementedError(f"a model optimized for decoding has no matmuls in 8 bits, got kind={kind!r}")
        rows = self.rows[...].astype(x.dtype)
        flat = x.reshape(*x.shape[:2], -1)
        y = rows_product(flat, rows).astype(x.dtype) if is_few(x, rows) else jnp.einsum("BTD,FD->BTF", flat, rows)
        y = y if self.bias is None else add_bias(y, self.bias[...])
        ends = list(itertools.accumulate(math.prod(outputs) for _, outputs in self.shapes))
        slices = zip(jnp.split(y, ends[:-1], axis=2), self.shapes, strict=True)
        return [part.reshape(*x.shape[:2], *outputs) for part, (_, outputs) in slices]

    def matrix(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """W of the only map in `dtype`; its input axes come first."""
        ((inputs, outputs),) = self.shapes
        return self.rows[...].astype(dtype).T.reshape(*inputs, *outputs)


def apply_linears(
    linears: Sequence[Any], x: Float[Array, "..."], *group_sizes: Array, kind: Kind = "none"
) -> list[Float[Array, "..."]]:
    """The outputs of several linear maps for one `x`, which on a mesh is gathered once for all of them.

    If the first is a `FusedTransposed`, it computes all of them. Linear maps of experts are called with `group_sizes`.
    """
    first = linears[0]
    if isinstance(first, FusedTransposed):
        return first.outputs(x, kind=kind)
    if not all(type(linear) is Linear for linear in linears):
        return [linear(x, *group_sizes, kind=kind) for linear in linears]
    sides = [[side.strip() for side in linear.axes.split("->")] for linear in linears]
    texts = [f"B T {inputs}, {inputs} {outputs} -> B T {outputs}" for inputs, outputs in sides]
    results = einsums(x, *zip(texts, (linear.weight[...] for linear in linears), strict=True), kind=kind)
    return [linear.with_bias(y) for linear, y in zip(linears, results, strict=True)]


def rows_product(x: Float[Array, "B T D"], weight: Float[Array, "F D"]) -> Float[Array, "B T F"]:
    """The product of x with the transposed weight, in float32, as one elementwise product and sum per token."""
    wide = weight.astype(jnp.float32)
    rows = [jnp.sum(wide * row, axis=1) for row in x.reshape(-1, x.shape[-1]).astype(jnp.float32)]
    return jnp.stack(rows).reshape(*x.shape[:2], -1)


def is_few(x: Float[Array, "B T ..."], weight: Float[Array, "F ..."]) -> bool:
    """Whether x has so few tokens that `rows_product` is faster on a CPU than a matmul."""
    return weight.dtype != jnp.float32 and x.shape[0] * x.shape[1] <= 4

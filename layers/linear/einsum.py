"""Matmuls with weights on a mesh: the collectives follow from how the operands are split.

The collectives are written out because XLA would choose others: on some platforms it sums a whole array where one shard
of the sum is needed.
"""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from ..sharding.axes import names_of, spec, spec_of, time_after, used_axes
from ..sharding.collectives import gather_shard, reduce_shard
from .matmul import Kind, typed_einsum

Entries = tuple[Any, ...]
"""The mesh axes that split each dimension of an array."""
Options = tuple[tuple[str, Any], ...]
"""Keyword arguments of `jnp.einsum`."""


def einsum(
    axes: str, x: Float[Array, "B T ..."], weight: Float[Array, "..."], *, kind: Kind = "none", **options: Any
) -> Float[Array, "..."]:
    """`jnp.einsum` with axis letters ("B T D, D F -> B T F"); see `einsums`."""
    return einsums(x, (axes, weight), kind=kind, **options)[0]


def einsums(
    x: Float[Array, "B T ..."], *products: tuple[str, Array], kind: Kind = "none", **options: Any
) -> list[Array]:
    """Einsums of one x with several weights, which are cast to its dtype; `options` are those of `jnp.einsum`.

    On a mesh:
    - Mesh axes that split a weight only at rest are gathered.
    - A mesh axis that splits both T and a letter of a weight is gathered in x, once for all weights.
    - If a letter that is summed over is split, the sum over devices is split along T, if T is divisible.

    The backward pass does the reverse of each. Gathered arrays have the checkpoint name "gathered", so that remat
    policies save none of them: the backward pass gathers again.
    """
    texts, weights = [text for text, _ in products], [weight for _, weight in products]

    def multiply(text: str, x: Array, weight: Array) -> Array:
        return _einsum(text, tuple(options.items()), kind, x, weight)

    x_spec, specs = spec_of(x), [spec_of(weight) for weight in weights]
    if not any(map(names_of, (*x_spec, *(entry for each in specs for entry in each)))):
        return [multiply(text, x, weight.astype(x.dtype)) for text, weight in products]
    used = [tuple(map(used_axes, each)) for each in specs]
    taken = {name for each in used for names in each for name in names}
    x_used = (x_spec[0], tuple(name for name in names_of(x_spec[1]) if name not in taken), *x_spec[2:])
    sums = [_summed_axes(text, x_used, each) for text, each in zip(texts, used, strict=True)]
    results = [_result_spec(text, x_used, each, x.shape[1]) for text, each in zip(texts, used, strict=True)]

    def local(x: Array, weights: list[Array]) -> list[Array]:
        x = gather_shard(x, x_spec, x_used)
        gathered = [gather_shard(weight, *each) for weight, *each in zip(weights, specs, used, strict=True)]
        partial_sums = [multiply(text, x, weight) for text, weight in zip(texts, gathered, strict=True)]
        return [reduce_shard(y, over, 1) for y, over in zip(partial_sums, sums, strict=True)]

    in_specs = spec(*x_spec), [spec(*each) for each in specs]
    out_specs = [spec(*each) for each in results]
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(x, [weight.astype(x.dtype) for weight in weights])


def _letters(text: str) -> tuple[list[str], list[str], list[str]]:
    operands, result = text.split("->")
    x, weight = operands.split(",")
    return x.split(), weight.split(), result.split()


def _summed_axes(text: str, x: Entries, weight: Entries) -> tuple[str, ...]:
    """The mesh axes that an einsum is summed over: those of letters that both operands have and the result has not."""
    x_letters, weight_letters, result = _letters(text)
    of_weight = dict(zip(weight_letters, weight, strict=True))
    over: tuple[str, ...] = ()
    for letter, entry in zip(x_letters, x, strict=True):
        if letter in of_weight:
            assert names_of(entry) == names_of(of_weight[letter]), (text, x, weight)
        if letter not in result:
            over += names_of(entry)
    return over


def _result_spec(text: str, x: Entries, weight: Entries, length: int) -> Entries:
    """The mesh axes that split each dimension of the result."""
    x_letters, weight_letters, result = _letters(text)
    entries = dict(zip((*weight_letters, *x_letters), (*weight, *x), strict=True))
    entries["T"] = time_after(entries["T"], length, _summed_axes(text, x, weight))
    return tuple(entries[letter] for letter in result)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(text: str, options: Options, kind: Kind, x: Array, weight: Array) -> Array:
    """An einsum whose gradient has x, not the gradient of y, on the left.

    XLA on CPU transposes the left operand of the weight's gradient in memory unless it is x, which takes longer than
    the matmul: a third of a step's time.
    """
    return typed_einsum(kind, text.replace(" ", ""), x, weight, **dict(options))


def _forward(text: str, options: Options, kind: Kind, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(text, options, kind, x, weight), (x, weight)


def _backward(text: str, options: Options, kind: Kind, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = saved
    x_letters, weight_letters, result = ("".join(letters) for letters in _letters(text))
    precision = {name: value for name, value in options if name == "precision"}
    g = g.astype(x.dtype)
    x_grad = typed_einsum(kind, f"{result},{weight_letters}->{x_letters}", g, weight, gradient="left", **precision)
    text = f"{x_letters},{result}->{weight_letters}"
    return x_grad, typed_einsum(kind, text, x, g, gradient="right", **precision)


_einsum.defvjp(_forward, _backward)

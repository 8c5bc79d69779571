"""Products with weights that follow the types: what a mesh splits is gathered before, and summed after.

The collectives are written out, for XLA would pick others: on some platforms it sums a whole array where a part of the
sum is wanted.
"""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from ..sharding.axes import gather_shard, names_of, reduce_shard, spec, spec_of, time_after, used_axes
from .matmul import Kind, current, product

Entries = tuple[Any, ...]
"""What splits each dimension of an array."""


def einsum(axes: str, x: Float[Array, "B T ..."], weight: Float[Array, "..."], **options: Any) -> Float[Array, "..."]:
    """`jnp.einsum` with axis letters ("B T D, D F -> B T F"); see `einsums`."""
    return einsums(x, (axes, weight), **options)[0]


def einsums(x: Float[Array, "B T ..."], *products: tuple[str, Array], **options: Any) -> list[Array]:
    """Einsums of one x with a few weights, which are cast to its dtype.

    Weights are gathered over the mesh axes that split them at rest alone. An axis that splits both T and a letter of a
    weight is gathered in x, once for all weights. Where a letter that is summed over is split, the sum over devices is
    split along T, if it can be. The backward pass does the reverse of each. What was gathered has the name "gathered",
    by which the model keeps none of it for the backward pass: that gathers again.
    """
    texts, weights = [text for text, _ in products], [weight for _, weight in products]
    kind = current()
    x_spec, specs = spec_of(x), [spec_of(weight) for weight in weights]
    if not any(map(names_of, (*x_spec, *(entry for each in specs for entry in each)))):
        return [_product(text, tuple(options.items()), kind, x, weight.astype(x.dtype)) for text, weight in products]
    used = [tuple(map(used_axes, each)) for each in specs]
    taken = {name for each in used for names in each for name in names}
    x_used = (x_spec[0], tuple(name for name in names_of(x_spec[1]) if name not in taken), *x_spec[2:])
    sums = [_summed(text, x_used, each) for text, each in zip(texts, used, strict=True)]
    results = [_result(text, x_used, each, x.shape[1]) for text, each in zip(texts, used, strict=True)]

    def local(x: Array, weights: list[Array]) -> list[Array]:
        x = gather_shard(x, x_spec, x_used)
        whole = [gather_shard(weight, *each) for weight, *each in zip(weights, specs, used, strict=True)]
        found = [
            _product(text, tuple(options.items()), kind, x, weight) for text, weight in zip(texts, whole, strict=True)
        ]
        return [reduce_shard(y, over, 1) for y, over in zip(found, sums, strict=True)]

    in_specs = spec(*x_spec), [spec(*each) for each in specs]
    out_specs = [spec(*each) for each in results]
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(x, [weight.astype(x.dtype) for weight in weights])


def _letters(text: str) -> tuple[list[str], list[str], list[str]]:
    operands, result = text.split("->")
    x, weight = operands.split(",")
    return x.split(), weight.split(), result.split()


def _summed(text: str, x: Entries, weight: Entries) -> tuple[str, ...]:
    """The mesh axes that a product is summed over: those of letters that both have and the result has not."""
    x_letters, weight_letters, result = _letters(text)
    of_weight = dict(zip(weight_letters, weight, strict=True))
    over: tuple[str, ...] = ()
    for letter, entry in zip(x_letters, x, strict=True):
        if letter in of_weight:
            assert names_of(entry) == names_of(of_weight[letter]), (text, x, weight)
        if letter not in result:
            over += names_of(entry)
    return over


def _result(text: str, x: Entries, weight: Entries, length: int) -> Entries:
    """What splits the result."""
    x_letters, weight_letters, result = _letters(text)
    entries = dict(zip((*weight_letters, *x_letters), (*weight, *x), strict=True))
    entries["T"] = time_after(entries["T"], length, _summed(text, x, weight))
    return tuple(entries[letter] for letter in result)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(text: str, options: Any, kind: Kind, x: Array, weight: Array) -> Array:
    """The gradient that JAX would derive has g, the gradient of y, on the left of x; XLA on CPU then transposes g in
    memory, which takes longer than the product. With x on the left, nothing moves (a third off a step's time).
    """
    return product(kind, text.replace(" ", ""), x, weight, **dict(options))


def _forward(text: str, options: Any, kind: Kind, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(text, options, kind, x, weight), (x, weight)


def _backward(text: str, options: Any, kind: Kind, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = saved
    x_letters, weight_letters, result = ("".join(letters) for letters in _letters(text))
    named = {name: value for name, value in options if name == "precision"}
    g = g.astype(x.dtype)
    x_grad = product(kind, f"{result},{weight_letters}->{x_letters}", g, weight, gradient="left", **named)
    return x_grad, product(kind, f"{x_letters},{result}->{weight_letters}", x, g, gradient="right", **named)


_product.defvjp(_forward, _backward)

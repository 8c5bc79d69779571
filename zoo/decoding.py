"""A model in the form that decodes fastest on a CPU.

A decode step should take as long as reading the weights once. Stacked layers cost a copy of each layer's weights a step
(a loop slices them out), and parameters in another dtype a cast. So layers are taken apart, and matrices are cast once.
"""

from typing import Any

import jax
from flax import nnx

from ..layers.linear import Linear, OutputMajor
from .decoder import Decoder, DecoderModel
from .parameters import Parameters, describe, merge, split


def for_decoding(model: DecoderModel, dtype: Any) -> DecoderModel:
    """The same model with its layers apart, its matrices in `dtype`, and their outputs first.

    It is a copy, unless the model is in this form already. Whoever generates many times makes it once. Models that are
    not on a single CPU device are returned as they are: a copy may not fit an accelerator beside the model.
    """
    leaf = jax.tree.leaves(model)[0]
    devices = leaf.sharding.device_set
    if len(devices) > 1 or next(iter(devices)).platform != "cpu" or is_for_decoding(model, dtype):
        return model
    spec = model.spec.replace(first=model.spec.all_blocks)
    known = describe(model)
    apart = {}
    for name, value in split(model).items():
        value = value.astype(dtype) if known[name].inputs and not known[name].exact else value
        apart |= _apart(model.spec, name, value)
    made = merge(spec.abstract(), apart)
    del apart  # so that each matrix goes when another has taken its place
    for _, module in list(nnx.iter_modules(made)):
        _output_major(module)
    return made


def is_for_decoding(model: DecoderModel, dtype: Any) -> bool:
    """Whether this is what `for_decoding` makes."""
    return (
        not model.spec.repeats
        and not any(isinstance(module, Linear) for _, module in nnx.iter_modules(model))
        and model.embedding.table[...].dtype == dtype
    )


def _apart(spec: Decoder, name: str, value: jax.Array) -> Parameters:
    """A parameter under the names it has where no layers are stacked."""
    where, _, rest = name.partition(".")
    count = len(spec.first)
    if where == "stack":
        index, _, inside = rest.partition(".")
        places = [count + repeat * len(spec.block) + int(index) for repeat in range(spec.repeats)]
        return {f"first.{place}.{inside}": value[repeat] for repeat, place in enumerate(places)}
    if where == "rest":
        index, _, inside = rest.partition(".")
        return {f"first.{count + spec.repeats * len(spec.block) + int(index)}.{inside}": value}
    return {name: value}


def _output_major(module: nnx.Module) -> None:
    """Replaces the linear maps of a module; those with the same input become one, in the place of the first."""
    linears = {name: child for name, child in vars(module).items() if isinstance(child, Linear)}
    together = [name for name in getattr(module, "same_input", ()) if name in linears]
    alone = [[name] for name in linears if name not in together]
    for first, *others in [together, *alone] if together else alone:
        setattr(module, first, OutputMajor(*(linears[name] for name in (first, *others))))
        for name in others:
            setattr(module, name, None)

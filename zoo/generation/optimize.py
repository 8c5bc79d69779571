"""A model in the form that decodes fastest.

A decode step should take as long as reading weights and caches once. Stacked layers cost a copy of each layer's caches
a step (a loop slices them out and writes them back), on CPUs also of its weights, and parameters in another dtype a
cast. So layers are taken apart, and matrices are cast once; on a CPU, their outputs come first.
"""

from typing import Any

import jax
from flax import nnx

from ...layers.linear.linear import FusedTransposed, Linear
from ...layers.sharding import stages
from ..decoder import Decoder, DecoderModel
from ..parameters import FlatModel, Parameters, describe, merge, split


def optimize_for_decoding(model: DecoderModel, dtype: Any, *, donate: bool = False) -> DecoderModel:
    """The same model with its layers apart and its matrices in `dtype`, on the devices it is on.

    It is a copy, unless the model is in this form already. Whoever generates many times makes it once. With `donate`
    the arrays of `model` are freed as those of the copy are made, so that no more than one of them is there twice;
    `model` can't be used any more. Raises ValueError where layers are on the stages of a pipeline.
    """
    if is_for_decoding(model, dtype):
        return model
    known, on_cpu = describe(model), _on_cpu(model)
    apart: Parameters = {}
    with FlatModel.of(model).on_mesh():
        stages.check_none()
        for name, value in split(model).items():
            kind = dtype if known[name].inputs and not known[name].exact else value.dtype
            parts = _apart(model.spec, name, value if value.dtype == kind else value.astype(kind))
            apart |= parts
            if donate and not any(part is value for part in parts.values()):
                jax.block_until_ready(parts)
                value.delete()
    made = merge(model.spec.unstacked().abstract(), apart)
    del apart  # so that each matrix goes when another has taken its place
    if on_cpu:
        for _, module in list(nnx.iter_modules(made)):
            _output_major(module)
    return made


def is_for_decoding(model: DecoderModel, dtype: Any) -> bool:
    """Whether this is what `optimize_for_decoding` makes."""
    as_linear = any(isinstance(module, Linear) for _, module in nnx.iter_modules(model))
    cast = model.embedding.table[...].dtype == dtype
    return not model.spec.repeats and cast and not (as_linear and _on_cpu(model))


def _on_cpu(model: DecoderModel) -> bool:
    """Whether it is on a single device that is a CPU."""
    devices = model.embedding.table[...].sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


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
        setattr(module, first, FusedTransposed(*(linears[name] for name in (first, *others))))
        for name in others:
            setattr(module, name, None)

"""A model in the form that decodes fastest.

A decode step is memory-bandwidth bound: at best it takes as long as reading the weights and caches once. Stacked layers
cost a copy of each layer's caches in every step (a loop slices them out and writes them back), on CPUs also of its
weights, and parameters in another dtype cost a cast. So layers are unstacked and matrices are cast once; on a CPU,
matrices are also transposed, and those with the same input fused.
"""

import jax
from flax import nnx
from jax.typing import DTypeLike

from ...layers.linear.linear import FusedTransposed, Linear
from ...layers.sharding import stages
from ..decoder import Decoder, DecoderModel
from ..parameters import FlatModel, Parameters, describe, merge, split


def optimize_for_decoding(model: DecoderModel, dtype: DTypeLike, *, donate: bool = False) -> DecoderModel:
    """The same model with its layers unstacked and its matrices in `dtype`, on the same devices.

    The result is a copy, unless the model is in this form already. With `donate` each array of `model` is freed when it
    has been copied, so that at most one of them exists twice, and `model` can no longer be used. Raises ValueError if
    layers are on the stages of a pipeline.
    """
    if is_for_decoding(model, dtype):
        return model
    descriptions, on_cpu = describe(model), _on_cpu(model)
    unstacked: Parameters = {}
    with FlatModel.of(model).on_mesh():
        stages.check_none()
        for name, value in split(model).items():
            kind = dtype if descriptions[name].inputs and not descriptions[name].exact else value.dtype
            parts = _unstack(model.spec, name, value if value.dtype == kind else value.astype(kind))
            unstacked |= parts
            if donate and not any(part is value for part in parts.values()):
                jax.block_until_ready(parts)
                value.delete()
    result = merge(model.spec.unstacked().abstract(), unstacked)
    del unstacked  # so that each matrix is freed when its transposed copy exists
    if on_cpu:
        for _, module in list(nnx.iter_modules(result)):
            _fuse_and_transpose(module)
    return result


def is_for_decoding(model: DecoderModel, dtype: DTypeLike) -> bool:
    """Whether the model is already in the form that `optimize_for_decoding` returns."""
    as_linear = any(isinstance(module, Linear) for _, module in nnx.iter_modules(model))
    cast = model.embedding.table[...].dtype == dtype
    return not model.spec.repeats and cast and not (as_linear and _on_cpu(model))


def _on_cpu(model: DecoderModel) -> bool:
    """Whether the model is on a single device, which is a CPU."""
    devices = model.embedding.table[...].sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _unstack(spec: Decoder, name: str, value: jax.Array) -> Parameters:
    """The entries of a stacked parameter, by their names in the unstacked model."""
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


def _fuse_and_transpose(module: nnx.Module) -> None:
    """Replaces the linear maps of a module by transposed ones; those with the same input are fused into the first."""
    linears = {name: child for name, child in vars(module).items() if isinstance(child, Linear)}
    together = [name for name in getattr(module, "same_input", ()) if name in linears]
    alone = [[name] for name in linears if name not in together]
    for first, *others in [together, *alone] if together else alone:
        setattr(module, first, FusedTransposed(*(linears[name] for name in (first, *others))))
        for name in others:
            setattr(module, name, None)

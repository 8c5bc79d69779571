"""Optimizers and schedules by name, from optax."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..configs.run import Optimizer
from ..layers.sharding.axes import stacked
from ..zoo.parameters import Description

Descriptions = dict[str, Description]
B1, MUON_B1 = 0.9, 0.95
"""Decay of the moving average of gradients where `Optimizer.b1` is not given; of Muon's matrices as in 2502.16982."""


def schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """The learning rate of each of `steps` steps: a linear warmup, then what the schedule's name says."""
    peak, final = optimizer.learning_rate, optimizer.learning_rate * optimizer.final_fraction
    warmup = min(optimizer.warmup_steps, steps)
    after = max(1, steps - warmup)
    decay = max(1, round(steps * optimizer.decay_fraction)) if optimizer.schedule == "wsd" else after
    decay = min(decay, after)
    rates: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, final, after),
        "cosine": optax.cosine_decay_schedule(peak, after, alpha=optimizer.final_fraction),
        "wsd": optax.linear_schedule(peak, final, decay, transition_begin=after - decay),
    }
    # The first step is not wasted on a learning rate of zero: step i of the warmup has (i + 1) / warmup of the peak.
    rise = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    joined = optax.join_schedules([rise, rates[optimizer.schedule]], [warmup])

    def rate(count: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return joined(count)

    return rate


def make(optimizer: Optimizer, steps: int, parameters: Descriptions) -> optax.GradientTransformation:
    """The optax transformation, without clipping by the global norm.

    Weight decay is decoupled (1711.05101), scaled by the learning rate, and applied to matrices only. Layers and
    experts that are stacked in one array are updated as if each were an array of its own.
    """
    rate = schedule(optimizer, steps)
    matrices = {name: known.inputs > 0 for name, known in parameters.items()}
    decay, b1, b2 = optimizer.weight_decay, B1 if optimizer.b1 is None else optimizer.b1, optimizer.b2
    dtype = jnp.dtype(optimizer.momentum_dtype)
    match optimizer.name:
        case "adamw":
            return optax.adamw(rate, b1=b1, b2=b2, eps=optimizer.eps, mu_dtype=dtype, weight_decay=decay, mask=matrices)
        case "lion":  # 2302.06675
            return optax.lion(rate, b1=b1, b2=b2, mu_dtype=dtype, weight_decay=decay, mask=matrices)
        case "adafactor":  # 1804.04235
            direction = optax.chain(optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0))
            direction = per_layer(direction, {name: stacked(known.axes) for name, known in parameters.items()})
        case "sgd":
            direction = optax.trace(decay=b1, nesterov=True, accumulator_dtype=dtype)
        case "muon":
            direction = _muon(optimizer, parameters)
    return optax.chain(direction, optax.add_decayed_weights(decay, matrices), optax.scale_by_learning_rate(rate))


def never_overflows(optimizer: Optimizer) -> bool:
    """Whether finite parameters stay finite under every gradient whose norm is finite, so that no step has to check.

    The largest float32 numbers are 2**104 apart: adding less than 2**103 to one of them cannot overflow, and neither
    can a weight decay by less than the parameter itself. Directions of updates are below 2**100:

    - adamw: m / (1 - b1**t) / (sqrt(v) + eps), where m is a mean of gradients, whose elements are below 2**64,
      as their squares are finite;
    - lion: 1;
    - sgd: at most a sum of gradients over all steps, 2**31 * 2**64.

    Muon and Adafactor divide by norms of whole matrices. No such bound is known for them.
    """
    if optimizer.learning_rate > 0.5 or optimizer.weight_decay > 1:
        return False
    if optimizer.name == "adamw":
        b1 = B1 if optimizer.b1 is None else optimizer.b1
        bias_corrections = 1 - max(b1, optimizer.b2) >= 2**-14  # far above the rounding of 1 - b**t in float32
        return bias_corrections and 2.0**64 / ((1 - b1) * optimizer.eps) <= 2.0**100
    return optimizer.name in ("lion", "sgd")


def per_layer(transformation: optax.GradientTransformation, depths: dict[str, int]) -> optax.GradientTransformation:
    """A transformation for named arrays that updates each layer and expert of a stacked array by itself.

    Args:
        transformation: reads the shape or norm of a whole array, as factored second moments and clipping by block do.
        depths: by name, how many leading dimensions of the array stack layers and experts.

    State of the transformation has these dimensions in front too, except for scalars, such as the number of steps.
    """

    def mapped(function: Callable[..., Any], name: str, array: jax.Array, *, inputs: tuple[str, ...]) -> Any:
        layer = jax.ShapeDtypeStruct(array.shape[depths[name] :], array.dtype)
        state = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, jax.eval_shape(transformation.init, layer))
        axes = tuple(state if kind == "state" else 0 for kind in inputs)
        for _ in range(depths[name]):
            function = jax.vmap(function, in_axes=axes, out_axes=state if len(inputs) == 1 else (0, state))
        return function

    def blocks(name: str, array: jax.Array) -> jax.Array:
        """The array with a dimension after the stacked ones: that of a number in each layer is 1."""
        return array if array.ndim > depths[name] else array[..., None]

    def init(params: Any) -> Any:
        states = {}
        for name, array in params.items():
            array = blocks(name, array)
            state = mapped(transformation.init, name, array, inputs=("array",))(array)
            split = functools.partial(_split_as, array=array, depth=depths[name])
            states[name] = jax.tree.map(split, state)
        return states

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new_updates, states = {}, {}
        for name, gradient in updates.items():
            arrays = blocks(name, gradient), state[name], blocks(name, params[name])
            function = mapped(transformation.update, name, arrays[0], inputs=("array", "state", "array"))
            updated, states[name] = function(*arrays)
            new_updates[name] = updated.reshape(gradient.shape)
        return new_updates, states

    return optax.GradientTransformation(init, update)


def _split_as(state: jax.Array, array: jax.Array, depth: int) -> jax.Array:
    """State of a stacked array with its leading dimensions split over the mesh as those of the array are."""
    sharding = jax.typeof(array).sharding
    if not state.ndim or not depth or sharding.mesh.empty:
        return state
    inner = jax.typeof(state).sharding.spec[depth:]
    return jax.sharding.reshard(state, jax.sharding.PartitionSpec(*sharding.spec[:depth], *inner))


def _muon(optimizer: Optimizer, parameters: Descriptions) -> optax.GradientTransformation:
    """Muon (kellerjordan.github.io/posts/muon) for hidden matrices; AdamW for embeddings, head and vectors.

    Both have Nesterov momentum, as optax combines them. Updates are scaled to the root mean square of AdamW's
    (2502.16982, section 2.2), so one learning rate serves both.
    """
    dimensions: dict[str, Any] = {}
    for name, known in parameters.items():
        letters = known.axes.split()
        start = stacked(known.axes)
        hidden = known.inputs > 0 and not {"V", "S"} & set(letters)
        middle = start + known.inputs
        dimensions[name] = (
            optax.contrib.MuonDimensionNumbers(
                reduction_axis=tuple(range(start, middle)), output_axis=tuple(range(middle, len(letters)))
            )
            if hidden
            else None
        )
    return optax.contrib.muon(
        -1.0,  # optax subtracts; weight decay and learning rate come after, for they are the same for both
        beta=MUON_B1 if optimizer.b1 is None else optimizer.b1,
        adam_b1=B1 if optimizer.b1 is None else optimizer.b1,
        adam_b2=optimizer.b2,
        eps=optimizer.eps,
        mu_dtype=jnp.dtype(optimizer.momentum_dtype),
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
    )


def update(
    transformation: optax.GradientTransformation, gradients: Any, state: Any, parameters: dict[str, jax.Array]
) -> tuple[Any, Any]:
    """New parameters and optimizer state.

    The optimizer is written as for one device: on a mesh the compiler splits it, and the results stay where they were.
    """

    def apply(gradients: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transformation.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    if jax.sharding.get_abstract_mesh().empty:
        return apply(gradients, state, parameters)
    placed = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, (parameters, state))
    spread: Any = jax.sharding.auto_axes(apply, out_sharding=placed)
    return spread(gradients, state, parameters)

"""Optimizers and schedules by name, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..configs.run import Optimizer
from ..layers.sharding.axes import stacked
from ..zoo.parameters import Description

Descriptions = dict[str, Description]


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
    """The optax transformation, without clipping: weight decay on matrices alone, Muon on hidden matrices alone.

    Decay is decoupled (1711.05101) and scaled by the learning rate, for every optimizer.
    """
    rate = schedule(optimizer, steps)
    matrices = {name: known.inputs > 0 for name, known in parameters.items()}
    decay, b1, b2 = optimizer.weight_decay, optimizer.b1, optimizer.b2
    dtype = jnp.dtype(optimizer.momentum_dtype)
    match optimizer.name:
        case "adamw":
            return optax.adamw(rate, b1=b1, b2=b2, eps=optimizer.eps, mu_dtype=dtype, weight_decay=decay, mask=matrices)
        case "lion":  # 2302.06675
            return optax.lion(rate, b1=b1, b2=b2, mu_dtype=dtype, weight_decay=decay, mask=matrices)
        case "adafactor":  # 1804.04235
            return optax.chain(
                optax.scale_by_factored_rms(decay_rate=0.8),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(decay, matrices),
                optax.scale_by_learning_rate(rate),
            )
        case "sgd":
            return optax.chain(
                optax.trace(decay=b1, nesterov=True, accumulator_dtype=dtype),
                optax.add_decayed_weights(decay, matrices),
                optax.scale_by_learning_rate(rate),
            )
        case "muon":
            return _muon(optimizer, rate, parameters)


def _muon(optimizer: Optimizer, rate: optax.Schedule, parameters: Descriptions) -> optax.GradientTransformation:
    """Muon (kellerjordan.github.io/posts/muon) on hidden matrices; embeddings, head and vectors by AdamW.

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
    direction = optax.contrib.muon(
        -1.0,  # optax subtracts; decay and learning rate come after, for they are the same for both
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        eps=optimizer.eps,
        mu_dtype=jnp.dtype(optimizer.momentum_dtype),
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
    )
    matrices = {name: known.inputs > 0 for name, known in parameters.items()}
    return optax.chain(
        direction,
        optax.add_decayed_weights(optimizer.weight_decay, matrices),
        optax.scale_by_learning_rate(rate),
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

"""A stack of layers that are distributed over the stages of a pipeline, with the 1F1B schedule.

The devices along a mesh axis are P stages, each with L / P layers. Time is divided into ticks: in tick t, stage p runs
the backward pass of micro-batch t - (2P - 1 - p) and the forward pass of micro-batch t - p, and sends both results to
its neighbours. For 2 stages and 3 micro-batches, with f for a forward and b for a backward pass:

    tick       0    1  |   2      3  |   4    5
    stage 0   f0   f1  |  f2     b0  |  b1   b2        the first P ticks only run forward, the last P only backward
    stage 1        f0  |  b0 f1  b1 f2  |  b2

A step takes the time of M + P - 1 micro-batches instead of M. A stage stores the residuals of at most 2P - 1
micro-batches, for any M (PipeDream-Flush, 2006.09503; Megatron, 2104.04473). The output of the last stage is scattered
along T, so that the loss of each token is computed once, by one of the stages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from . import stages
from .axes import zeros_like
from .deferred_gradient import DeferredGradient

MicroBatch = dict[str, Array]
"""Arrays B T: `tokens`, `segments` (0: padding), `weights` (of each token in the loss) and others."""


@dataclass(frozen=True)
class Parts:
    """A model as functions; `outer` are the weights outside of the stack.

    All but `token_loss` return x, B T D, and reports: a pytree of sums over tokens that are not padding.
    """

    before_stack: Callable[[Any, Array, MicroBatch], tuple[Array, Any]]
    """(outer, tokens, micro-batch) -> the input of the stack."""
    layer: Callable[[Any, Array, MicroBatch], tuple[Array, Any]]
    """(weights of the layer, x, micro-batch) -> the output of one layer of the stack."""
    after_stack: Callable[[Any, Array, MicroBatch], tuple[Array, Any]]
    """(outer, x, micro-batch) -> the output of the layers after the stack."""
    token_loss: Callable[[Any, Array, MicroBatch], tuple[Array, Array]]
    """(outer, x, micro-batch) -> the loss, and a sum without gradient; it treats each token on its own."""


class Sums(NamedTuple):
    """Sums over all micro-batches."""

    loss: Float[Array, ""]
    other: Float[Array, ""]
    """The sum without gradient."""
    reports: Any
    """Of the part before the stack, of each layer of the stack (with a leading L), and of the part after it."""


REPLICATED, BY_STAGE = PartitionSpec(), PartitionSpec(stages.AXIS)
SPECS_OF_SUMS: Any = Sums(*(REPLICATED, REPLICATED, (REPLICATED, BY_STAGE, REPLICATED)))  # pyright: ignore
"""How `Sums` are split over stages."""


def forward(parts: Parts, outer: Any, stack: Any, micro_batches: MicroBatch) -> Sums:
    """Sums over micro-batches, M B T, under a mesh with stages; leaves of `stack` have a leading L."""

    def run_stage(*arrays: Any) -> Sums:
        return _Stage(parts, *arrays).forward()

    return stages.run(run_stage, (REPLICATED, BY_STAGE, REPLICATED), SPECS_OF_SUMS)(outer, stack, micro_batches)


def gradients(
    parts: Parts, outer: Any, stack: Any, micro_batches: MicroBatch, report_cotangents: Any = None
) -> tuple[Sums, tuple[Any, Any]]:
    """The sums of `forward`, and gradients in the weights, `outer` and `stack`.

    The gradients are those of the loss plus, if `report_cotangents` are passed, the sum of reports times these.
    """

    def run_stage(outer: Any, stack: Any, micro_batches: MicroBatch, *cotangents: Any) -> Any:
        stage = _Stage(parts, outer, stack, micro_batches)
        return stage.gradients(*cotangents or (zeros_like(stage.forward_shapes.reports),))

    optional = () if report_cotangents is None else (report_cotangents,)
    in_specs = REPLICATED, BY_STAGE, REPLICATED, *[SPECS_OF_SUMS.reports for _ in optional]
    function = stages.run(run_stage, in_specs, (SPECS_OF_SUMS, (REPLICATED, BY_STAGE)))
    return function(outer, stack, micro_batches, *optional)


class _Forward(NamedTuple):
    """The results of a micro-batch's forward pass through a stage."""

    x: Array
    """The output of the layers of this stage."""
    y: Array
    """The output of the part after the stack; meaningful only on the last stage."""
    reports: Any
    residuals: Any


class _State(NamedTuple):
    """What a stage carries from tick to tick."""

    x: Array
    """The output of the previous stage."""
    grad: Array
    """The gradient of this stage's x, from the next stage."""
    y_grad: Array
    """The gradient of the y of the previous tick."""
    residuals: Any
    """Residuals of the micro-batches in flight: a ring buffer."""
    sums: Sums
    weights_grad: Any
    """Gradients of the weights outside and inside of the stack."""


class _Stage:
    """The computation of one stage."""

    def __init__(self, parts: Parts, outer: Any, stack: Any, micro_batches: MicroBatch):
        self.parts, self.outer, self.stack, self.micro_batches = parts, outer, stack, micro_batches
        self.stages, self.index = stages.count(), stages.index()
        self.is_first, self.is_last = self.index == 0, self.index == self.stages - 1
        self.count = micro_batches["tokens"].shape[0]
        self.slots = 2 * self.stages - 1
        """The maximum number of micro-batches in flight, reached by the first stage."""
        zero = jnp.zeros((), jnp.int32)
        micro = self.micro_batch(zero)
        self.x = zeros_like(jax.eval_shape(parts.before_stack, outer, micro["tokens"], micro)[0])
        self.before_stack = DeferredGradient(parts.before_stack, outer, micro["tokens"], micro)
        self.layer = DeferredGradient(parts.layer, jax.tree.map(lambda leaf: leaf[0], stack), self.x, micro)
        self.after_stack = DeferredGradient(parts.after_stack, outer, self.x, micro)
        self.forward_shapes = jax.eval_shape(self.forward_tick, zero, self.x)

    def exists(self, index: Array) -> Array:
        """Whether there is a micro-batch of this index."""
        return (index >= 0) & (index < self.count)

    def micro_batch(self, index: Array) -> MicroBatch:
        """The micro-batch of an index; if it does not exist, the nearest one, marked as padding with zero weights.

        An idle stage therefore computes finite numbers, which add nothing to any sum.
        """
        nearest = jnp.clip(index, 0, self.count - 1)
        micro = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, nearest, keepdims=False), self.micro_batches)
        return micro | _where(self.exists(index), {name: micro[name] for name in ("segments", "weights")})

    # One tick ---------------------------------------------------------------------------------------------------------

    def forward_tick(self, tick: Array, x: Array) -> _Forward:
        """Runs a micro-batch forward through this stage; x is the output of the previous stage."""
        index = tick - self.index
        micro = self.micro_batch(index)

        def layer(x: Array, weights: Any) -> tuple[Array, Any]:
            (x, report), residuals = self.layer.forward(weights, x, micro)
            return x, (report, residuals)

        (embedded, before), of_before = self.before_stack.forward(self.outer, micro["tokens"], micro)
        x = jax.lax.select(self.is_first | ~self.exists(index), embedded, x)
        x, (stack, of_layers) = jax.lax.scan(layer, x, self.stack)
        (y, after), of_after = self.after_stack.forward(self.outer, x, micro)
        return _Forward(x, y, (before, stack, after), (of_before, of_layers, of_after))

    def backward_tick(self, tick: Array, state: _State, report_cotangents: Any) -> tuple[Array, Any]:
        """Runs a micro-batch backward through this stage: the gradient of its x, and those of the weights."""
        index = tick - (2 * self.stages - 1 - self.index)
        micro, exists = self.micro_batch(index), self.exists(index)
        # Slot 0 is filled in the first tick. The zeros of a slot that is not filled yet could be divided by.
        slot = jnp.where(exists, (index + self.index) % self.slots, 0)
        of_before, of_layers, of_after = jax.tree.map(partial(_read, slot=slot), state.residuals)
        before, stack, after = _where(exists, report_cotangents)

        def layer(grad: Array, inputs: Any) -> tuple[Array, Any]:
            weights, residuals, cotangent = inputs
            weights_grad, grad = self.layer.backward(weights, micro, residuals, (grad, cotangent))
            return grad, weights_grad

        y_grad = _where(self.is_last, (_where(exists, state.y_grad), after))
        after_grad, grad = self.after_stack.backward(self.outer, micro, of_after, y_grad)
        grad = jax.lax.select(self.is_last, grad, state.grad)
        grad, stack_grad = jax.lax.scan(layer, grad, (self.stack, of_layers, stack), reverse=True)
        x_grad = _where(self.is_first, (grad, before))
        before_grad, _ = self.before_stack.backward(self.outer, micro, of_before, x_grad)
        return grad, (_add(after_grad, before_grad), stack_grad)

    def own_tokens(self, tick: Array, y: Array) -> tuple[Array, MicroBatch]:
        """The tokens whose loss this stage computes, of the micro-batch that the last stage has finished."""
        micro = self.micro_batch(tick - (self.stages - 1))
        own = {name: stages.own_slice(array, y) for name, array in micro.items()}
        return stages.scatter(_where(self.is_last, y)), own

    # All ticks --------------------------------------------------------------------------------------------------------

    def forward(self) -> Sums:
        """Sums over all micro-batches."""

        def step(state: tuple[Array, Sums], tick: Array) -> tuple[tuple[Array, Sums], None]:
            result = self.forward_tick(tick, state[0])  # XLA removes the residuals, which are not used
            loss, other = self.parts.token_loss(self.outer, *self.own_tokens(tick, result.y))
            return (stages.shift(result.x, 1), _add(state[1], Sums(loss, other, result.reports))), None

        start = self.x, self.zero_sums()
        (_, sums), _ = jax.lax.scan(step, start, self.ticks(0, self.count + self.stages - 1))
        return self.totals(sums)

    def gradients(self, report_cotangents: Any) -> tuple[Sums, tuple[Any, Any]]:
        """Sums over all micro-batches, and gradients of the weights."""

        def forward(state: _State, tick: Array) -> _State:
            result = self.forward_tick(tick, state.x)
            tokens, micro = self.own_tokens(tick, result.y)

            def token_loss(outer: Any, tokens: Array) -> tuple[Array, Array]:
                return self.parts.token_loss(outer, tokens, micro)

            loss, pullback, other = jax.vjp(token_loss, self.outer, tokens, has_aux=True)
            outer, y_grad = pullback(jnp.ones_like(loss))
            return state._replace(
                x=stages.shift(result.x, 1),
                y_grad=stages.gather(y_grad),
                residuals=jax.tree.map(partial(_write, slot=tick % self.slots), state.residuals, result.residuals),
                sums=_add(state.sums, Sums(loss, other, result.reports)),
                weights_grad=(_add(state.weights_grad[0], outer), state.weights_grad[1]),
            )

        def backward(state: _State, tick: Array) -> _State:
            grad, weights = self.backward_tick(tick, state, report_cotangents)
            return state._replace(grad=stages.shift(grad, -1), weights_grad=_add(state.weights_grad, weights))

        def both(state: _State, tick: Array) -> _State:
            return forward(backward(state, tick), tick)

        state = self.zero_state()
        first, last = self.stages, self.count + self.stages - 1
        phases = (forward, 0, first), (both, first, last), (backward, last, last + self.stages)
        for phase, begin, end in phases:
            if begin < end:
                state, _ = jax.lax.scan(lambda *inputs, f=phase: (f(*inputs), None), state, self.ticks(begin, end))
        outer, stack = state.weights_grad
        return self.totals(state.sums), (stages.total(outer), stack)

    def ticks(self, begin: int, end: int) -> Array:
        """The numbers of ticks from `begin` to `end`, exclusive."""
        return jnp.arange(begin, end, dtype=jnp.int32)

    def zero_sums(self) -> Sums:
        """The initial value of sums."""
        return Sums(jnp.zeros(()), jnp.zeros(()), zeros_like(self.forward_shapes.reports))

    def zero_state(self) -> _State:
        """The state before the first tick."""
        shapes, weights_grad = self.forward_shapes, zeros_like((self.outer, self.stack))
        residuals = jax.tree.map(lambda leaf: zeros_like(leaf, self.slots), shapes.residuals)
        return _State(self.x, self.x, zeros_like(shapes.y), residuals, self.zero_sums(), weights_grad)

    def totals(self, sums: Sums) -> Sums:
        """Sums over all stages. Every stage runs the parts outside of the stack; only one of the results counts."""
        before, stack, after = sums.reports
        reports = stages.total(_where(self.is_first, before)), stack, stages.total(_where(self.is_last, after))
        return Sums(stages.total(sums.loss), stages.total(sums.other), reports)


def _where(condition: Array, tree: Any) -> Any:
    """The arrays of a tree if the condition holds, else zeros."""
    return jax.tree.map(lambda x: jax.lax.select(condition, x, jnp.zeros_like(x)), tree)


def _add(first: Any, second: Any) -> Any:
    return jax.tree.map(jnp.add, first, second)


def _write(queue: Array, x: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(queue, x, slot, 0)


def _read(queue: Array, slot: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(queue, slot, keepdims=False)

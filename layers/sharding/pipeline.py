"""A stack of layers whose parts live on different devices, and through which micro-batches pass (1F1B).

The devices of a mesh axis are P stages, each with L / P layers. All do the same thing at the same time, in ticks: in
tick t, stage p takes micro-batch t - (2P - 1 - p) backward and micro-batch t - p forward, and passes both on. For 2
stages and 3 micro-batches, with f and b for a pass forward and backward:

    tick       0    1  |   2      3  |   4    5
    stage 0   f0   f1  |  f2     b0  |  b1   b2        the first P ticks go forward alone, the last P backward alone
    stage 1        f0  |  b0 f1  b1 f2  |  b2

So a step takes the time of M + P - 1 micro-batches in place of M, and a stage holds what the gradients of at most
2P - 1 micro-batches need, however many there are (PipeDream-Flush, 2006.09503; Megatron, 2104.04473). What leaves the
last stage is shared out along T: the loss of a token is computed once, by one of the stages.
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
"""Arrays B T: `tokens`, `segments` (0: padding), `weights` (of each token in the loss) and what else there is."""


@dataclass(frozen=True)
class Parts:
    """A model as functions, of which all but the last return x, B T D, and reports: a pytree of sums over tokens that
    are no padding. `outer` are the weights outside of the stack.
    """

    enter: Callable[[Any, Array, MicroBatch], tuple[Array, Any]]
    """What stands before the stack: (outer, tokens, micro-batch)."""
    layer: Callable[[Any, Array, MicroBatch], tuple[Array, Any]]
    """One of the stack: (its weights, x, micro-batch)."""
    leave: Callable[[Any, Array, MicroBatch], tuple[Array, Any]]
    """What stands after the stack: (outer, x, micro-batch)."""
    finish: Callable[[Any, Array, MicroBatch], tuple[Array, Array]]
    """What treats each token alone: (outer, x, micro-batch) -> the loss, and a sum that has no gradient."""


class Sums(NamedTuple):
    """Of all micro-batches."""

    loss: Float[Array, ""]
    other: Float[Array, ""]
    """The sum that has no gradient."""
    reports: Any
    """Of what stands before the stack, of each of its layers (with a leading L), and of what stands after it."""


EVERYWHERE, HERE = PartitionSpec(), PartitionSpec(stages.AXIS)
OF_SUMS: Any = Sums(*(EVERYWHERE, EVERYWHERE, (EVERYWHERE, HERE, EVERYWHERE)))  # pyright: ignore
"""What each stage has of all sums."""


def forward(parts: Parts, outer: Any, stack: Any, micro_batches: MicroBatch) -> Sums:
    """What comes of micro-batches, M B T, under a mesh with stages; leaves of `stack` have a leading L."""

    def each(*arrays: Any) -> Sums:
        return _Stage(parts, *arrays).forward()

    return stages.run(each, (EVERYWHERE, HERE, EVERYWHERE), OF_SUMS)(outer, stack, micro_batches)


def gradients(
    parts: Parts, outer: Any, stack: Any, micro_batches: MicroBatch, prices: Any = None
) -> tuple[Sums, tuple[Any, Any]]:
    """What `forward` gives, and gradients in the weights, `outer` and `stack`.

    They are those of the loss and, where there are `prices`, of the sum of the reports times these.
    """

    def each(outer: Any, stack: Any, micro_batches: MicroBatch, *prices: Any) -> Any:
        stage = _Stage(parts, outer, stack, micro_batches)
        return stage.gradients(*prices or (zeros_like(stage.ahead_shapes.reports),))

    more = () if prices is None else (prices,)
    in_specs = EVERYWHERE, HERE, EVERYWHERE, *[OF_SUMS.reports for _ in more]
    return stages.run(each, in_specs, (OF_SUMS, (EVERYWHERE, HERE)))(outer, stack, micro_batches, *more)


class _Ahead(NamedTuple):
    """What comes of a micro-batch on its way forward through a stage."""

    x: Array
    """After the layers of this stage."""
    y: Array
    """After what stands behind the stack: it means something on the last stage."""
    reports: Any
    kept: Any


class _State(NamedTuple):
    """What a stage goes from tick to tick with."""

    x: Array
    """From the stage before."""
    grad: Array
    """Of x, from the stage after."""
    y_grad: Array
    """Of what left the stack in the tick before."""
    kept: Any
    """For the gradients of the micro-batches that are under way: a queue in a ring."""
    sums: Sums
    weights_grad: Any
    """Of the weights of the outside and of the stack."""


class _Stage:
    """What the devices of one stage do."""

    def __init__(self, parts: Parts, outer: Any, stack: Any, micro_batches: MicroBatch):
        self.parts, self.outer, self.stack, self.micro_batches = parts, outer, stack, micro_batches
        self.stages, self.place = stages.count(), stages.place()
        self.is_first, self.is_last = self.place == 0, self.place == self.stages - 1
        self.count = micro_batches["tokens"].shape[0]
        self.slots = 2 * self.stages - 1
        """How many micro-batches are under way at most: those of the first stage."""
        zero = jnp.zeros((), jnp.int32)
        micro = self.micro(zero)
        self.x = zeros_like(jax.eval_shape(parts.enter, outer, micro["tokens"], micro)[0])
        self.enter = DeferredGradient(parts.enter, outer, micro["tokens"], micro)
        self.layer = DeferredGradient(parts.layer, jax.tree.map(lambda leaf: leaf[0], stack), self.x, micro)
        self.leave = DeferredGradient(parts.leave, outer, self.x, micro)
        self.ahead_shapes = jax.eval_shape(self.ahead, zero, self.x)

    def there(self, index: Array) -> Array:
        """Whether there is a micro-batch of this index."""
        return (index >= 0) & (index < self.count)

    def micro(self, index: Array) -> MicroBatch:
        """The micro-batch of an index; where there is none the nearest, as padding of no weight.

        So what is computed where a stage has nothing to do is as finite as the rest, and adds nothing.
        """
        nearest = jnp.clip(index, 0, self.count - 1)
        found = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, nearest, keepdims=False), self.micro_batches)
        return found | _if(self.there(index), {name: found[name] for name in ("segments", "weights")})

    # What is done in a tick -------------------------------------------------------------------------------------------

    def ahead(self, tick: Array, x: Array) -> _Ahead:
        """A micro-batch through this stage; x is what the stage before passed on."""
        index = tick - self.place
        micro = self.micro(index)

        def layer(x: Array, weights: Any) -> tuple[Array, Any]:
            (x, report), kept = self.layer.forward(weights, x, micro)
            return x, (report, kept)

        (entered, before), *kept = self.enter.forward(self.outer, micro["tokens"], micro)
        x = jax.lax.select(self.is_first | ~self.there(index), entered, x)
        x, (stack, of_layers) = jax.lax.scan(layer, x, self.stack)
        (y, after), of_leave = self.leave.forward(self.outer, x, micro)
        return _Ahead(x, y, (before, stack, after), (*kept, of_layers, of_leave))

    def back(self, tick: Array, state: _State, prices: Any) -> tuple[Array, Any]:
        """The gradient of a micro-batch back through this stage: that of its x, and those of the weights."""
        index = tick - (2 * self.stages - 1 - self.place)
        micro, there = self.micro(index), self.there(index)
        # Slot 0 was filled in the first tick. What was not filled yet could divide by its zeros.
        slot = jnp.where(there, (index + self.place) % self.slots, 0)
        of_enter, of_layers, of_leave = jax.tree.map(partial(_taken, slot=slot), state.kept)
        before, stack, after = _if(there, prices)

        def layer(grad: Array, each: Any) -> tuple[Array, Any]:
            weights, kept, price = each
            weights, grad = self.layer.backward(weights, micro, kept, (grad, price))
            return grad, weights

        y_grad = _if(self.is_last, (_if(there, state.y_grad), after))
        outer, grad = self.leave.backward(self.outer, micro, of_leave, y_grad)
        grad = jax.lax.select(self.is_last, grad, state.grad)
        grad, stack = jax.lax.scan(layer, grad, (self.stack, of_layers, stack), reverse=True)
        more, _ = self.enter.backward(self.outer, micro, of_enter, _if(self.is_first, (grad, before)))
        return grad, (_added(outer, more), stack)

    def share(self, tick: Array, y: Array) -> tuple[Array, MicroBatch]:
        """What this stage computes the loss of, of a micro-batch that left the last stage."""
        micro = self.micro(tick - (self.stages - 1))
        return stages.shared(_if(self.is_last, y)), {name: stages.cut(array, y) for name, array in micro.items()}

    # All ticks --------------------------------------------------------------------------------------------------------

    def forward(self) -> Sums:
        """Sums over all micro-batches."""

        def step(state: tuple[Array, Sums], tick: Array) -> tuple[tuple[Array, Sums], None]:
            found = self.ahead(tick, state[0])  # what it keeps nobody asks for, and XLA leaves it out
            loss, other = self.parts.finish(self.outer, *self.share(tick, found.y))
            return (stages.passed(found.x, 1), _added(state[1], Sums(loss, other, found.reports))), None

        start = self.x, self.no_sums()
        (_, sums), _ = jax.lax.scan(step, start, self.ticks(0, self.count + self.stages - 1))
        return self.whole(sums)

    def gradients(self, prices: Any) -> tuple[Sums, tuple[Any, Any]]:
        """Sums over all micro-batches, and gradients of the weights."""

        def ahead(state: _State, tick: Array) -> _State:
            found = self.ahead(tick, state.x)
            share, micro = self.share(tick, found.y)

            def finish(outer: Any, share: Array) -> tuple[Array, Array]:
                return self.parts.finish(outer, share, micro)

            loss, back, other = jax.vjp(finish, self.outer, share, has_aux=True)
            outer, y_grad = back(jnp.ones_like(loss))
            return state._replace(
                x=stages.passed(found.x, 1),
                y_grad=stages.gathered(y_grad),
                kept=jax.tree.map(partial(_put, slot=tick % self.slots), state.kept, found.kept),
                sums=_added(state.sums, Sums(loss, other, found.reports)),
                weights_grad=(_added(state.weights_grad[0], outer), state.weights_grad[1]),
            )

        def back(state: _State, tick: Array) -> _State:
            grad, weights = self.back(tick, state, prices)
            return state._replace(grad=stages.passed(grad, -1), weights_grad=_added(state.weights_grad, weights))

        found = self.ahead_shapes
        kept = jax.tree.map(lambda leaf: zeros_like(leaf, self.slots), found.kept)
        state = _State(self.x, self.x, zeros_like(found.y), kept, self.no_sums(), zeros_like((self.outer, self.stack)))
        first, last = self.stages, self.count + self.stages - 1
        for phase, begin, end in (
            (ahead, 0, first),
            (lambda state, tick: ahead(back(state, tick), tick), first, last),
            (back, last, last + self.stages),
        ):
            if begin < end:
                state, _ = jax.lax.scan(lambda *each, phase=phase: (phase(*each), None), state, self.ticks(begin, end))
        outer, stack = state.weights_grad
        return self.whole(state.sums), (stages.summed(outer), stack)

    def ticks(self, begin: int, end: int) -> Array:
        """Their numbers."""
        return jnp.arange(begin, end, dtype=jnp.int32)

    def no_sums(self) -> Sums:
        """What sums begin with."""
        return Sums(jnp.zeros(()), jnp.zeros(()), zeros_like(self.ahead_shapes.reports))

    def whole(self, sums: Sums) -> Sums:
        """The sums of all stages; every stage ran what stands before and after the stack, but for one it was idle."""
        before, stack, after = sums.reports
        reports = stages.summed(_if(self.is_first, before)), stack, stages.summed(_if(self.is_last, after))
        return Sums(stages.summed(sums.loss), stages.summed(sums.other), reports)


def _if(condition: Array, tree: Any) -> Any:
    """Zeros in place of all arrays where the condition does not hold."""
    return jax.tree.map(lambda x: jax.lax.select(condition, x, jnp.zeros_like(x)), tree)


def _added(first: Any, second: Any) -> Any:
    return jax.tree.map(jnp.add, first, second)


def _put(queue: Array, x: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(queue, x, slot, 0)


def _taken(queue: Array, slot: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(queue, slot, keepdims=False)

"""Attention over a sequence that is split over the devices of a mesh axis.

Every device keeps its queries. In a ring (2310.01889) the keys and values are passed from device to device; each device
merges its output with that for the part it has received, while the next part is being copied. With all_gather (Llama 3,
2407.21783, section 3.3.2) every device has all keys and values at once, which is faster while they are few.

Under a causal mask the devices with late queries would have most of the work. So the sequence is split into twice as
many chunks as devices, and device i works on chunks i and 2n - 1 - i; the output is returned in the original order.
Which order is used, and how far keys are passed, follows from the mask on intervals: for a window, keys are passed no
farther than it reaches.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ...spec import unknown
from .blocks import may_see
from .pair_function import PairFunction, Side, Sizes
from .problem import Gradients, Operands, Problem, differentiable, tangents_of

Method = Literal["ring", "all_gather"]


@dataclass(frozen=True)
class Context:
    """How the devices of a mesh axis share attention; its methods run on each device, inside `jax.shard_map`."""

    axis: str
    devices: int
    method: Method
    balanced: bool
    """Whether a device works on an early and a late chunk."""
    first: int
    """A device starts with the keys of the device this many places before it; 0 for its own."""
    steps: int
    """The number of parts of the keys that a device uses."""

    # Order ------------------------------------------------------------------------------------------------------------

    def balanced_order(self, problem: Problem, operands: Operands) -> Operands:
        """The operands in the order of the computation."""
        if not self.balanced:
            return operands
        operands = _map(self._exchanged, "query", problem, operands)
        return operands if self.method == "all_gather" else _map(self._exchanged, "key", problem, operands)

    def original_order(self, array: Array, dim: int) -> Array:
        """An array of queries, back in the order of the sequence."""
        return self._exchanged(array, dim, back=True) if self.balanced else array

    def _exchanged(self, array: Array, dim: int, back: bool = False) -> Array:
        """Exchanges chunks 2i and 2i + 1 of device i for chunks i and 2n - 1 - i.

        One of the latter is even and one is odd, so one permutation of the devices moves all even chunks, and another
        all odd ones.
        """
        owners = [chunk if chunk < self.devices else 2 * self.devices - 1 - chunk for chunk in range(2 * self.devices)]
        routes = [list(enumerate(owners[parity::2])) for parity in (0, 1)]
        is_even = jax.lax.axis_index(self.axis) % 2 == 0
        halves = jnp.split(array, 2, axis=dim)
        if back:
            routes = [[(end, start) for start, end in route] for route in routes]
            halves = _swapped_unless(is_even, halves)
        halves = [jax.lax.ppermute(x, self.axis, route) for x, route in zip(halves, routes, strict=True)]
        return jnp.concatenate(halves if back else _swapped_unless(is_even, halves), axis=dim)

    # The three passes -------------------------------------------------------------------------------------------------

    def forward(self, attention: Any, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        """Attention of this device's queries to all keys; `attention(problem, operands)` is that to some keys."""
        part = _part(problem)
        if self.method == "all_gather":
            out, lse = attention(part, self.gathered(problem, operands))
            return out.astype(problem.out_dtype), lse

        def step(state: Any, rotated: Any) -> Any:
            operands, *total = state
            return rotated(problem, operands), *_merged(*total, *attention(part, operands))

        (batch, length, heads, _), size = operands.q.shape, operands.v.shape[3]
        empty = jnp.zeros((batch, length, heads, size), jnp.float32), jnp.full((batch, heads, length), -jnp.inf)
        start = self._rotated(problem, operands, self.first), *empty
        _, out, lse = self._round(step, start)
        return out.astype(problem.out_dtype), lse

    def backward(
        self, gradients: Any, problem: Problem, operands: Operands, lse: Array, delta: Array, out_grad: Array
    ) -> Gradients:
        """Gradients; `gradients(problem, operands, lse, delta, out_grad)` are those of attention to some keys.

        The gradients of keys are passed along with them, one step behind, so that they are copied during computation.
        """
        part, like = _part(problem), tangents_of(operands)
        if self.method == "all_gather":
            sums = gradients(part, self.gathered(problem, operands), lse, delta, out_grad)
            scattered = partial(jax.lax.psum_scatter, axis_name=self.axis, tiled=True)
            sums = _map_gradients(lambda x, dim: scattered(x, scatter_dimension=dim), problem, operands, sums)
        else:

            def step(state: Any, rotated: Any) -> Any:
                operands, sums = state
                terms = gradients(part, operands, lse, delta, out_grad)
                sums = _map_gradients(self._moved, problem, operands, sums)
                return rotated(problem, operands), jax.tree.map(jnp.add, sums, terms)

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
            start = self._rotated(problem, operands, self.first), zeros
            _, sums = self._round(step, start)
            to_owner = partial(self._moved, places=1 - self.first - self.steps)
            sums = _map_gradients(to_owner, problem, operands, sums)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), sums, like)

    def tangent(
        self, tangent: Any, problem: Problem, operands: Operands, out: Array, lse: Array, moved: Gradients
    ) -> tuple[Array, Array]:
        """The directional derivative; `tangent(problem, operands, out, lse, moved)` is the term of some keys."""
        part = _part(problem)
        if self.method == "all_gather":
            moved = _map_gradients(self._gather, problem, operands, moved)
            t_out, t_lse = tangent(part, self.gathered(problem, operands), out, lse, moved)
            return t_out.astype(problem.out_dtype), t_lse

        def step(state: Any, rotated: Any) -> Any:
            operands, moved, *sums = state
            terms = tangent(part, operands, out, lse, moved)
            ahead = rotated(problem, operands), _map_gradients(self._moved, problem, operands, moved)
            return *ahead, *jax.tree.map(jnp.add, tuple(sums), terms)

        turn = partial(self._moved, places=self.first)
        start = self._rotated(problem, operands, self.first), _map_gradients(turn, problem, operands, moved)
        zeros = jnp.zeros(out.shape, jnp.float32), jnp.zeros(lse.shape, jnp.float32)
        *_, t_out, t_lse = self._round(step, (*start, *zeros))
        return t_out.astype(problem.out_dtype), t_lse

    def _round(self, step: Callable[[Any, Any], Any], state: Any) -> Any:
        """All steps of the ring; `step(state, rotated)` passes the keys on by `rotated(problem, operands)`.

        Two steps or fewer, as for a window, are unrolled, and nothing is copied after the last. More are a loop, which
        overlaps copies with computation; the copies of its last step are not used.
        """
        if self.steps > 2:
            return jax.lax.fori_loop(0, self.steps, lambda _, state: step(state, self._rotated), state)
        for left in reversed(range(self.steps)):
            state = step(state, self._rotated if left else lambda problem, operands: operands)
        return state

    def gathered(self, problem: Problem, operands: Operands) -> Operands:
        """The operands with the keys of all devices."""
        return _map(self._gather, "key", problem, operands)

    def _gather(self, array: Array, dim: int) -> Array:
        return jax.lax.all_gather(array, self.axis, axis=dim, tiled=True)

    def _rotated(self, problem: Problem, operands: Operands, places: int = 1) -> Operands:
        return _map(partial(self._moved, places=places), "key", problem, operands)

    def _moved(self, array: Array, dim: int, places: int = 1) -> Array:
        """The array of the device this many places before this one."""
        if places % self.devices == 0:
            return array
        route = [(device, (device + places) % self.devices) for device in range(self.devices)]
        return jax.lax.ppermute(array, self.axis, route)


def plan(mask: PairFunction, sizes: Sizes, axis: str, devices: int, method: Method) -> Context | None:
    """The order and the steps that cost least, by the mask on intervals; None if no query sees any key.

    In each step of a ring all devices wait for the one with most work. `sizes` are those of all devices together.
    """
    if method not in get_args(Method):
        raise unknown("context method", method, get_args(Method))
    halves = 1 if sizes.queries % (2 * devices) or sizes.keys % (2 * devices) else 2
    seen = may_see(mask, sizes, sizes.queries // (halves * devices), sizes.keys // (halves * devices))
    if not seen.any():
        return None
    device = np.arange(devices)
    options = []
    for balanced in (False, True)[:halves]:
        own = np.stack([device, 2 * devices - 1 - device]) if balanced else device * halves + np.arange(halves)[:, None]
        work = seen[np.ix_(own.T.ravel(), own.T.ravel())].reshape(devices, halves, devices, halves).sum((1, 3))
        of_step = np.array([max(work[device, device - places]) for places in range(devices)])
        cost = of_step.sum() if method == "ring" else work.sum(1).max()
        options.append((cost, balanced, *_arc(of_step > 0)))
    _, balanced, first, steps = min(options)
    return Context(axis, devices, method, balanced, first, steps)


def _arc(needed: np.ndarray) -> tuple[int, int]:
    """Start and length of the shortest arc of a circle that contains all needed places."""
    count = len(needed)
    arcs = [(start, 1 + max(np.flatnonzero(np.roll(needed, -start)))) for start in range(count)]
    start, length = min(arcs, key=lambda arc: arc[1])
    return start, int(length)


def _part(problem: Problem) -> Problem:
    """The problem for some of the keys; its results are merged with others in float32."""
    return dataclasses.replace(problem, out_dtype=jnp.float32, gradient_dtype=jnp.float32, context=None)


def _map(function: Callable[[Array, int], Array], side: Side, problem: Problem, operands: Operands) -> Operands:
    """Applies `function(array, dim)` to all operands of the queries, or of the keys."""

    def hoisted(of: PairFunction | None, arrays: list[Array]) -> list[Array]:
        values = () if of is None else of.hoisted
        return [function(x, 2) if value.side == side else x for value, x in zip(values, arrays, strict=True)]

    operands = operands._replace(
        mask_hoisted=hoisted(problem.mask, operands.mask_hoisted),
        score_hoisted=hoisted(problem.score, operands.score_hoisted),
    )
    assert operands.query_positions is not None
    assert operands.key_positions is not None
    if side == "query":
        return operands._replace(q=function(operands.q, 1), query_positions=function(operands.query_positions, 2))
    return operands._replace(
        k=function(operands.k, 1), v=function(operands.v, 1), key_positions=function(operands.key_positions, 2)
    )


def _map_gradients(
    function: Callable[[Array, int], Array], problem: Problem, operands: Operands, gradients: Gradients
) -> Gradients:
    """Applies `function(array, dim)` to the gradients of all operands of the keys."""
    q, k, v, hoisted = gradients
    values = () if problem.score is None else problem.score.hoisted
    trained = [value for value, x in zip(values, operands.score_hoisted, strict=True) if differentiable(x)]
    hoisted = [function(x, 2) if value.side == "key" else x for value, x in zip(trained, hoisted, strict=True)]
    return q, function(k, 1), function(v, 1), hoisted


def _merged(out: Array, lse: Array, new_out: Array, new_lse: Array) -> tuple[Array, Array]:
    """Attention to two sets of keys, from attention to each: (B T N Hv), (B N T)."""
    total = jnp.logaddexp(lse, new_lse)

    def share(lse: Array) -> Array:
        return jnp.swapaxes(jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - total)), 1, 2)[..., None]

    return out * share(lse) + new_out * share(new_lse), total


def _swapped_unless(condition: Array, halves: list[Array]) -> list[Array]:
    first, second = halves
    return [jnp.where(condition, first, second), jnp.where(condition, second, first)]

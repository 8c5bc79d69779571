"""Attention over a sequence that is split over the devices of a mesh axis.

Every device keeps its queries. In a ring (2310.01889) the keys and values travel from device to device, and what a
device has found so far is merged with what each part of them adds; the next part is on its way meanwhile. Gathered
(Llama 3, 2407.21783, section 3.3.2), every device has all keys and values at once: quicker while they are few.

Under a causal mask the devices with late queries would have most of the work. So the sequence is cut into twice as many
chunks as there are devices, and device i works on chunks i and 2n - 1 - i; the result returns to its place. Nobody
outside sees that order. Which order is taken, and how far keys travel, follows from what the mask shows when it is run
on intervals: for a window, nothing goes farther than it reaches.
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
    """How attention is done by the devices of a mesh axis; its methods are for each device, inside `jax.shard_map`."""

    axis: str
    devices: int
    method: Method
    balanced: bool
    """Whether a device works on an early and a late chunk."""
    first: int
    """The keys that a device begins with are its own (0), or those of the device so many before it."""
    steps: int
    """How many parts of the keys come by."""

    # Order ------------------------------------------------------------------------------------------------------------

    def spread(self, problem: Problem, operands: Operands) -> Operands:
        """The operands in the order that is worked in."""
        if not self.balanced:
            return operands
        operands = _map(self._exchanged, "query", problem, operands)
        return operands if self.method == "all_gather" else _map(self._exchanged, "key", problem, operands)

    def restored(self, array: Array, dim: int) -> Array:
        """An array of queries in the order of the sequence again."""
        return self._exchanged(array, dim, back=True) if self.balanced else array

    def _exchanged(self, array: Array, dim: int, back: bool = False) -> Array:
        """Chunks 2i and 2i + 1 of device i, exchanged for chunks i and 2n - 1 - i.

        Of these two, one is even and one is odd, so all even chunks move by one permutation of the devices, and all odd
        ones by another.
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
        """Attention of this device's queries to all keys; `attention(problem, operands)` is that to some of them."""
        part = _part(problem)
        if self.method == "all_gather":
            out, lse = attention(part, self.gathered(problem, operands))
            return out.astype(problem.out_dtype), lse

        def step(state: Any, rotated: Any) -> Any:
            operands, *found = state
            return rotated(problem, operands), *_merged(*found, *attention(part, operands))

        (batch, length, heads, _), size = operands.q.shape, operands.v.shape[3]
        nothing = jnp.zeros((batch, length, heads, size), jnp.float32), jnp.full((batch, heads, length), -jnp.inf)
        start = self._rotated(problem, operands, self.first), *nothing
        _, out, lse = self._round(step, start)
        return out.astype(problem.out_dtype), lse

    def backward(
        self, gradients: Any, problem: Problem, operands: Operands, lse: Array, delta: Array, out_grad: Array
    ) -> Gradients:
        """Gradients; `gradients(problem, operands, lse, delta, out_grad)` are those of attention to some keys.

        The gradients of keys travel with them, one step behind, so that they too move while products are computed.
        """
        part, wanted = _part(problem), tangents_of(operands)
        if self.method == "all_gather":
            found = gradients(part, self.gathered(problem, operands), lse, delta, out_grad)
            scattered = partial(jax.lax.psum_scatter, axis_name=self.axis, tiled=True)
            found = _map_gradients(lambda x, dim: scattered(x, scatter_dimension=dim), problem, operands, found)
        else:

            def step(state: Any, rotated: Any) -> Any:
                operands, sums = state
                found = gradients(part, operands, lse, delta, out_grad)
                sums = _map_gradients(self._moved, problem, operands, sums)
                return rotated(problem, operands), jax.tree.map(jnp.add, sums, found)

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), wanted)
            start = self._rotated(problem, operands, self.first), zeros
            _, found = self._round(step, start)
            home = partial(self._moved, places=1 - self.first - self.steps)
            found = _map_gradients(home, problem, operands, found)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), found, wanted)

    def tangent(
        self, tangent: Any, problem: Problem, operands: Operands, out: Array, lse: Array, moved: Gradients
    ) -> tuple[Array, Array]:
        """The directional derivative; `tangent(problem, operands, out, lse, moved)` is what some keys add to it."""
        part = _part(problem)
        if self.method == "all_gather":
            moved = _map_gradients(self._gather, problem, operands, moved)
            t_out, t_lse = tangent(part, self.gathered(problem, operands), out, lse, moved)
            return t_out.astype(problem.out_dtype), t_lse

        def step(state: Any, rotated: Any) -> Any:
            operands, moved, *sums = state
            found = tangent(part, operands, out, lse, moved)
            ahead = rotated(problem, operands), _map_gradients(self._moved, problem, operands, moved)
            return *ahead, *jax.tree.map(jnp.add, tuple(sums), found)

        turn = partial(self._moved, places=self.first)
        start = self._rotated(problem, operands, self.first), _map_gradients(turn, problem, operands, moved)
        zeros = jnp.zeros(out.shape, jnp.float32), jnp.zeros(lse.shape, jnp.float32)
        *_, t_out, t_lse = self._round(step, (*start, *zeros))
        return t_out.astype(problem.out_dtype), t_lse

    def _round(self, step: Callable[[Any, Any], Any], state: Any) -> Any:
        """All steps of the ring, each given what passes the keys on.

        Two or less, as a window has, are written out, and nothing moves after the last. More are a loop, whose last
        copies nobody needs, and which are on their way while products are computed.
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
        """What the device so many places before this one has."""
        if places % self.devices == 0:
            return array
        route = [(device, (device + places) % self.devices) for device in range(self.devices)]
        return jax.lax.ppermute(array, self.axis, route)


def plan(mask: PairFunction, sizes: Sizes, axis: str, devices: int, method: Method) -> Context | None:
    """The quickest way for a mask, as far as it is known now; None where it is known to hide everything.

    In a ring all wait for the one that has most to do in a step. `sizes` are those of all devices together.
    """
    if method not in get_args(Method):
        raise unknown("context method", method, get_args(Method))
    halves = 1 if sizes.queries % (2 * devices) or sizes.keys % (2 * devices) else 2
    seen = may_see(mask, sizes, sizes.queries // (halves * devices), sizes.keys // (halves * devices))
    if not seen.any():
        return None
    device = np.arange(devices)
    found = []
    for balanced in (False, True)[:halves]:
        own = np.stack([device, 2 * devices - 1 - device]) if balanced else device * halves + np.arange(halves)[:, None]
        work = seen[np.ix_(own.T.ravel(), own.T.ravel())].reshape(devices, halves, devices, halves).sum((1, 3))
        of_step = np.array([max(work[device, device - places]) for places in range(devices)])
        cost = of_step.sum() if method == "ring" else work.sum(1).max()
        found.append((cost, balanced, *_arc(of_step > 0)))
    _, balanced, first, steps = min(found)
    return Context(axis, devices, method, balanced, first, steps)


def _arc(needed: np.ndarray) -> tuple[int, int]:
    """Start and length of the shortest arc of a circle that has all that are needed."""
    count = len(needed)
    arcs = [(start, 1 + max(np.flatnonzero(np.roll(needed, -start)))) for start in range(count)]
    start, length = min(arcs, key=lambda arc: arc[1])
    return start, int(length)


def _part(problem: Problem) -> Problem:
    """The problem for some of the keys: what is found is merged with more, in float32."""
    return dataclasses.replace(problem, out_dtype=jnp.float32, gradient_dtype=jnp.float32, context=None)


def _map(function: Callable[[Array, int], Array], side: Side, problem: Problem, operands: Operands) -> Operands:
    """Operands where `function(array, dim)` is in place of all that belongs to the queries, or to the keys."""

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
    """The same for gradients of what belongs to the keys."""
    q, k, v, hoisted = gradients
    values = () if problem.score is None else problem.score.hoisted
    trained = [value for value, side in zip(values, operands.score_hoisted, strict=True) if differentiable(side)]
    hoisted = [function(x, 2) if value.side == "key" else x for value, x in zip(trained, hoisted, strict=True)]
    return q, function(k, 1), function(v, 1), hoisted


def _merged(out: Array, lse: Array, new_out: Array, new_lse: Array) -> tuple[Array, Array]:
    """Attention to two sets of keys, from that to each: (B T N Hv), (B N T)."""
    total = jnp.logaddexp(lse, new_lse)

    def share(lse: Array) -> Array:
        return jnp.swapaxes(jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - total)), 1, 2)[..., None]

    return out * share(lse) + new_out * share(new_lse), total


def _swapped_unless(condition: Array, halves: list[Array]) -> list[Array]:
    first, second = halves
    return [jnp.where(condition, first, second), jnp.where(condition, second, first)]

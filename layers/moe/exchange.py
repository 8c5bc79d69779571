"""Tokens to the experts they go to, and back.

Experts that are split over a mesh axis stay where they are, and none of their tokens is dropped, however many they are:
there is room for all tokens of the devices that share the experts (2211.15841). Where XLA has a ragged all-to-all, each
row travels to the device of its expert, and home. Elsewhere, as on CPU, every device is given all tokens of those that
share the experts, and what it makes of them is summed over them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..linear.expand import expand

ExpertFunction = Callable[[Array, Array], Array]
"""Maps rows in order of their experts, given how many each expert has."""


class Exchange:
    """A mixture of experts that mesh axes split, inside `jax.shard_map`."""

    def __init__(self, experts: tuple[str, ...], batch: tuple[str, ...]):
        self.axis = experts
        self.tokens_differ = bool(experts) and set(experts) <= set(batch)

    def __call__(self, experts: Any, tokens: tuple[Array, ...]) -> Float[Array, "B T D"]:
        """The weighted sum of the chosen experts; `tokens` are x, the chosen and their weights."""
        if not self.axis:
            return dispatched(experts, *tokens)
        if not self.tokens_differ:
            return jax.lax.psum(dispatched(experts, *tokens, first=self._first(experts)), self.axis)
        leaves, tree = jax.tree.flatten((experts, tokens))
        ways = {"default": self._gathered, "tpu": self._sent, "cuda": self._sent}
        flat = {name: lambda *leaves, way=way: way(*tree.unflatten(leaves)) for name, way in ways.items()}
        return jax.lax.platform_dependent(*leaves, **flat)

    def _first(self, experts: Any) -> Array:
        return jax.lax.axis_index(self.axis) * _count(experts)

    def _gathered(self, experts: Any, tokens: tuple[Array, ...]) -> Array:
        everyone = [jax.lax.all_gather(each, self.axis, axis=0, tiled=True) for each in tokens]
        y = dispatched(experts, *everyone, first=self._first(experts))
        return jax.lax.psum_scatter(y, self.axis, scatter_dimension=0, tiled=True)

    def _sent(self, experts: Any, tokens: tuple[Array, ...]) -> Array:
        x, chosen, weights = tokens
        here, devices = _count(experts), jax.lax.axis_size(self.axis)
        room = devices * (x.size // x.shape[-1]) * min(chosen.shape[-1], here)

        def there_and_back(rows: Array, counts: Array) -> Array:
            plan = _Plan(jax.lax.all_gather(counts, self.axis), jax.lax.axis_index(self.axis), here)
            arrived = plan.there(rows, room, self.axis)
            return plan.back(_real(partial(_apply, experts), arrived, plan.sizes), rows.shape[0], self.axis)

        return _sorted(there_and_back, here * devices, x, chosen, weights)


class _Plan:
    """Which rows go where: each device's rows are in order of the experts, and arrive in that order.

    `counts` says how many rows each device has for each expert.
    """

    def __init__(self, counts: Int[Array, "P E"], device: Array, here: int):
        devices = counts.shape[0]
        starts = jnp.cumsum(counts, axis=1) - counts
        totals = jnp.sum(counts, axis=0).reshape(devices, here)
        bases = (jnp.cumsum(totals, axis=1) - totals).reshape(-1)
        places = bases + jnp.cumsum(counts, axis=0) - counts

        def mine(table: Array) -> Array:  # of all devices, what they have for the experts of this one
            return jax.lax.dynamic_slice_in_dim(table, device * here, here, axis=1).reshape(-1)

        self.sizes = totals[device]
        """How many rows arrive for each expert of this device."""
        self.sends, self.receives = counts[device], mine(counts)
        self.starts, self.places = starts[device], places[device]
        self.receive_offsets, self.return_offsets = mine(places), mine(starts)

    def there(self, rows: Array, room: int, axis: Any) -> Array:
        """The rows of this device's experts, in their order."""
        output = jnp.zeros((room, rows.shape[1]), rows.dtype)
        numbers = self.starts, self.sends, self.places, self.receives
        return jax.lax.ragged_all_to_all(rows, output, *numbers, axis_name=axis)

    def back(self, rows: Array, count: int, axis: Any) -> Array:
        """The rows that this device had sent."""
        output = jnp.zeros((count, rows.shape[1]), rows.dtype)
        numbers = self.receive_offsets, self.receives, self.return_offsets, self.sends
        return jax.lax.ragged_all_to_all(rows, output, *numbers, axis_name=axis)


def dispatched(experts: Any, x: Array, chosen: Array, weights: Array, first: Any = 0) -> Float[Array, "B T D"]:
    """The weighted sum of what the chosen experts make of x.

    The experts are those from `first` on; what others are chosen for adds nothing.
    """
    return _sorted(partial(_apply, experts), _count(experts), x, chosen, weights, first)


def _count(experts: Any) -> int:
    return experts.down.weight.shape[0]


def _apply(experts: Any, rows: Array, sizes: Array) -> Array:
    return experts(rows, sizes)


def _sorted(apply: ExpertFunction, experts: int, x: Array, chosen: Array, weights: Array, first: Any = 0) -> Array:
    """Rows in order of their experts, through `apply`, and back."""
    dim, top_k = x.shape[-1], chosen.shape[-1]
    owners = chosen.reshape(-1) - first
    owners = jnp.where((owners >= 0) & (owners < experts), owners, experts)
    order = jnp.argsort(owners)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    sizes = jnp.zeros(experts, jnp.int32).at[owners].add(1, mode="drop")
    rows = expand(partial(jnp.repeat, repeats=top_k, axis=0), x.reshape(-1, dim), dtype=x.dtype)
    rows = _permuted(rows, order)
    most = x.size // dim * min(top_k, experts)  # a token goes to an expert once
    rows = _real(apply, rows[:most], sizes)
    rows = _permuted(jnp.pad(rows, ((0, order.size - most), (0, 0))), back).reshape(*chosen.shape, dim)
    return jnp.einsum("btkd,btk->btd", rows, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def _real(apply: ExpertFunction, rows: Array, sizes: Array) -> Array:
    """`apply`, with zeros in the rows after those of experts, and in their gradients: a kernel may leave anything."""
    real = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None] < jnp.sum(sizes)
    rows = apply(jnp.where(real, rows, jnp.zeros((), rows.dtype)), sizes)
    return jnp.where(real, rows, jnp.zeros((), rows.dtype))


def _permuted(rows: Array, order: Array) -> Array:
    """`rows[order]`, of a permutation: that lets the gradient be written without adding up."""
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")

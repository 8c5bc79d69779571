"""The exchange of tokens between devices whose experts are split over a mesh axis.

Weights of experts are not moved, and no token is dropped, whatever the loads: buffers hold all tokens of the devices
that share the experts (2211.15841). On TPU and GPU a ragged all-to-all sends each row to the device of its expert, and
another sends results back. On CPU, where XLA has no such collective, tokens are gathered on all these devices and
results are reduce-scattered.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..linear.expand import expand

ExpertFunction = Callable[[Array, Array], Array]
"""Maps rows that are ordered by expert, and the number of rows of each expert, to rows."""


class Exchange:
    """Applies experts that mesh axes split, inside `jax.shard_map`."""

    def __init__(self, experts: tuple[str, ...], batch: tuple[str, ...]):
        self.axis = experts
        self.tokens_differ = bool(experts) and set(experts) <= set(batch)

    def __call__(self, experts: Any, tokens: tuple[Array, ...]) -> Float[Array, "B T D"]:
        """The weighted sum of the chosen experts; `tokens` are x, the chosen experts and their weights."""
        if not self.axis:
            return dispatched(experts, *tokens)
        if not self.tokens_differ:
            return jax.lax.psum(dispatched(experts, *tokens, first=self._first(experts)), self.axis)
        leaves, tree = jax.tree.flatten((experts, tokens))
        exchanges = {"default": self._gathered, "tpu": self._sent, "cuda": self._sent}
        flat = {
            name: lambda *leaves, exchange=exchange: exchange(*tree.unflatten(leaves))
            for name, exchange in exchanges.items()
        }
        return jax.lax.platform_dependent(*leaves, **flat)

    def _first(self, experts: Any) -> Array:
        return jax.lax.axis_index(self.axis) * _count(experts)

    def _gathered(self, experts: Any, tokens: tuple[Array, ...]) -> Array:
        gathered = [jax.lax.all_gather(array, self.axis, axis=0, tiled=True) for array in tokens]
        y = dispatched(experts, *gathered, first=self._first(experts))
        return jax.lax.psum_scatter(y, self.axis, scatter_dimension=0, tiled=True)

    def _sent(self, experts: Any, tokens: tuple[Array, ...]) -> Array:
        x, chosen, weights = tokens
        local, devices = _count(experts), jax.lax.axis_size(self.axis)
        capacity = devices * (x.size // x.shape[-1]) * min(chosen.shape[-1], local)

        def apply(rows: Array, counts: Array) -> Array:
            routes = _Routes(jax.lax.all_gather(counts, self.axis), jax.lax.axis_index(self.axis), local)
            received = routes.send(rows, capacity, self.axis)
            results = _masked(partial(_apply, experts), received, routes.sizes)
            return routes.send_back(results, rows.shape[0], self.axis)

        return _sorted(apply, local * devices, x, chosen, weights)


class _Routes:
    """Offsets and sizes of a ragged all-to-all of rows that are ordered by expert, and received in that order.

    `counts` are the numbers of rows that each device has for each expert; this device has `local` experts.
    """

    def __init__(self, counts: Int[Array, "P E"], device: Array, local: int):
        devices = counts.shape[0]
        starts = jnp.cumsum(counts, axis=1) - counts
        totals = jnp.sum(counts, axis=0).reshape(devices, local)
        bases = (jnp.cumsum(totals, axis=1) - totals).reshape(-1)
        destinations = bases + jnp.cumsum(counts, axis=0) - counts

        def for_local(table: Array) -> Array:  # the entries of all devices for the experts of this one
            return jax.lax.dynamic_slice_in_dim(table, device * local, local, axis=1).reshape(-1)

        self.sizes = totals[device]
        """The number of rows that this device receives for each of its experts."""
        self.sends, self.receives = counts[device], for_local(counts)
        self.starts, self.destinations = starts[device], destinations[device]
        self.receive_offsets, self.return_offsets = for_local(destinations), for_local(starts)

    def send(self, rows: Array, capacity: int, axis: Any) -> Array:
        """The rows for this device's experts, in their order."""
        output = jnp.zeros((capacity, rows.shape[1]), rows.dtype)
        offsets = self.starts, self.sends, self.destinations, self.receives
        return jax.lax.ragged_all_to_all(rows, output, *offsets, axis_name=axis)

    def send_back(self, rows: Array, count: int, axis: Any) -> Array:
        """The results of the rows that this device had sent."""
        output = jnp.zeros((count, rows.shape[1]), rows.dtype)
        offsets = self.receive_offsets, self.receives, self.return_offsets, self.sends
        return jax.lax.ragged_all_to_all(rows, output, *offsets, axis_name=axis)


def dispatched(experts: Any, x: Array, chosen: Array, weights: Array, first: Any = 0) -> Float[Array, "B T D"]:
    """The weighted sum of the outputs of the chosen experts.

    `experts` are those with numbers from `first` on; the choice of other experts adds nothing.
    """
    return _sorted(partial(_apply, experts), _count(experts), x, chosen, weights, first)


def _count(experts: Any) -> int:
    return experts.down.weight.shape[0]


def _apply(experts: Any, rows: Array, sizes: Array) -> Array:
    return experts(rows, sizes)


def _sorted(apply: ExpertFunction, experts: int, x: Array, chosen: Array, weights: Array, first: Any = 0) -> Array:
    """Orders rows by expert, applies `apply`, and sums the results for each token with its weights."""
    dim, top_k = x.shape[-1], chosen.shape[-1]
    owners = chosen.reshape(-1) - first
    owners = jnp.where((owners >= 0) & (owners < experts), owners, experts)
    order = jnp.argsort(owners)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    sizes = jnp.zeros(experts, jnp.int32).at[owners].add(1, mode="drop")
    rows = expand(partial(jnp.repeat, repeats=top_k, axis=0), x.reshape(-1, dim), dtype=x.dtype)
    rows = _permuted(rows, order)
    most = x.size // dim * min(top_k, experts)  # a token is sent to an expert at most once
    rows = _masked(apply, rows[:most], sizes)
    rows = _permuted(jnp.pad(rows, ((0, order.size - most), (0, 0))), inverse).reshape(*chosen.shape, dim)
    return jnp.einsum("btkd,btk->btd", rows, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def _masked(apply: ExpertFunction, rows: Array, sizes: Array) -> Array:
    """`apply` with zeros in the rows after those of experts, and in their gradients: kernels leave them undefined."""
    real = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None] < jnp.sum(sizes)
    rows = apply(jnp.where(real, rows, jnp.zeros((), rows.dtype)), sizes)
    return jnp.where(real, rows, jnp.zeros((), rows.dtype))


def _permuted(rows: Array, order: Array) -> Array:
    """`rows[order]` for a permutation, whose gradient needs no sums."""
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")

"""The blocks of a model: a repeating pattern of them is stacked and scanned, others run one by one.

This file holds what every kind of model shares: the scan over repeats, rematerialisation, the caches of mixers, and
what blocks report beside their output.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .block import Block, BlockLayer
from .linear.matmul import Kind
from .mixers.mixer import Cache, Positions
from .moe.routing import RouterStats

Remat = Literal["none", "full", "dots", "dots_no_batch", "full_offload", "dots_offload"]


def all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Remat policy that saves everything except gathered weights, which the backward pass gathers again."""
    return primitive.name != "all_gather" and parameters.get("name") != "gathered"


def _offloaded(*names: str) -> Callable[..., Any]:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


POLICIES: dict[str, Callable[..., Any]] = {
    "none": all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names("product", "attention")
    ),
    "dots_no_batch": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("product"),
    ),
    "full_offload": _offloaded("stream"),
    "dots_offload": _offloaded("stream", "product", "attention"),
}
"""Which activations of a block are saved for the backward pass, by the name of `Remat`.

"none" recomputes nothing, but gathers weights again. The last two offload to host memory what "full" and "dots" save:
inputs of blocks, matmul outputs, attention outputs.
"""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How blocks are computed, where the result is the same up to rounding."""

    remat: Remat = "none"
    kind: Kind = "none"
    """Number format of the matmuls with weights of blocks."""


class StackOutput(NamedTuple):
    """The result of a sequence of blocks."""

    x: Float[Array, "B T D"]
    caches: list[Cache] | None
    """The cache of each block, updated; None if none were passed."""
    router_stats: list[RouterStats | None]
    """What the router of each block did; None for a block without one. Of stacked blocks, with a leading L."""


def build_stacked(block: Block, dim: int, repeats: int, *, rngs: nnx.Rngs) -> BlockLayer:
    """`repeats` copies of a block for hidden size D = `dim`, each with its own initial weights, stacked along L."""
    keys = jax.random.split(rngs.params(), repeats)
    return jax.vmap(lambda key: block.build(dim, rngs=nnx.Rngs(key)))(keys)


def unrolled(
    blocks: Sequence[BlockLayer],
    x: Float[Array, "B T D"],
    positions: Positions,
    caches: Sequence[Cache] | None = None,
    *,
    execution: Execution,
) -> StackOutput:
    """Runs blocks one after another; each is recomputed on its own."""
    updated, router_stats = [], []
    for index, block in enumerate(blocks):
        cache = None if caches is None else [caches[index]]
        output = _checkpointed(_in_order, execution, scanned=False)([block], x, positions, cache)
        x = output.x
        updated += output.caches or []
        router_stats += output.router_stats
    return StackOutput(x, None if caches is None else updated, router_stats)


def scanned(
    pattern: Sequence[BlockLayer],
    x: Float[Array, "B T D"],
    positions: Positions,
    caches: Sequence[Cache] | None = None,
    *,
    execution: Execution,
) -> StackOutput:
    """Runs all repeats of a pattern, whose arrays have a leading L, the number of repeats, as those of caches have."""
    if not pattern:
        return StackOutput(x, None if caches is None else list(caches), [])

    def step(x: Array, layer: tuple[Sequence[BlockLayer], Sequence[Cache] | None]) -> tuple[Array, Any]:
        blocks, cache = layer
        output = one_repeat(blocks, x, positions, cache, execution=execution)
        return output.x, (output.caches, output.router_stats)

    x, (updated, router_stats) = jax.lax.scan(step, x, (pattern, caches))
    return StackOutput(x, updated, router_stats)


def one_repeat(
    pattern: Sequence[BlockLayer],
    x: Float[Array, "B T D"],
    positions: Positions,
    caches: Sequence[Cache] | None = None,
    *,
    execution: Execution,
) -> StackOutput:
    """Runs one repeat of a pattern, as the body of a scan; it is recomputed as a whole."""
    return _checkpointed(_in_order, execution, scanned=True)(pattern, x, positions, caches)


def _in_order(
    kind: Kind,
    blocks: Sequence[BlockLayer],
    x: Float[Array, "B T D"],
    positions: Positions,
    caches: Sequence[Cache] | None,
) -> StackOutput:
    updated, router_stats = [], []
    for index, block in enumerate(blocks):
        cache = None if caches is None else caches[index]
        x, cache, stats = block(checkpoint_name(x, "stream"), positions, cache, kind=kind)
        updated.append(cache)
        router_stats.append(stats)
    return StackOutput(x, None if caches is None else updated, router_stats)


def _checkpointed(function: Callable[..., StackOutput], execution: Execution, *, scanned: bool) -> Any:
    """`function` with the kind of matmuls as its first argument, under the remat policy.

    Outside a scan XLA would merge the recomputation with the forward pass, and so save everything, hence `prevent_cse`.
    """
    # A new function each time: JAX caches the trace of a function, and what surrounds it may differ.
    function = functools.partial(function, execution.kind)
    if execution.remat == "none" and jax.sharding.get_abstract_mesh().size <= 1:
        return function  # no weight is gathered
    return jax.checkpoint(function, policy=POLICIES[execution.remat], prevent_cse=not scanned)

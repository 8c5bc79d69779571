"""Loss and gradient of a step whose micro-batches pass through the stages of the mesh axis `pipeline`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..configs.run import Run
from ..layers.mixers.mixer import Positions
from ..layers.moe.routing import RouterStats
from ..layers.sharding import pipeline
from ..layers.sharding.axes import zeros_like
from ..layers.sharding.pipeline import MicroBatch
from ..layers.stack import Execution, StackOutput, one_repeat
from ..zoo.decoder import DecoderModel, stats_by_name
from ..zoo.parameters import Parameters, split
from . import balance
from .objectives import likelihood


def forward(
    run: Run, model: DecoderModel, micro_batches: MicroBatch
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, RouterStats]]:
    """Training loss and plain negative log-likelihood, summed over tokens, and router statistics."""
    loss, nll, reports = pipeline.forward(_parts(run), *model.split_stack(), micro_batches)
    return loss, nll, stats_by_name(*reports)


def gradients(
    run: Run, model: DecoderModel, micro_batches: MicroBatch, real: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Parameters, dict[str, RouterStats]]:
    """Loss, likelihood and gradient, summed over tokens, and router statistics.

    `real` is the number of tokens that are not padding.
    """
    parts = _parts(run)
    outer, stack = model.split_stack()
    cotangents = _report_cotangents(run, partial(pipeline.forward, parts, outer, stack, micro_batches), real)
    sums, (outer_grad, stack_grad) = pipeline.gradients(parts, outer, stack, micro_batches, cotangents)
    router_stats = stats_by_name(*sums.reports)
    router_loss = balance.loss(run.balance, router_stats, balance.loads(router_stats), real)
    outer_grad.stack = stack_grad
    return sums.loss + router_loss, sums.other, split(outer_grad), router_stats


def _report_cotangents(run: Run, forward: Any, real: Float[Array, ""]) -> Any:
    """The gradient of the router losses in the reports of all micro-batches; None if a run has no such losses."""
    if run.balance.loss:
        # The gradient of each micro-batch depends on the loads of all, which take a forward pass of their own.
        reports = forward().reports
    elif run.balance.router_z_loss:
        reports = zeros_like(jax.eval_shape(forward).reports)
    else:
        return None
    loads = balance.loads(stats_by_name(*reports))
    return jax.grad(lambda reports: balance.loss(run.balance, stats_by_name(*reports), loads, real))(reports)


def _parts(run: Run) -> pipeline.Parts:
    """The model of a run as the parts of a pipeline."""
    execution = Execution(remat=run.remat, kind=run.quantize)

    def positions(micro: MicroBatch) -> Positions:
        return Positions(index=micro["positions"], segments=micro["segments"], context_method=run.context)

    def reported(output: StackOutput) -> tuple[Array, list[RouterStats | None]]:
        return output.x, output.router_stats

    def before_stack(outer: DecoderModel, tokens: Array, micro: MicroBatch) -> Any:
        return reported(outer.before_stack(tokens, positions(micro), dtype=jnp.dtype(run.dtype), execution=execution))

    def layer(blocks: Any, x: Array, micro: MicroBatch) -> Any:
        return reported(one_repeat(blocks, x, positions(micro), execution=execution))

    def after_stack(outer: DecoderModel, x: Array, micro: MicroBatch) -> Any:
        return reported(outer.after_stack(x, positions(micro), execution=execution))

    def token_loss(outer: DecoderModel, x: Array, micro: MicroBatch) -> tuple[Array, Array]:
        return likelihood(run, outer, outer.final_norm(x), micro)

    return pipeline.Parts(before_stack, layer, after_stack, token_loss)

"""Loss and gradient of a step whose micro-batches pass through the stages of a mesh axis `pipeline`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..configs.run import Run
from ..layers.loss import cross_entropy
from ..layers.mixers.mixer import Positions
from ..layers.sharding import pipeline
from ..layers.sharding.axes import zeros_like
from ..zoo.decoder import DecoderModel, repeat, routing_by_name
from ..zoo.parameters import Parameters, split
from . import balance


def likelihood(
    run: Run, model: DecoderModel, hidden: Float[Array, "B T D"], batch: dict[str, Array]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Training loss and plain negative log-likelihood of final hidden states, summed over tokens."""
    return cross_entropy(
        hidden,
        model.output_embedding,
        batch["targets"],
        batch["weights"],
        soft_cap=run.model.soft_cap,
        z_loss=run.z_loss,
    )


def forward(
    run: Run, model: DecoderModel, micro_batches: dict[str, Array]
) -> tuple[Float[Array, ""], Float[Array, ""], balance.Done]:
    """Training loss and plain negative log-likelihood, summed over tokens, and what the routers did."""
    loss, nll, done = pipeline.forward(_parts(run), *model.apart(), micro_batches)
    return loss, nll, routing_by_name(*done)


def gradients(
    run: Run, model: DecoderModel, micro_batches: dict[str, Array], real: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Parameters, balance.Done]:
    """Loss, likelihood and gradient, summed over tokens, and what the routers did; `real` tokens are no padding."""
    parts, apart = _parts(run), model.apart()

    def of_routers(done: Any, loads: Any) -> Array:
        return balance.loss(run.balance, routing_by_name(*done), loads, real)

    prices = None
    if run.balance.loss:
        # The gradient of a micro-batch depends on the loads of all: they take a forward pass of their own.
        done = pipeline.forward(parts, *apart, micro_batches).reports
        prices = jax.grad(of_routers)(done, balance.loads(routing_by_name(*done)))
    elif run.balance.router_z_loss:
        done = zeros_like(jax.eval_shape(partial(pipeline.forward, parts), *apart, micro_batches).reports)
        prices = jax.grad(of_routers)(done, balance.loads(routing_by_name(*done)))
    (loss, nll, done), (outer, stack) = pipeline.gradients(parts, *apart, micro_batches, prices)
    routing = routing_by_name(*done)
    outer.stack = stack
    return loss + of_routers(done, balance.loads(routing)), nll, split(outer), routing


def _parts(run: Run) -> pipeline.Parts:
    """A model in parts."""

    def positions(micro: dict[str, Array]) -> Positions:
        return Positions(index=micro["positions"], segments=micro["segments"], context_method=run.context)

    def layer(blocks: Any, x: Array, micro: dict[str, Array]) -> tuple[Array, Any]:
        x, _, done = repeat(blocks, None, x, positions(micro), run.remat)
        return x, done

    return pipeline.Parts(
        lambda outer, tokens, micro: outer.enter(tokens, positions(micro), dtype=jnp.dtype(run.dtype), remat=run.remat),
        layer,
        lambda outer, x, micro: outer.leave(x, positions(micro), remat=run.remat),
        lambda outer, x, micro: likelihood(run, outer, outer.normed(x), micro),
    )

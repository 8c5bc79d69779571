"""Load balancing of experts: losses, corrections of router scores, and reports."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..configs.run import Balance
from ..layers.moe.routing import RouterStats
from ..layers.sharding.collectives import reshard_like
from ..zoo.parameters import Parameters


def loads(router_stats: dict[str, RouterStats]) -> dict[str, Array]:
    """Tokens routed to each expert, by router."""
    return {name: router["load"] for name, router in router_stats.items()}


def loss(
    balance: Balance, router_stats: dict[str, RouterStats], loads: dict[str, Array], tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """The routers' part of the training loss.

    Sums over micro-batches are exact if `loads` and `tokens` are those of the whole batch.
    """
    even, z = _means(router_stats, loads, tokens)
    return balance.loss * even + balance.router_z_loss * z


def metrics(router_stats: dict[str, RouterStats], tokens: Float[Array, ""]) -> dict[str, Float[Array, ""]]:
    """For a model with routers: the unweighted losses, and MaxVio (2408.15664, 4.1), the most any expert is overloaded.

    MaxVio is the load of the busiest expert of any router over the mean load, minus 1.
    """
    if not router_stats:
        return {}
    even, z = _means(router_stats, loads(router_stats), tokens)
    violations = [_violation(load) for load in loads(router_stats).values()]
    return {
        "balance_loss": even,
        "router_z_loss": z,
        "max_violation": jnp.max(jnp.stack([jnp.max(each) for each in violations])),
    }


def corrected(balance: Balance, params: Parameters, router_stats: dict[str, RouterStats]) -> Parameters:
    """The parameters, with the corrections of routers moved against the loads (2408.15664, algorithm 1)."""
    if not balance.bias_rate:
        return params
    moved = {}
    for name, load in loads(router_stats).items():
        correction = params.get(f"{name}.ffn.router.correction")
        if correction is not None:
            missing = jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
            moved[f"{name}.ffn.router.correction"] = correction + balance.bias_rate * reshard_like(missing, correction)
    return params | moved


def _violation(load: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """The load of the busiest expert over the mean load, minus 1; 0 where no token was routed."""
    mean = jnp.mean(load, axis=-1)
    return jnp.where(mean > 0, jnp.max(load, axis=-1) / jnp.where(mean > 0, mean, 1.0) - 1, 0.0)


def _means(router_stats: dict[str, RouterStats], loads: dict[str, Array], tokens: Array) -> tuple[Array, Array]:
    """Over all routers, the means of E sum_e (share of the choices)_e (mean probability)_e, and of z per token."""
    tokens = jnp.maximum(tokens, 1.0)
    routers, even, z = 0, jnp.zeros(()), jnp.zeros(())
    for name, router in router_stats.items():
        load = jax.lax.stop_gradient(loads[name])
        experts = load.shape[-1]
        routers += load.size // experts
        shares = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
        even = even + experts * jnp.sum(shares * router["probability"]) / tokens
        z = z + jnp.sum(router["z"]) / tokens
    return even / max(routers, 1), z / max(routers, 1)

"""The training step: one jitted function from a state and a batch to the next state."""

import functools
from collections.abc import Callable, Mapping
from typing import Protocol, TypedDict, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ..configs.run import Run
from ..layers.mixers.mixer import Positions
from ..layers.moe.routing import RouterStats
from ..layers.random import random_key
from ..layers.sharding import stages
from ..layers.sharding.axes import batch_partition
from ..layers.stack import Execution
from ..zoo.decoder import DecoderModel
from ..zoo.parameters import Parameters, describe, merge, shardings, split
from . import balance, optimizer, pipelined
from .objectives import likelihood
from .plan.chips import compiler_options

Batch = dict[str, Array]
"""`tokens`, `targets`, `segments`, `positions`: Int "B T"; `weights`: Float "B T", 0 where there is no target."""
Sums = tuple[Array, Array, Parameters]
"""Training loss, negative log-likelihood and gradient, summed over micro-batches."""


class State(TypedDict):
    """Everything that training changes. All of it is saved."""

    step: Int[Array, ""]
    params: Parameters
    """Float32 master parameters."""
    optimizer: optax.OptState
    ema: Parameters
    """Moving average of the parameters; empty if none is kept."""
    bad_steps: Int[Array, ""]
    """Steps in a row that were skipped, up to now."""
    skipped: Int[Array, ""]
    """All steps that were skipped because the loss, the gradient or the new parameters were not finite."""
    rng: Array
    """The key all randomness of the run comes from."""


@runtime_checkable
class Step(Protocol):
    """A jitted training step. It returns the next state and metrics, which are float32 scalars."""

    def __call__(self, state: State, batch: Batch, /) -> tuple[State, dict[str, Array]]:
        """Runs the step. The state is donated."""
        ...

    def trace(self, state: State, batch: Mapping[str, Array | jax.ShapeDtypeStruct], /) -> jax.stages.Traced:
        """Traces the step for arguments of these shapes, types and shardings, to compile it without running it."""
        ...


def initial_state(run: Run, mesh: Mesh, params: Parameters | None = None) -> State:
    """Parameters (random, if not given) and optimizer state, each made where it lives on the mesh (the ambient one)."""
    if params is None:
        assert not run.weights, f"the run starts from {run.weights}: read it first"
        placement = shardings(describe(run.model.abstract()), mesh)
        params = jax.jit(lambda: split(run.model.build(rngs=nnx.Rngs(random_key(run.seed)))), out_shardings=placement)()
    return jax.jit(functools.partial(_state_of, run), donate_argnums=0)(params)


def abstract_state(run: Run, mesh: Mesh) -> State:
    """Shape, type and place on the mesh (the ambient one) of everything in `initial_state`; nothing is computed."""
    known = describe(run.model.abstract())
    placement = shardings(known, mesh)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = {
        name: jax.ShapeDtypeStruct(what.shape, what.dtype, sharding=placement[name]) for name, what in known.items()
    }
    return jax.tree.map(placed, jax.eval_shape(functools.partial(_state_of, run), params))


def abstract_batch(run: Run, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, type and place on the mesh of a batch, B T."""
    place = NamedSharding(mesh, batch_partition(mesh))
    kinds = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"weights": jnp.float32}
    shape = run.batch, run.length
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=place) for name, kind in kinds.items()}


def _state_of(run: Run, params: Parameters) -> State:
    """The state of a run that starts from these parameters."""
    transformation = optimizer.make(run.optimizer, run.steps, describe(run.model.abstract()))
    zero = jnp.zeros((), jnp.int32)
    return State(
        step=zero,
        params=params,
        optimizer=transformation.init(params),
        ema=jax.tree.map(jnp.copy, params) if run.ema else {},
        bad_steps=zero,
        skipped=zero,
        rng=random_key(run.seed),
    )


def make_step(run: Run) -> Step:
    """The jitted training step for the ambient mesh.

    Loss and gradient are means over the tokens of the whole batch, however it is cut into micro-batches: every
    micro-batch adds its sums, divided by the batch's own count of tokens. A step whose loss, gradient or new parameters
    are not finite changes nothing but its counters. The new parameters are checked only where the settings allow them
    to overflow, because their update is then computed twice: once for the check, once to be written. Where the model
    has routers, their losses are a part of the loss, and their corrections move after the optimizer's step.
    """
    abstract = run.model.abstract()
    transformation = optimizer.make(run.optimizer, run.steps, describe(abstract))
    rate = optimizer.schedule(run.optimizer, run.steps)
    always_finite = optimizer.never_overflows(run.optimizer) and run.balance.bias_rate <= 1

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        loss, nll, gradients, router_stats = _gradients(run, abstract, state["params"], batch)
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if run.optimizer.clip:
            scale = jnp.minimum(1.0, run.optimizer.clip / jnp.maximum(norm, 1e-12))
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        params, optimizer_state = optimizer.update(transformation, gradients, state["optimizer"], state["params"])
        params = balance.corrected(run.balance, params, router_stats)
        new = params, optimizer_state, _average(run.ema, state, params)
        if not always_finite:
            good &= all_finite(params)
        old = state["params"], state["optimizer"], state["ema"]
        params, optimizer_state, ema = jax.tree.map(lambda n, o: jax.lax.select(good, n, o), new, old)
        bad = 1 - good.astype(jnp.int32)
        after = State(
            step=state["step"] + 1,
            params=params,
            optimizer=optimizer_state,
            ema=ema,
            bad_steps=(state["bad_steps"] + 1) * bad,
            skipped=state["skipped"] + bad,
            rng=state["rng"],
        )
        metrics = {
            "loss": loss,
            "nll": nll,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(rate(state["step"] - state["skipped"]), jnp.float32),
            "bad_steps": after["bad_steps"].astype(jnp.float32),
            "skipped": after["skipped"].astype(jnp.float32),
        }
        return after, metrics | balance.metrics(router_stats, _real(batch))

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())


def make_evaluation(run: Run) -> Callable[[Parameters, Batch], Float[Array, ""]]:
    """The jitted sum of negative log-likelihood, in nats, over the tokens of a batch."""
    run = run.replace(quantize="none")  # matmuls in 8 bits are for training only
    abstract = run.model.abstract()

    def evaluate(params: Parameters, batch: Batch) -> Float[Array, ""]:
        if stages.count() > 1:
            return pipelined.forward(run, merge(abstract, params), _micro_batches(run, batch))[1]
        nll = jax.lax.map(lambda micro: _sums(run, merge(abstract, params), micro)[1], _micro_batches(run, batch))
        return jnp.sum(nll)

    return jax.jit(evaluate)


@jax.jit
def all_finite(parameters: Parameters) -> Bool[Array, ""]:
    """Whether every number is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in parameters.values()]))


def best_parameters(state: State) -> Parameters:
    """What is evaluated, sampled from and loaded: the moving average where one is kept."""
    return state["ema"] or state["params"]


def _sums(
    run: Run, model: DecoderModel, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, RouterStats]]:
    """Training loss and plain negative log-likelihood, summed over tokens, and router statistics."""
    positions = Positions(index=batch["positions"], segments=batch["segments"], context_method=run.context)
    execution = Execution(remat=run.remat, kind=run.quantize)
    hidden = model.hidden(batch["tokens"], positions, dtype=jnp.dtype(run.dtype), execution=execution)
    return *likelihood(run, model, hidden.x, batch), hidden.router_stats


def _real(batch: Batch) -> Float[Array, ""]:
    """How many tokens are no padding."""
    return jnp.sum((batch["segments"] != 0).astype(jnp.float32))


def _gradients(
    run: Run, abstract: DecoderModel, params: Parameters, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""], Parameters, dict[str, RouterStats]]:
    """Loss, likelihood (both a mean over tokens) and gradient of a batch, and router statistics."""
    tokens = jnp.sum(batch["weights"])
    share = jnp.where(tokens == 0.0, 0.0, 1.0 / jnp.where(tokens == 0.0, 1.0, tokens))

    real, loads = _real(batch), None
    if stages.count() > 1:
        scaled = batch | {"weights": batch["weights"] * share}
        return pipelined.gradients(run, merge(abstract, params), _micro_batches(run, scaled), real)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_of(params: Parameters, micro: Batch) -> tuple[Array, tuple[Array, dict[str, RouterStats]]]:
        loss, nll, router_stats = _sums(run, merge(abstract, params), micro)
        of_routers = balance.loss(run.balance, router_stats, loads or balance.loads(router_stats), real)
        return loss * share + of_routers, (nll * share, router_stats)

    if run.accumulate == 1:
        (loss, (nll, router_stats)), gradients = loss_of(params, batch)
        return loss, nll, gradients, router_stats

    micro_batches = _micro_batches(run, batch)
    if run.balance.loss:
        # The gradient of a micro-batch depends on the loads of all: they take a forward pass of their own.
        each = jax.lax.map(lambda micro: balance.loads(_sums(run, merge(abstract, params), micro)[2]), micro_batches)
        loads = jax.tree.map(lambda load: jnp.sum(load, axis=0), each)

    def add(total: Sums, micro: Batch) -> tuple[Sums, dict[str, RouterStats]]:
        (loss, (nll, router_stats)), gradients = loss_of(params, micro)
        return jax.tree.map(jnp.add, total, (loss, nll, gradients)), router_stats

    zero = jnp.zeros(())
    start = (zero, zero, jax.tree.map(jnp.zeros_like, params))
    total, router_stats = jax.lax.scan(add, start, micro_batches)
    return *total, jax.tree.map(lambda each: jnp.sum(each, axis=0), router_stats)


def _micro_batches(run: Run, batch: Batch) -> Batch:
    """B ... as A B/A ...: row i goes to micro-batch i mod A, so that each holds rows of every device and none moves."""
    return {name: jnp.moveaxis(x.reshape(-1, run.accumulate, *x.shape[1:]), 1, 0) for name, x in batch.items()}


def _average(decay: float, state: State, params: Parameters) -> Parameters:
    """The next moving average. It starts short, or it would remember the initial noise for 1 / (1 - decay) steps."""
    done = (state["step"] - state["skipped"]).astype(jnp.float32)
    kept = jnp.minimum(decay, (1 + done) / (10 + done))
    return {name: old * kept + params[name] * (1 - kept) for name, old in state["ema"].items()}

"""Which experts a token is sent to, and their weights."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..linear.einsum import einsum
from ..sharding.axes import parameter
from ..sharding.collectives import gather, per_device, reshard_like
from ..spec import Spec

RouterStats = dict[str, Array]
"""Statistics of a router, as sums over the tokens of a batch that are not padding:

`load` (E): how often each expert was chosen; `probability` (E): the scores, divided by their sum over experts;
`z` (): the squared logarithm of the sum of exponentials of the logits.
"""


@dataclass(frozen=True, kw_only=True)
class Groups(Spec):
    """Experts form groups, and only those of the best groups can be chosen, so that a token is sent to few devices."""

    groups: int
    chosen: int
    group_score: Literal["best", "best_two"]
    """The score of a group: its best (DeepSeek-V2, 2405.04434, 2.2.2) or the sum of its best two (V3, 2412.19437)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chosen <= self.groups:
            raise ValueError(f"chosen groups must be 1 to groups, got chosen={self.chosen}, groups={self.groups}")

    def limit(self, scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The scores, with -inf for experts of groups that are not chosen."""
        grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
        count = 2 if self.group_score == "best_two" else 1
        group_scores = jnp.sum(jax.lax.top_k(grouped, count)[0], axis=-1)
        _, best = jax.lax.top_k(group_scores, self.chosen)
        is_chosen = jnp.any(best[..., None] == jnp.arange(self.groups, dtype=best.dtype), axis=-2)
        return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(scores.shape)


@dataclass(frozen=True, kw_only=True)
class Router(Spec):
    """Sends each token to the `top_k` experts of the highest scores, which are computed in float32.

    The scores of the experts are the softmax or the sigmoid of x W. A softmax over the logits of the chosen alone
    (gpt-oss) is the softmax over all, normalised. Families: Mixtral `Router(top_k=2)`; DeepSeek-V3
    `Router(top_k=8, score="sigmoid", correction=True, scale=2.5, groups=Groups(groups=8, chosen=4,
    group_score="best_two"))`.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    """The weights of the chosen experts are divided by their sum."""
    scale: float = 1.0
    """Factor of the weights, applied after normalisation."""
    groups: Groups | None = None
    bias: bool = False
    """A bias on the logits."""
    correction: bool = False
    """A term per expert that is added to its score for the selection, not for its weight.

    It has no gradient: `balance.bias_rate` of a run moves it against the loads (2408.15664).
    """

    def check(self, experts: int) -> None:
        """Raises ValueError if E = `experts` are too few or not divisible into the groups."""
        groups = self.groups or Groups(groups=1, chosen=1, group_score="best")
        size, rest = divmod(experts, groups.groups)
        if rest or not 1 <= self.top_k <= size * groups.chosen:
            raise ValueError(
                f"groups must divide the experts, and the chosen groups hold top_k of them, got experts={experts}, "
                f"top_k={self.top_k}, groups={groups.groups}, chosen={groups.chosen}"
            )
        if groups.group_score == "best_two" and size < 2:
            raise ValueError(
                f"group_score='best_two' needs two experts in each group, got experts={experts}, groups={groups.groups}"
            )

    def choose(self, selection_score: Float[Array, "B T E"]) -> Int[Array, "B T k"]:
        """The experts of the highest selection scores."""
        limited = selection_score if self.groups is None else self.groups.limit(selection_score)
        return jax.lax.top_k(limited, self.top_k)[1]


class RouterLayer(nnx.Module):
    """A linear map to a logit per expert, and the selection of experts."""

    def __init__(self, spec: Router, dim: int, experts: int, *, rngs: nnx.Rngs):
        self.spec = spec
        value = jax.random.normal(rngs.params(), (dim, experts), jnp.float32) * dim**-0.5
        self.weight = parameter("D E", value, inputs=1, exact=True)
        self.bias = parameter("E", jnp.zeros(experts)) if spec.bias else None
        self.correction = parameter("E", jnp.zeros(experts), exact=True) if spec.correction else None

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """Float32 logits, from a matmul in full float32 precision on every platform."""
        highest = jax.lax.Precision.HIGHEST
        logits = einsum("B T D, D E -> B T E", x.astype(jnp.float32), self.weight[...], precision=highest)
        return logits if self.bias is None else logits + gather(self.bias[...], jnp.float32)

    def __call__(
        self, x: Float[Array, "B T D"], real: Float[Array, "B T"]
    ) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], RouterStats]:
        """The chosen experts, their weights, and statistics of the tokens where `real` is 1; it is 0 for padding."""
        spec, logits = self.spec, self.logits(x)
        real = reshard_like(real[..., None], logits)
        scores = jax.nn.softmax(logits) if spec.score == "softmax" else jax.nn.sigmoid(logits)
        selection_score = jax.lax.stop_gradient(scores)
        if self.correction is not None:
            selection_score = selection_score + jax.lax.stop_gradient(gather(self.correction[...], jnp.float32))
        chosen = per_device(spec.choose, selection_score)
        experts = jnp.arange(scores.shape[-1], dtype=chosen.dtype)
        picked = (chosen[..., None] == experts).astype(jnp.float32)
        weights = jnp.sum(picked * scores[..., None, :], axis=-1)
        if spec.normalise:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        shares = scores / jnp.sum(scores, axis=-1, keepdims=True)
        router_stats = {
            "load": jnp.sum(picked * real[..., None], axis=(0, 1, 2)),
            "probability": jnp.sum(shares * real, axis=(0, 1)),
            "z": jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1, keepdims=True)) * real),
        }
        return chosen, weights * spec.scale, router_stats

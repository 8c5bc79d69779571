"""A function whose gradient is taken later: what is kept until then is a list of arrays, which can wait in a queue."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr


class DeferredGradient:
    """`function(weights, x, given)`, differentiable in weights and x, in two halves.

    Between them is kept what the gradient needs and what depends on x: no weight, nothing that is made of weights or of
    `given` alone, such as a cast matrix or a table of angles. These are made again. A `jax.checkpoint` in the function
    says what of the rest is kept, as it does elsewhere.
    """

    def __init__(self, function: Callable[[Any, Any, Any], Any], weights: Any, x: Any, given: Any):
        """Traces `function`; the arguments stand for all that will come."""

        def both(weights: Any, given: Any, x: Any) -> tuple[Any, Any]:
            return jax.vjp(lambda weights, x: function(weights, x, given), weights, x)

        self._jaxpr, (result, back) = jax.make_jaxpr(both, return_shape=True)(weights, given, x)
        self._result, self._back = jax.tree.structure(result), jax.tree.structure(back)
        known = set(self._jaxpr.jaxpr.invars[: len(jax.tree.leaves((weights, given)))])
        known.update(self._jaxpr.jaxpr.constvars)
        for equation in self._jaxpr.jaxpr.eqns:
            if all(isinstance(value, Literal) or value in known for value in equation.invars):
                known.update(equation.outvars)
        residuals = self._jaxpr.jaxpr.outvars[self._result.num_leaves :]
        self._again = [isinstance(value, Literal) or value in known for value in residuals]
        """Which of the arrays that the gradient needs are made again."""

    def forward(self, weights: Any, x: Any, given: Any) -> tuple[Any, list[Any]]:
        """The result, and what to keep."""
        found = jaxpr_as_fun(self._jaxpr)(*jax.tree.leaves((weights, given, x)))
        count = self._result.num_leaves
        kept = [leaf for leaf, again in zip(found[count:], self._again, strict=True) if not again]
        return self._result.unflatten(found[:count]), kept

    def backward(self, weights: Any, given: Any, kept: list[Any], cotangent: Any) -> tuple[Any, Any]:
        """The gradients in weights and x, from what was kept and the gradient of the result."""
        used = [False] * self._result.num_leaves + self._again
        jaxpr, needed = dce_jaxpr(self._jaxpr.jaxpr, used)
        leaves = jax.tree.leaves((weights, given))
        arguments = [leaf for leaf, each in zip(leaves, needed, strict=False) if each]
        made = iter(jaxpr_as_fun(self._jaxpr.replace(jaxpr=jaxpr))(*arguments))
        rest = iter(kept)
        leaves = [next(made if again else rest) for again in self._again]
        return self._back.unflatten(leaves)(cotangent)

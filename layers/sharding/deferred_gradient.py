"""A function whose backward pass runs later, from residuals that are a list of arrays."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr


class DeferredGradient:
    """The forward and backward pass of `function(weights, x, constants)`, differentiable in weights and x.

    Residuals are the values that the backward pass needs and that depend on x. Values that depend only on weights or
    `constants`, such as a cast matrix or a table of angles, are recomputed. A `jax.checkpoint` inside the function
    selects what else is recomputed.
    """

    def __init__(self, function: Callable[[Any, Any, Any], Any], weights: Any, x: Any, constants: Any):
        """Traces `function` for arguments of these shapes and dtypes."""

        def both(weights: Any, constants: Any, x: Any) -> tuple[Any, Any]:
            return jax.vjp(lambda weights, x: function(weights, x, constants), weights, x)

        self._jaxpr, (result, back) = jax.make_jaxpr(both, return_shape=True)(weights, constants, x)
        self._result, self._back = jax.tree.structure(result), jax.tree.structure(back)
        without_x = set(self._jaxpr.jaxpr.invars[: len(jax.tree.leaves((weights, constants)))])
        without_x.update(self._jaxpr.jaxpr.constvars)
        for equation in self._jaxpr.jaxpr.eqns:
            if all(isinstance(value, Literal) or value in without_x for value in equation.invars):
                without_x.update(equation.outvars)
        residuals = self._jaxpr.jaxpr.outvars[self._result.num_leaves :]
        self._recomputed = [isinstance(value, Literal) or value in without_x for value in residuals]
        """Which of the values that the backward pass needs are recomputed."""

    def forward(self, weights: Any, x: Any, constants: Any) -> tuple[Any, list[Any]]:
        """The result, and the residuals."""
        outputs = jaxpr_as_fun(self._jaxpr)(*jax.tree.leaves((weights, constants, x)))
        count = self._result.num_leaves
        residuals = [leaf for leaf, again in zip(outputs[count:], self._recomputed, strict=True) if not again]
        return self._result.unflatten(outputs[:count]), residuals

    def backward(self, weights: Any, constants: Any, residuals: list[Any], cotangent: Any) -> tuple[Any, Any]:
        """The gradients in weights and x, from the residuals and the gradient of the result."""
        used = [False] * self._result.num_leaves + self._recomputed
        jaxpr, needed = dce_jaxpr(self._jaxpr.jaxpr, used)
        leaves = jax.tree.leaves((weights, constants))
        arguments = [leaf for leaf, is_needed in zip(leaves, needed, strict=False) if is_needed]
        recomputed = iter(jaxpr_as_fun(self._jaxpr.replace(jaxpr=jaxpr))(*arguments))
        saved = iter(residuals)
        leaves = [next(recomputed if again else saved) for again in self._recomputed]
        return self._back.unflatten(leaves)(cotangent)

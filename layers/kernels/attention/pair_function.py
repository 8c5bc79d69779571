"""Functions of a query and a key, split into values that are computed once and operations that run for each pair.

A mask or a score is any traced function of the scalars (score, batch, head, query, key). Its jaxpr is cut at the values
that depend on the query alone, on the key alone, or on neither. These hoisted values are computed before attention
starts, as arrays with an entry for each query, key, or sequence and head. The remaining per-pair operations run on
blocks of pairs: in plain JAX, inside a kernel, or on intervals (intervals.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.errors import TracerArrayConversionError, TracerBoolConversionError, TracerIntegerConversionError
from jax.extend.core import ClosedJaxpr  # pyright: ignore
from jax.extend.core import Literal as JaxprLiteral
from jaxtyping import Array, Int

Side = Literal["neither", "query", "key"]
LEAVES = ("score", "batch", "head", "query", "key")

_CHEAP = "add sub mul neg abs max min and or xor not eq ne lt le gt ge select_n convert_element_type sign"
CHEAP = frozenset(_CHEAP.split())
"""Recomputed in each block rather than hoisted: a vector unit takes no longer for them than to load a result."""

_ELEMENTWISE = """
div rem pow integer_pow exp exp2 log log1p expm1 tanh logistic sin cos tan erf erf_inv sqrt rsqrt cbrt square floor ceil
round clamp is_finite shift_left shift_right_logical shift_right_arithmetic asin acos atan atan2 sinh cosh copy
nextafter population_count
"""
ELEMENTWISE = CHEAP | frozenset(_ELEMENTWISE.split())

TRANSPARENT = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint", "core_call")
"""Primitives that call a function; its operations take their place."""

PLACEMENT = ("reshard", "sharding_constraint", "mesh_cast")
"""Primitives that set the sharding of an array and leave its numbers as they are."""


@dataclass(eq=False, repr=False)
class Value:
    """A scalar of the traced function: a leaf (an index or the score), a constant, or a result of an operation."""

    dtype: Any
    shape: tuple[int, ...]
    """() except for arrays that are indexed."""
    depends: frozenset[str]
    leaf: str = ""
    constant: Any = None
    operation: "Operation | None" = None

    @property
    def side(self) -> Side | None:
        """What the value depends on, if it can be hoisted; None if it has to be computed for each pair."""
        if "score" in self.depends or {"query", "key"} <= self.depends:
            return None
        return "query" if "query" in self.depends else "key" if "key" in self.depends else "neither"


@dataclass(eq=False, repr=False)
class Operation:
    """An application of a JAX primitive."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.primitive.name

    @property
    def elementwise(self) -> bool:
        """Whether the primitive applies to arrays of pairs as it does to scalars."""
        return self.name in ELEMENTWISE and not any(value.shape for value in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Sizes:
    """The numbers of sequences, query heads, queries and keys, and the positions of queries and keys."""

    batch: int
    heads: int
    queries: int
    keys: int
    query: Any = 0
    """The position of the first query, an int; or of all queries, Int "B 1 T" (B may be 1)."""
    key: Any = 0
    """The position of the first key, or of all keys."""


@dataclass(eq=False)
class PairFunction:
    """A function of (score, batch, head, query, key), split into hoisted values and per-pair operations."""

    outputs: tuple[Value, ...]
    hoisted: tuple[Value, ...] = field(init=False)
    """What the per-pair operations read besides indices and score; computed by `hoisted_values`."""
    per_pair: tuple[Operation, ...] = field(init=False)

    def __post_init__(self) -> None:
        hoisted: dict[Value, None] = {}
        per_pair: dict[Operation, None] = {}

        def visit(value: Value) -> None:
            operation = value.operation
            if (
                value.leaf in ("score", "query", "key")
                or is_literal(value)
                or value in hoisted
                or operation in per_pair
            ):
                return
            if value.side == "neither" or (value.side is not None and not _cheap(value)):
                hoisted[value] = None
                return
            assert operation is not None, value
            for source in operation.inputs:
                visit(source)
            per_pair[operation] = None

        for output in self.outputs:
            visit(output)
        self.hoisted, self.per_pair = tuple(hoisted), tuple(per_pair)

    @property
    def lookups(self) -> list[Operation]:
        """The per-pair operations that are not elementwise: lookups by query and key, and what no kernel can run."""
        return [operation for operation in self.per_pair if not operation.elementwise]

    def evaluate(
        self,
        read: Callable[[Value], Array],
        lookup: Callable[[Operation], Array] | None = None,
        apply: "Callable[[Operation, Sequence[Array]], list[Array]] | None" = None,
    ) -> list[Array]:
        """The outputs on arrays of pairs.

        Args:
            read: returns leaves and hoisted values, as arrays that broadcast against each other.
            lookup: evaluates the operations that are not elementwise, in place of `apply`.
            apply: evaluates an operation on its inputs; `applied` by default.
        """
        apply = apply or applied
        results: dict[Value, Array] = {}

        def get(value: Value) -> Array:
            if value in results:
                return results[value]
            return jnp.asarray(value.constant, value.dtype) if is_literal(value) else read(value)

        for operation in self.per_pair:
            if lookup is not None and not operation.elementwise:
                outputs = [lookup(operation)]
            else:
                outputs = apply(operation, [get(value) for value in operation.inputs])
            results |= dict(zip(operation.outputs, outputs, strict=True))
        return [get(output) for output in self.outputs]

    @property
    def arrays(self) -> list[Any]:
        """The arrays that the function closes over."""
        return [value.constant for value in self._constants()]

    @property
    def concrete(self) -> bool:
        """Whether none of them is a tracer."""
        return not any(isinstance(array, Tracer) for array in self.arrays)

    def hoisted_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        """The leading dimensions of all hoisted values: (B or 1, N or 1, T or S or 1)."""
        index = jax.eval_shape(lambda: positions(sizes))

        def shape(value: Value) -> Any:
            return jnp.broadcast_shapes((1, 1, 1), *(index[leaf].shape for leaf in value.depends))

        return [shape(value) for value in self.hoisted]

    def hoisted_values(self, sizes: Sizes, arrays: Sequence[Any] | None = None) -> list[Array]:
        """All hoisted values, as arrays (B or 1, N or 1, T or S or 1, ...); `arrays` replaces `self.arrays`."""
        constants = dict(zip(self._constants(), self.arrays if arrays is None else arrays, strict=True))
        for operation in self.per_pair:
            if operation.name == "lookup":
                _check_lookup(operation, sizes)
        return [_hoisted_value(value, sizes, constants) for value in self.hoisted]

    def _constants(self) -> list[Value]:
        constants: dict[Value, None] = {}
        visited: set[Value] = set()
        pending = list(self.hoisted)
        while pending:
            value = pending.pop()
            if value in visited:
                continue
            visited.add(value)
            if value.constant is not None and not is_literal(value):
                constants[value] = None
            if value.operation is not None:
                pending.extend(value.operation.inputs)
        return list(constants)


def trace(function: Callable[..., Any], score: bool = False) -> PairFunction:
    """Traces `function(batch, head, query, key)`, or with `score` `function(score, batch, head, query, key)`.

    The function is called with scalars: int32 indices and a float32 score.

    Raises:
        ValueError: if the function cannot be traced, or does not return one scalar: bool for a mask, float32 for a
            score.
    """
    names = LEAVES if score else LEAVES[1:]
    kind, dtype = ("score", jnp.float32) if score else ("mask", jnp.bool_)
    scalars = [jax.ShapeDtypeStruct((), jnp.float32 if name == "score" else jnp.int32) for name in names]
    try:
        closed: Any = jax.make_jaxpr(function)(*scalars)
    except (TracerBoolConversionError, TracerArrayConversionError, TracerIntegerConversionError) as error:
        raise ValueError(
            f"a {kind} function is traced: use &, | and jnp.where in place of `and`, `or` and `if`, and jnp.asarray of "
            f"an array that it looks up"
        ) from error
    results = [(aval.dtype.name, aval.shape) for aval in closed.out_avals]
    if results != [(jnp.dtype(dtype).name, ())]:
        raise ValueError(
            f"a {kind} function maps scalars to a scalar of type {jnp.dtype(dtype).name}, got a result of "
            + (" and ".join(f"type {name} and shape {shape}" for name, shape in results) or "nothing")
        )
    leaves = [Value(x.dtype, (), frozenset([name]), leaf=name) for name, x in zip(names, scalars, strict=True)]
    traced = PairFunction(tuple(_inline(closed, leaves)))
    if score and "score" not in traced.outputs[0].depends:
        raise ValueError("a score function changes the score it is given, got one that ignores it: add 0.0 * score")
    return traced


def _inline(closed: ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
    """The results of a jaxpr as values; functions that it calls are inlined."""
    jaxpr: Any = closed.jaxpr
    values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(_constant, closed.consts), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value:
        return _constant(atom.val) if isinstance(atom, JaxprLiteral) else values[atom]

    for equation in jaxpr.eqns:
        inputs = tuple(map(read, equation.invars))
        inner = _called(equation)
        if equation.primitive.name in PLACEMENT:
            results = list(inputs)
        elif inner is not None:
            results = _inline(inner, inputs)
        else:
            # The function is traced under a mesh, and its operations are applied to the arrays of one device.
            params = {n: None if n in ("sharding", "out_sharding") else x for n, x in equation.params.items()}
            operation = Operation(equation.primitive, params, inputs)
            depends = frozenset().union(*(value.depends for value in inputs))
            results = [Value(v.aval.dtype, v.aval.shape, depends, operation=operation) for v in equation.outvars]
            operation.outputs = tuple(results)
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _called(equation: Any) -> ClosedJaxpr | None:
    if equation.primitive.name not in TRANSPARENT:
        return None
    inner = next(equation.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in equation.params)
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _constant(value: Any) -> Value:
    if not np.shape(value) and not isinstance(value, Tracer):
        value = np.asarray(value)  # an array may be tied to a mesh, a number is not
    return Value(jnp.result_type(value), np.shape(value), frozenset(), constant=value)


def is_literal(value: Value) -> bool:
    """Whether it is a number that is known at trace time."""
    return value.constant is not None and not value.shape and not isinstance(value.constant, Tracer)


def _cheap(value: Value) -> bool:
    """Whether it takes only a few cheap operations on the index itself and on numbers."""
    if value.leaf in ("query", "key") or is_literal(value):
        return True
    if value.side == "neither":
        return not value.shape
    operation = value.operation
    return operation is not None and operation.name in CHEAP and all(map(_cheap, operation.inputs))


def applied(operation: Operation, inputs: Sequence[Array]) -> list[Array]:
    """One operation on arrays whose leading dimensions broadcast."""
    if operation.name == "lookup":
        table, *indices = inputs
        return [table.reshape(table.shape[-len(indices) :])[tuple(jnp.broadcast_arrays(*indices))]]
    if operation.elementwise:
        inputs = jnp.broadcast_arrays(*inputs)
        outputs = operation.primitive.bind(*inputs, **operation.params)
        return list(outputs) if operation.primitive.multiple_results else [outputs]
    lead = jnp.broadcast_shapes(*(_lead(x, value) for x, value in zip(inputs, operation.inputs, strict=True)))
    flat = []
    for x, value in zip(inputs, operation.inputs, strict=True):
        wide = jnp.broadcast_to(x, (*lead, *value.shape)) if _lead(x, value) else x
        flat.append(wide.reshape(-1, *value.shape) if _lead(x, value) else x)
    axes = [0 if _lead(x, value) else None for x, value in zip(inputs, operation.inputs, strict=True)]

    def call(*scalars: Array) -> list[Array]:
        outputs = operation.primitive.bind(*scalars, **operation.params)
        return list(outputs) if operation.primitive.multiple_results else [outputs]

    if all(axis is None for axis in axes):
        return call(*inputs)
    outputs = jax.vmap(call, in_axes=axes)(*flat)
    return [x.reshape(*lead, *value.shape) for x, value in zip(outputs, operation.outputs, strict=True)]


def _lead(array: Array, value: Value) -> tuple[int, ...]:
    return array.shape[: array.ndim - len(value.shape)]


def _hoisted_value(hoisted: Value, sizes: Sizes, constants: dict[Value, Any]) -> Array:
    """A hoisted value for all sequences, heads and positions: (B or 1, N or 1, T or S or 1, ...)."""
    operations: dict[Operation, None] = {}

    def visit(value: Value) -> None:
        if value.operation is not None and value.operation not in operations:
            for source in value.operation.inputs:
                visit(source)
            operations[value.operation] = None

    visit(hoisted)
    indices = positions(sizes)
    results: dict[Value, Array] = {}

    def get(value: Value) -> Array:
        if value.leaf:
            return indices[value.leaf]
        if value.operation is not None:
            return results[value]
        return jnp.asarray(constants.get(value, value.constant), value.dtype)

    for operation in operations:
        if operation.name == "lookup":
            _check_lookup(operation, sizes)
            sliced = _in_order(operation, get(operation.inputs[0]), sizes)
            outputs = [sliced] if sliced is not None else applied(operation, [get(value) for value in operation.inputs])
        else:
            outputs = applied(operation, [get(value) for value in operation.inputs])
        results |= dict(zip(operation.outputs, outputs, strict=True))
    array = get(hoisted)
    return array.reshape((1,) * (3 - (array.ndim - len(hoisted.shape))) + array.shape)


def positions(sizes: Sizes) -> dict[str, Int[Array, "..."]]:
    """Index arrays that broadcast to B N T (or S)."""

    def along(count: int, position: Any) -> Array:
        return position + jnp.arange(count, dtype=jnp.int32)[None, None] if isinstance(position, int) else position

    return {
        "batch": jnp.arange(sizes.batch, dtype=jnp.int32)[:, None, None],
        "head": jnp.arange(sizes.heads, dtype=jnp.int32)[None, :, None],
        "query": along(sizes.queries, sizes.query),
        "key": along(sizes.keys, sizes.key),
    }


def _in_order(operation: Operation, table: Array, sizes: Sizes) -> Array | None:
    """A lookup by indices that run in order, as a slice; None where they do not."""
    leaves = [value.leaf for value in operation.inputs[1:]]
    dims = {"batch": 0, "head": 1, "query": 2, "key": 2}
    if not all(leaf in dims for leaf in leaves):
        return None
    if [dims[leaf] for leaf in leaves] != sorted({dims[leaf] for leaf in leaves}):
        return None
    shape = [1, 1, 1]
    for leaf, size in zip(leaves, table.shape, strict=True):
        shape[dims[leaf]] = size
    table = table.reshape(shape)
    if "query" in leaves:
        if not isinstance(sizes.query, int):
            return None
        table = table[:, :, sizes.query : sizes.query + sizes.queries]
    return table


def _check_lookup(operation: Operation, sizes: Sizes) -> None:
    """Raises ValueError if the shape of an indexed array does not fit its axes."""
    table, cell = operation.inputs[0], operation.params["size"]
    first = sizes.query if isinstance(sizes.query, int) else 0
    if first < 0 and "T" in operation.params["axes"].split():
        raise ValueError(f"{operation.params['name']} has no entries for positions before 0, got query_offset={first}")
    queries, keys = -(-(first + sizes.queries) // cell), -(-sizes.keys // cell)
    expected = {"B": sizes.batch, "N": sizes.heads, "T": queries, "S": keys}
    for letter, size in zip(operation.params["axes"].split(), table.shape, strict=True):
        fits = size >= expected[letter] if letter == "T" else size == expected.get(letter, size)
        if not fits:
            least = "at least " if letter == "T" and first else ""
            axes = f"{operation.params['axes']} with {letter} {least}{expected[letter]}"
            raise ValueError(f"{operation.params['name']} must be {axes}, got shape {table.shape}")

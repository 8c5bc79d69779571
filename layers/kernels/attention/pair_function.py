"""Functions of a pair, a query and a key, taken apart: what can be computed once, and what is left to do for each pair.

A mask or a score is any traced function of the scalars (score, batch, head, query, key). Its jaxpr is cut at the values
that depend on the query alone, on the key alone, or on neither: they are computed before attention starts, as arrays
with a row for each query, key, or sequence and head ("sides"). What is left, the body, runs on blocks of pairs: in
plain JAX, inside a kernel, or on intervals (intervals.py), without knowing which mask it is.
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
"""Done again in each block rather than stored: a vector unit needs no longer for them than for loading a result."""

_ELEMENTWISE = """
div rem pow integer_pow exp exp2 log log1p expm1 tanh logistic sin cos tan erf erf_inv sqrt rsqrt cbrt square floor ceil
round clamp is_finite shift_left shift_right_logical shift_right_arithmetic asin acos atan atan2 sinh cosh copy
nextafter population_count
"""
ELEMENTWISE = CHEAP | frozenset(_ELEMENTWISE.split())

TRANSPARENT = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint", "core_call")
"""They call a function, which is taken apart in their place."""

PLACEMENT = ("reshard", "sharding_constraint", "mesh_cast")
"""They say where an array is, and change nothing of it."""


@dataclass(eq=False, repr=False)
class Value:
    """A scalar of the traced function: a leaf (an index or the score), a constant, or a result of an operation."""

    dtype: Any
    shape: tuple[int, ...]
    """Empty, but for arrays that are looked up in."""
    depends: frozenset[str]
    leaf: str = ""
    constant: Any = None
    operation: "Operation | None" = None

    @property
    def side(self) -> Side | None:
        """What it can be computed for once; None for a value of its own for each pair."""
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
        """The primitive's."""
        return self.primitive.name

    @property
    def elementwise(self) -> bool:
        """Whether it may be applied to arrays of scalars as it is."""
        return self.name in ELEMENTWISE and not any(value.shape for value in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Sizes:
    """How many sequences, query heads, queries and keys there are, and where they are."""

    batch: int
    heads: int
    queries: int
    keys: int
    query: Any = 0
    """The position of the first query, an int; or of all, Int "B 1 T" (B may be 1)."""
    key: Any = 0
    """The position of the first key, or of all."""


@dataclass(eq=False)
class PairFunction:
    """A function of (score, batch, head, query, key), cut into sides and body."""

    outputs: tuple[Value, ...]
    sides: tuple[Value, ...] = field(init=False)
    """What the body reads besides indices and score; computed by `side_values`."""
    body: tuple[Operation, ...] = field(init=False)

    def __post_init__(self) -> None:
        sides: dict[Value, None] = {}
        body: dict[Operation, None] = {}

        def visit(value: Value) -> None:
            operation = value.operation
            if value.leaf in ("score", "query", "key") or is_literal(value) or value in sides or operation in body:
                return
            if value.side == "neither" or (value.side is not None and not _cheap(value)):
                sides[value] = None
                return
            assert operation is not None, value
            for source in operation.inputs:
                visit(source)
            body[operation] = None

        for output in self.outputs:
            visit(output)
        self.sides, self.body = tuple(sides), tuple(body)

    @property
    def lookups(self) -> list[Operation]:
        """What of the body is not elementwise: the lookups by query and key, and operations a kernel cannot run."""
        return [operation for operation in self.body if not operation.elementwise]

    def evaluate(
        self,
        read: Callable[[Value], Array],
        lookup: Callable[[Operation], Array] | None = None,
        apply: "Callable[[Operation, Sequence[Array]], list[Array]] | None" = None,
    ) -> list[Array]:
        """The outputs on arrays of pairs: `read` gives leaves and sides as arrays that broadcast against each other.

        `lookup`, if given, does what is not elementwise, and `apply` the rest.
        """
        do = apply or applied
        known: dict[Value, Array] = {}

        def get(value: Value) -> Array:
            if value in known:
                return known[value]
            return jnp.asarray(value.constant, value.dtype) if is_literal(value) else read(value)

        for operation in self.body:
            if lookup is not None and not operation.elementwise:
                found = [lookup(operation)]
            else:
                found = do(operation, [get(value) for value in operation.inputs])
            known |= dict(zip(operation.outputs, found, strict=True))
        return [get(output) for output in self.outputs]

    @property
    def arrays(self) -> list[Any]:
        """The arrays that the function closes over."""
        return [value.constant for value in self._constants()]

    @property
    def known(self) -> bool:
        """Whether all of them are known now."""
        return not any(isinstance(array, Tracer) for array in self.arrays)

    def side_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        """The leading dimensions of all sides: (B or 1, N or 1, T or S or 1)."""

        def shape(side: Value) -> Any:
            return jnp.broadcast_shapes((1, 1, 1), *(places[leaf].shape for leaf in side.depends))

        places = jax.eval_shape(lambda: positions(sizes))
        return [shape(side) for side in self.sides]

    def side_values(self, sizes: Sizes, arrays: Sequence[Any] | None = None) -> list[Array]:
        """Arrays of shape (B or 1, N or 1, T or S or 1, ...) of all sides; `arrays` are in place of its own."""
        given = dict(zip(self._constants(), self.arrays if arrays is None else arrays, strict=True))
        for operation in self.body:
            if operation.name == "lookup":
                _check_lookup(operation, sizes)
        return [_side_value(side, sizes, given) for side in self.sides]

    def _constants(self) -> list[Value]:
        found: dict[Value, None] = {}
        seen: set[Value] = set()
        left = list(self.sides)
        while left:
            value = left.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.constant is not None and not is_literal(value):
                found[value] = None
            if value.operation is not None:
                left.extend(value.operation.inputs)
        return list(found)


def trace(function: Callable[..., Any], score: bool = False) -> PairFunction:
    """Traces `function(batch, head, query, key)`, or with `score` `function(score, batch, head, query, key)`.

    It is called with scalars: int32 indices and a float32 score. ValueError is raised where it gives something else
    than one scalar, bool for a mask and float32 for a score, or can't be traced.
    """
    names = LEAVES if score else LEAVES[1:]
    what, wanted = ("score", jnp.float32) if score else ("mask", jnp.bool_)
    kinds = [jax.ShapeDtypeStruct((), jnp.float32 if name == "score" else jnp.int32) for name in names]
    try:
        closed: Any = jax.make_jaxpr(function)(*kinds)
    except (TracerBoolConversionError, TracerArrayConversionError, TracerIntegerConversionError) as error:
        raise ValueError(
            f"a {what} function is traced: use &, | and jnp.where in place of `and`, `or` and `if`, and jnp.asarray of "
            f"an array that it looks up"
        ) from error
    results = [(aval.dtype.name, aval.shape) for aval in closed.out_avals]
    if results != [(jnp.dtype(wanted).name, ())]:
        raise ValueError(
            f"a {what} function maps scalars to a scalar of type {jnp.dtype(wanted).name}, got a result of "
            + (" and ".join(f"type {dtype} and shape {shape}" for dtype, shape in results) or "nothing")
        )
    leaves = [Value(kind.dtype, (), frozenset([name]), leaf=name) for name, kind in zip(names, kinds, strict=True)]
    traced = PairFunction(tuple(_inline(closed, leaves)))
    if score and "score" not in traced.outputs[0].depends:
        raise ValueError("a score function changes the score it is given, got one that ignores it: add 0.0 * score")
    return traced


def _inline(closed: ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
    """The results of a jaxpr as values, with functions that it calls taken apart."""
    jaxpr: Any = closed.jaxpr
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(_constant, closed.consts), strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value:
        return _constant(atom.val) if isinstance(atom, JaxprLiteral) else known[atom]

    for equation in jaxpr.eqns:
        inputs = tuple(map(read, equation.invars))
        inner = _called(equation)
        if equation.primitive.name in PLACEMENT:
            results = list(inputs)
        elif inner is not None:
            results = _inline(inner, inputs)
        else:
            # It is traced where arrays may be split over a mesh, and done where they are not.
            params = {n: None if n in ("sharding", "out_sharding") else x for n, x in equation.params.items()}
            operation = Operation(equation.primitive, params, inputs)
            depends = frozenset().union(*(value.depends for value in inputs))
            results = [Value(v.aval.dtype, v.aval.shape, depends, operation=operation) for v in equation.outvars]
            operation.outputs = tuple(results)
        known |= dict(zip(equation.outvars, results, strict=True))
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
    """Whether it is a number known now."""
    return value.constant is not None and not value.shape and not isinstance(value.constant, Tracer)


def _cheap(value: Value) -> bool:
    """Whether it takes no more than a few cheap operations on the index itself and on numbers."""
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
        found = operation.primitive.bind(*inputs, **operation.params)
        return list(found) if operation.primitive.multiple_results else [found]
    lead = jnp.broadcast_shapes(*(_lead(x, value) for x, value in zip(inputs, operation.inputs, strict=True)))
    flat = []
    for x, value in zip(inputs, operation.inputs, strict=True):
        wide = jnp.broadcast_to(x, (*lead, *value.shape)) if _lead(x, value) else x
        flat.append(wide.reshape(-1, *value.shape) if _lead(x, value) else x)
    axes = [0 if _lead(x, value) else None for x, value in zip(inputs, operation.inputs, strict=True)]

    def call(*scalars: Array) -> list[Array]:
        found = operation.primitive.bind(*scalars, **operation.params)
        return list(found) if operation.primitive.multiple_results else [found]

    if all(axis is None for axis in axes):
        return call(*inputs)
    found = jax.vmap(call, in_axes=axes)(*flat)
    return [x.reshape(*lead, *value.shape) for x, value in zip(found, operation.outputs, strict=True)]


def _lead(array: Array, value: Value) -> tuple[int, ...]:
    return array.shape[: array.ndim - len(value.shape)]


def _side_value(side: Value, sizes: Sizes, constants: dict[Value, Any]) -> Array:
    """The value of a side for all sequences, heads and positions: (B or 1, N or 1, T or S or 1, ...)."""
    operations: dict[Operation, None] = {}

    def visit(value: Value) -> None:
        if value.operation is not None and value.operation not in operations:
            for source in value.operation.inputs:
                visit(source)
            operations[value.operation] = None

    visit(side)
    indices = positions(sizes)
    known: dict[Value, Array] = {}

    def get(value: Value) -> Array:
        if value.leaf:
            return indices[value.leaf]
        if value.operation is not None:
            return known[value]
        return jnp.asarray(constants.get(value, value.constant), value.dtype)

    for operation in operations:
        if operation.name == "lookup":
            _check_lookup(operation, sizes)
            whole = _in_order(operation, get(operation.inputs[0]), sizes)
            found = [whole] if whole is not None else applied(operation, [get(value) for value in operation.inputs])
        else:
            found = applied(operation, [get(value) for value in operation.inputs])
        known |= dict(zip(operation.outputs, found, strict=True))
    array = get(side)
    return array.reshape((1,) * (3 - (array.ndim - len(side.shape))) + array.shape)


def positions(sizes: Sizes) -> dict[str, Int[Array, "..."]]:
    """Index arrays that broadcast to B N T (or S)."""

    def along(count: int, place: Any) -> Array:
        return place + jnp.arange(count, dtype=jnp.int32)[None, None] if isinstance(place, int) else place

    return {
        "batch": jnp.arange(sizes.batch, dtype=jnp.int32)[:, None, None],
        "head": jnp.arange(sizes.heads, dtype=jnp.int32)[None, :, None],
        "query": along(sizes.queries, sizes.query),
        "key": along(sizes.keys, sizes.key),
    }


def _in_order(operation: Operation, table: Array, sizes: Sizes) -> Array | None:
    """A lookup by indices that run in order, as a slice; None where they do not."""
    leaves = [value.leaf for value in operation.inputs[1:]]
    place = {"batch": 0, "head": 1, "query": 2, "key": 2}
    if not all(leaf in place for leaf in leaves) or [place[leaf] for leaf in leaves] != sorted(
        {place[leaf] for leaf in leaves}
    ):
        return None
    shape = [1, 1, 1]
    for leaf, size in zip(leaves, table.shape, strict=True):
        shape[place[leaf]] = size
    table = table.reshape(shape)
    if "query" in leaves:
        if not isinstance(sizes.query, int):
            return None
        table = table[:, :, sizes.query : sizes.query + sizes.queries]
    return table


def _check_lookup(operation: Operation, sizes: Sizes) -> None:
    """Raises ValueError where an array that is looked up in has another shape than its axes say."""
    table, cell = operation.inputs[0], operation.params["size"]
    first = sizes.query if isinstance(sizes.query, int) else 0
    if first < 0 and "T" in operation.params["axes"].split():
        raise ValueError(f"{operation.params['name']} has nothing for positions before 0, got query_offset={first}")
    wanted = {"B": sizes.batch, "N": sizes.heads, "T": -(-(first + sizes.queries) // cell), "S": -(-sizes.keys // cell)}
    for letter, size in zip(operation.params["axes"].split(), table.shape, strict=True):
        fits = size >= wanted[letter] if letter == "T" else size == wanted.get(letter, size)
        if not fits:
            least = "at least " if letter == "T" and first else ""
            raise ValueError(
                f"{operation.params['name']} must be {operation.params['axes']} with {letter} {least}{wanted[letter]}, "
                f"got shape {table.shape}"
            )

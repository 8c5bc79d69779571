"""What a mask may be on a whole block of pairs, from intervals of its indices: empty, full, or not known.

A pair function (pair_function.py) is evaluated on intervals [low, high] in place of numbers. Comparisons of independent
intervals are exact, so causal masks, windows, chunks and documents of packed sequences are classified without looking
at a single pair. What a rule below does not know is unknown, which is always right and never sharp.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .pair_function import Operation, PairFunction, Value, is_literal


@dataclass(frozen=True)
class Interval:
    """Bounds of a value on each block; arrays that broadcast against each other. Of booleans: False < True."""

    low: Any
    high: Any


Bounds = Interval | None
"""None: it may be anything."""


def bounds(function: PairFunction, read: Callable[[Value], Bounds], xp: Any) -> tuple[Bounds, bool]:
    """Bounds of the output, and whether a rule was known for every operation.

    `read` gives the bounds of leaves and sides; `xp` is numpy or jax.numpy.
    """
    known: dict[Value, Bounds] = {}
    sure = True

    def get(value: Value) -> Bounds:
        if value in known:
            return known[value]
        if is_literal(value):
            number = np.asarray(value.constant)
            return Interval(number, number)
        return read(value)

    for operation in function.body:
        inputs = [get(value) for value in operation.inputs]
        found = _apply(operation, inputs, xp)
        sure = sure and found is not None
        known |= dict.fromkeys(operation.outputs, None) | dict(zip(operation.outputs[:1], [found], strict=False))
    return get(function.outputs[0]), sure


def _apply(operation: Operation, inputs: Sequence[Any], xp: Any) -> Bounds:
    """Bounds of the (first) result of an operation; None unless a rule is sure."""
    boolean = operation.inputs[0].dtype == np.bool_ if operation.inputs else False
    name = operation.name
    if name in _LOGIC and boolean:
        return _LOGIC[name](*(Interval(np.False_, np.True_) if x is None else x for x in inputs))
    if name in ("eq", "ne") and boolean:
        return None
    if name == "lookup":
        return _lookup(operation, inputs, xp)
    if name == "select_n":
        return _select(inputs, xp)
    known = [x for x in inputs if x is not None]
    if len(known) < len(inputs):
        return Interval(np.False_, np.True_) if operation.outputs[0].dtype == np.bool_ else None
    rule = _RULES.get(name)
    return None if rule is None else rule(xp, operation, *known)


_LOGIC: dict[str, Callable[..., Interval]] = {
    "and": lambda a, b: Interval(a.low & b.low, a.high & b.high),
    "or": lambda a, b: Interval(a.low | b.low, a.high | b.high),
    "not": lambda a: Interval(~a.high, ~a.low),
}


def _extremes(xp: Any, function: Callable[[Any, Any], Any], a: Interval, b: Interval) -> Interval:
    corners = [function(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low, high = xp.minimum(low, corner), xp.maximum(high, corner)
    return Interval(low, high)


def _positive(x: Any) -> bool:
    """Whether it is one positive number, known now."""
    return x.low is x.high and isinstance(x.low, np.ndarray) and bool(np.all(x.low > 0))


def _divide(xp: Any, operation: Operation, a: Interval, b: Interval) -> Bounds:
    """Truncating division by a positive number, which keeps the order."""
    if not _positive(b):
        return None
    if not np.issubdtype(operation.inputs[0].dtype, np.integer):
        return Interval(a.low / b.low, a.high / b.low)
    return Interval(*(xp.sign(x) * (abs(x) // b.low) for x in (a.low, a.high)))


def _remainder(xp: Any, operation: Operation, a: Interval, b: Interval) -> Bounds:
    """Exact where the whole interval lies in one period, for a >= 0."""
    if not _positive(b) or not np.issubdtype(operation.inputs[0].dtype, np.integer):
        return None
    one = (a.low >= 0) & (a.low // b.low == a.high // b.low)
    least = xp.where(a.low < 0, -(b.low - 1), 0)
    return Interval(xp.where(one, a.low % b.low, least), xp.where(one, a.high % b.low, b.low - 1))


def _absolute(xp: Any, _: Operation, a: Interval) -> Interval:
    crosses = (a.low <= 0) & (a.high >= 0)
    low, high = abs(a.low), abs(a.high)
    return Interval(xp.where(crosses, 0, xp.minimum(low, high)).astype(a.low.dtype), xp.maximum(low, high))


def _convert(xp: Any, operation: Operation, a: Interval) -> Bounds:
    dtype = np.dtype(operation.params["new_dtype"])
    if dtype == np.bool_:
        return None
    return Interval(a.low.astype(dtype), a.high.astype(dtype))


def _select(inputs: Sequence[Any], xp: Any) -> Bounds:
    which, *cases = inputs
    if len(cases) != 2 or cases[0] is None or cases[1] is None:
        return None
    no, yes = cases
    low, high = xp.minimum(no.low, yes.low), xp.maximum(no.high, yes.high)
    if which is None:
        return Interval(low, high)
    # Where the choice is certain, the bounds are those of the case that is chosen.
    pick = [
        xp.where(which.low, sure_yes, xp.where(which.high, either, sure_no))
        for sure_yes, sure_no, either in ((yes.low, no.low, low), (yes.high, no.high, high))
    ]
    return Interval(*pick)


def _lookup(operation: Operation, inputs: Sequence[Any], xp: Any) -> Bounds:
    """Whether any or all entries of a boolean table are true in the box of the indices, from its summed-area table."""
    table, *indices = inputs
    if table is None or any(index is None for index in indices) or operation.outputs[0].dtype != np.bool_:
        return None
    boxes: list[Any] = indices
    sums = table.low.reshape(table.low.shape[-len(boxes) :]).astype(np.int32)
    for axis in range(sums.ndim):
        sums = xp.cumsum(xp.pad(sums, [(int(axis == other), 0) for other in range(sums.ndim)]), axis=axis)
    count, area = 0, 1
    for corner in range(2 ** len(boxes)):
        upper = [bool(corner >> axis & 1) for axis in range(len(boxes))]
        places = tuple(xp.asarray(b.high) + 1 if up else xp.asarray(b.low) for b, up in zip(boxes, upper, strict=True))
        count = count + (-1) ** (len(boxes) - sum(upper)) * sums[tuple(xp.broadcast_arrays(*places))]
    for box in boxes:
        area = area * (box.high - box.low + 1)
    return Interval(count == area, count > 0)


_RULES: dict[str, Callable[..., Bounds]] = {
    "add": lambda xp, _, a, b: Interval(a.low + b.low, a.high + b.high),
    "sub": lambda xp, _, a, b: Interval(a.low - b.high, a.high - b.low),
    "mul": lambda xp, _, a, b: _extremes(xp, operator.mul, a, b),
    "neg": lambda xp, _, a: Interval(-a.high, -a.low),
    "abs": _absolute,
    "sign": lambda xp, _, a: Interval(xp.sign(a.low), xp.sign(a.high)),
    "min": lambda xp, _, a, b: Interval(xp.minimum(a.low, b.low), xp.minimum(a.high, b.high)),
    "max": lambda xp, _, a, b: Interval(xp.maximum(a.low, b.low), xp.maximum(a.high, b.high)),
    "div": _divide,
    "rem": _remainder,
    "convert_element_type": _convert,
    "lt": lambda xp, _, a, b: Interval(a.high < b.low, a.low < b.high),
    "le": lambda xp, _, a, b: Interval(a.high <= b.low, a.low <= b.high),
    "gt": lambda xp, _, a, b: Interval(a.low > b.high, a.high > b.low),
    "ge": lambda xp, _, a, b: Interval(a.low >= b.high, a.high >= b.low),
    "eq": lambda xp, _, a, b: Interval(
        (a.low == a.high) & (b.low == b.high) & (a.low == b.low), (a.low <= b.high) & (b.low <= a.high)
    ),
    "ne": lambda xp, _, a, b: Interval(
        (a.high < b.low) | (b.high < a.low), (a.low != a.high) | (b.low != b.high) | (a.low != b.low)
    ),
}

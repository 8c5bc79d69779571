"""Bounds of a mask on whole blocks of pairs, by interval arithmetic.

A pair function (pair_function.py) is evaluated on intervals [low, high] in place of numbers. Comparisons of independent
intervals are exact, so causal masks, windows, chunks and documents of packed sequences are classified without
evaluating a single pair. Bounds may be wider than the values, never narrower, in the arithmetic of the dtype:

- Integers wrap modulo 2^bits. Where values on either side of a wrap may occur in one block, the bounds are the least
  and the greatest integer of the dtype.
- Floats round, so each result is widened by a few units in the last place. Where a result may be infinite or NaN, both
  bounds are NaN, and comparisons with them may be true or false.
- An operation without a rule here has no bounds (None).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from .pair_function import Operation, PairFunction, Value, is_literal

Numbers = Any
"""A numpy or JAX array, or a numpy scalar."""

INTEGERS = frozenset(np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
FLOATS = frozenset(map(jnp.dtype, ("bfloat16", "float16", "float32", "float64")))
BOOL = np.dtype(bool)


@dataclass(frozen=True)
class Interval:
    """Bounds of a value on each block, as arrays that broadcast against each other; for booleans, False < True."""

    low: Numbers
    high: Numbers


EITHER = Interval(np.False_, np.True_)
"""A boolean that may be true or false."""


def interval_of(
    function: PairFunction, read: Callable[[Value], Interval | None], xp: ModuleType
) -> tuple[Interval | None, bool]:
    """The bounds of the output, and whether every operation has a rule.

    Args:
        function: a mask or score.
        read: returns the bounds of leaves and hoisted values; None where nothing is known about them.
        xp: numpy or jax.numpy, whichever the bounds are arrays of.
    """
    intervals: dict[Value, Interval | None] = {}
    exact = True

    def get(value: Value) -> Interval | None:
        if value in intervals:
            return intervals[value]
        if is_literal(value):
            number = np.asarray(value.constant, value.dtype)
            return Interval(number, number)
        return read(value)

    with np.errstate(all="ignore"):  # integers wrap and floats overflow, as in the mask itself
        for operation in function.per_pair:
            interval = _apply(xp, operation, [get(value) for value in operation.inputs])
            exact = exact and interval is not None
            intervals |= dict.fromkeys(operation.outputs, None)
            intervals[operation.outputs[0]] = interval
    return get(function.outputs[0]), exact


def _apply(xp: ModuleType, operation: Operation, inputs: Sequence[Interval | None]) -> Interval | None:
    """The bounds of the first result of an operation; None without a rule, or without bounds of its inputs."""
    if operation.name == "lookup":
        return _lookup(xp, operation, inputs)
    values = (*operation.inputs, *operation.outputs)
    if not all(not value.shape and value.dtype in (*INTEGERS, *FLOATS, BOOL) for value in values):
        return None
    if operation.name == "select_n":
        return _select(xp, operation, inputs)
    if operation.inputs and operation.inputs[0].dtype == BOOL and operation.name in _LOGIC:
        return _LOGIC[operation.name](*(interval or EITHER for interval in inputs))
    rule = _RULES.get(operation.name)
    if rule is None:
        return None
    intervals = [interval for interval in inputs if interval is not None]
    if len(intervals) < len(inputs):
        return EITHER if operation.outputs[0].dtype == BOOL else None
    return rule(xp, operation, *intervals)


# Rounding and wrapping ------------------------------------------------------------------------------------------------


def _span(interval: Interval) -> Numbers:
    """High - low of integers, which is always a number of the unsigned dtype of the same width."""
    return (interval.high - interval.low).astype(np.dtype(f"uint{8 * interval.low.dtype.itemsize}"))


def _where(xp: ModuleType, valid: Numbers, low: Numbers, high: Numbers) -> Interval:
    """The bounds where they are valid, and those of the dtype, or NaN, elsewhere."""
    dtype = low.dtype
    least, greatest = (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max) if dtype in INTEGERS else (np.nan, np.nan)
    return Interval(xp.where(valid, low, np.asarray(least, dtype)), xp.where(valid, high, np.asarray(greatest, dtype)))


def _wrapped(xp: ModuleType, low: Numbers, high: Numbers, *inputs: Interval) -> Interval:
    """Bounds of a sum or difference of integers from those computed modulo 2^bits.

    The results lie in a range of integers as long as the spans of all inputs together. Modulo 2^bits it is still one
    range from `low` to `high` if it is shorter than 2^bits and its ends are in order.
    """
    valid, total = low <= high, None
    for interval in inputs:
        span = _span(interval)
        total = span if total is None else total + span
        valid = valid & (total >= span)
    return _where(xp, valid, low, high)


def _rounded(xp: ModuleType, low: Numbers, high: Numbers, *inputs: Interval) -> Interval:
    """Bounds of floats, widened by what rounding in another order, fused or in another precision may change."""
    info = jnp.finfo(low.dtype)
    step, tiny = np.asarray(4 * info.eps, low.dtype), np.asarray(info.tiny, low.dtype)
    low, high = low - (abs(low) * step + tiny), high + (abs(high) * step + tiny)
    valid = xp.isfinite(low) & xp.isfinite(high)
    for interval in inputs:
        valid = valid & xp.isfinite(interval.low) & xp.isfinite(interval.high)
    return _where(xp, valid, low, high)


# Arithmetic -----------------------------------------------------------------------------------------------------------


def _add(xp: ModuleType, _: Operation, a: Interval, b: Interval) -> Interval:
    modulo = _wrapped if a.low.dtype in INTEGERS else _rounded
    return modulo(xp, a.low + b.low, a.high + b.high, a, b)


def _subtract(xp: ModuleType, _: Operation, a: Interval, b: Interval) -> Interval:
    modulo = _wrapped if a.low.dtype in INTEGERS else _rounded
    return modulo(xp, a.low - b.high, a.high - b.low, a, b)


def _negate(xp: ModuleType, _: Operation, a: Interval) -> Interval:
    low, high = -a.high, -a.low
    return _wrapped(xp, low, high, a) if a.low.dtype in INTEGERS else Interval(low, high)


def _multiply(xp: ModuleType, _: Operation, a: Interval, b: Interval) -> Interval:
    corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    low = high = corners[0]
    for corner in corners[1:]:
        low, high = xp.minimum(low, corner), xp.maximum(high, corner)
    if low.dtype in FLOATS:
        return _rounded(xp, low, high, a, b)
    largest = [
        xp.maximum(*(abs(bound.astype(np.float32)) for bound in (interval.low, interval.high))) for interval in (a, b)
    ]
    # The product in float32 is off by a millionth, hence the margin.
    return _where(xp, largest[0] * largest[1] < np.float32(0.99 * jnp.iinfo(low.dtype).max), low, high)


def _is_positive(interval: Interval) -> bool:
    """Whether it is one positive number that is known at trace time."""
    low = interval.low
    if low is not interval.high or not isinstance(low, np.ndarray):
        return False
    return bool(np.all(low > 0 if low.dtype in INTEGERS else low >= jnp.finfo(low.dtype).tiny))


def _divide(xp: ModuleType, _: Operation, a: Interval, b: Interval) -> Interval | None:
    """Division by a positive number, which keeps the order; integers are truncated towards zero."""
    if not _is_positive(b):
        return None
    if a.low.dtype in FLOATS:
        return _rounded(xp, a.low / b.low, a.high / b.low, a, b)

    def truncated(x: Numbers) -> Numbers:
        return x // b.low + ((x < 0) & (x % b.low != 0)).astype(x.dtype)

    return Interval(truncated(a.low), truncated(a.high))


def _remainder(xp: ModuleType, _: Operation, a: Interval, b: Interval) -> Interval | None:
    """The remainder has the sign of the dividend; exact where a >= 0 and all of it lies in one period."""
    if not _is_positive(b) or a.low.dtype not in INTEGERS:
        return None
    one, zero = np.ones_like(b.low), np.zeros_like(b.low)
    same_period = (a.low >= 0) & (a.low // b.low == a.high // b.low)
    least = xp.where(a.low < 0, one - b.low, zero)
    return Interval(xp.where(same_period, a.low % b.low, least), xp.where(same_period, a.high % b.low, b.low - one))


def _absolute(xp: ModuleType, _: Operation, a: Interval) -> Interval:
    low, high = abs(a.low), abs(a.high)
    crosses = (a.low <= 0) & (a.high >= 0)
    least = xp.where(crosses, np.zeros((), low.dtype), xp.minimum(low, high))
    greatest = xp.maximum(low, high)
    # The absolute value of the least integer is that integer.
    return _where(xp, low >= 0, least, greatest) if low.dtype in INTEGERS else Interval(least, greatest)


def _convert(xp: ModuleType, operation: Operation, a: Interval) -> Interval:
    old, new = (np.dtype(values[0].dtype) for values in (operation.inputs, operation.outputs))
    if new == BOOL:
        return Interval((a.low > 0) | (a.high < 0), ~((a.low == 0) & (a.high == 0)))
    low, high = a.low.astype(new), a.high.astype(new)
    if new in INTEGERS:
        if old in FLOATS:
            return _truncated(xp, new, a)
        valid = low <= high  # else it wraps in between
        if old != BOOL and old.itemsize > new.itemsize:
            valid = valid & (_span(a) <= jnp.iinfo(f"uint{8 * new.itemsize}").max)
        return _where(xp, valid, low, high)
    info, rounded = jnp.finfo(new), _rounded(xp, low, high, *([a] if old in FLOATS else []))
    if old in FLOATS:
        keeps = jnp.finfo(old).nmant <= info.nmant and jnp.finfo(old).maxexp <= info.maxexp
        return Interval(low, high) if keeps else rounded
    # Integers of so many digits are kept as they are.
    limit = np.float32(2.0 ** (info.nmant + 1))
    keeps = (a.low.astype(np.float32) > -limit) & (a.high.astype(np.float32) < limit)
    return Interval(xp.where(keeps, low, rounded.low), xp.where(keeps, high, rounded.high))


def _truncated(xp: ModuleType, dtype: np.dtype, a: Interval) -> Interval:
    """Bounds of floats converted to integers, which is undefined outside the dtype and for NaN."""
    info = jnp.iinfo(dtype)
    low, high = (bound if bound.dtype == np.float64 else bound.astype(np.float32) for bound in (a.low, a.high))
    least, beyond = (np.asarray(float(number), low.dtype) for number in (info.min, int(info.max) + 1))
    return _where(xp, (low >= least) & (high < beyond), xp.trunc(low).astype(dtype), xp.trunc(high).astype(dtype))


# Choices --------------------------------------------------------------------------------------------------------------


def _select(xp: ModuleType, operation: Operation, inputs: Sequence[Interval | None]) -> Interval | None:
    if operation.inputs[0].dtype != BOOL or len(inputs) != 3:
        return None
    which, (no, yes) = inputs[0] or EITHER, inputs[1:]
    if no is None or yes is None:
        return None
    low, high = xp.minimum(no.low, yes.low), xp.maximum(no.high, yes.high)
    # Where the choice is certain, the bounds are those of the chosen case.
    return Interval(
        xp.where(which.low, yes.low, xp.where(which.high, low, no.low)),
        xp.where(which.low, yes.high, xp.where(which.high, high, no.high)),
    )


def _lookup(xp: ModuleType, operation: Operation, inputs: Sequence[Interval | None]) -> Interval | None:
    """Whether all or any entries of a boolean table are true in the box of the indices, from its summed-area table.

    Where an index may be outside the table, nothing is known.
    """
    table, *indices = inputs
    boxes = [index for index in indices if index is not None]
    if table is None or len(boxes) < len(indices) or operation.outputs[0].dtype != BOOL:
        return None
    sums = table.low.reshape(table.low.shape[-len(boxes) :]).astype(np.int32)
    shape = sums.shape
    for axis in range(sums.ndim):
        sums = xp.cumsum(xp.pad(sums, [(int(axis == other), 0) for other in range(sums.ndim)]), axis=axis)
    inside: Numbers = np.True_
    for box, size in zip(boxes, shape, strict=True):
        inside = inside & (box.low >= 0) & (box.high < size)
    lows, ends = (
        [xp.clip(xp.asarray(bound), 0, size - 1) + more for bound, size in zip(bounds, shape, strict=True)]
        for more, bounds in ((0, [box.low for box in boxes]), (1, [box.high for box in boxes]))
    )
    count, area = 0, 1
    for corner in range(2 ** len(boxes)):
        upper = [bool(corner >> axis & 1) for axis in range(len(boxes))]
        index = [end if is_upper else low for low, end, is_upper in zip(lows, ends, upper, strict=True)]
        count = count + (-1) ** (len(boxes) - sum(upper)) * sums[tuple(xp.broadcast_arrays(*index))]
    for low, end in zip(lows, ends, strict=True):
        area = area * (end - low)
    return Interval(inside & (count == area), ~inside | (count > 0))


def _different(a: Interval, b: Interval) -> Interval:
    always = (a.high < b.low) | (b.high < a.low)
    return Interval(always, ~((a.low == a.high) & (b.low == b.high) & (a.low == b.low)))


def _less(a: Interval, b: Interval) -> Interval:
    """A < b. The second comparison is written so that it is true for NaN, here and below."""
    return Interval(a.high < b.low, ~(a.low >= b.high))


def _less_or_equal(a: Interval, b: Interval) -> Interval:
    return Interval(a.high <= b.low, ~(a.low > b.high))


def _not(a: Interval) -> Interval:
    return Interval(~a.high, ~a.low)


_LOGIC: dict[str, Callable[..., Interval]] = {
    "and": lambda a, b: Interval(a.low & b.low, a.high & b.high),
    "or": lambda a, b: Interval(a.low | b.low, a.high | b.high),
    "xor": _different,
    "not": _not,
}
"""Rules for booleans."""

_RULES: dict[str, Callable[..., Interval | None]] = {
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "neg": _negate,
    "abs": _absolute,
    "sign": lambda xp, _, a: Interval(xp.sign(a.low), xp.sign(a.high)),
    "min": lambda xp, _, a, b: Interval(xp.minimum(a.low, b.low), xp.minimum(a.high, b.high)),
    "max": lambda xp, _, a, b: Interval(xp.maximum(a.low, b.low), xp.maximum(a.high, b.high)),
    "div": _divide,
    "rem": _remainder,
    "convert_element_type": _convert,
    "lt": lambda xp, _, a, b: _less(a, b),
    "le": lambda xp, _, a, b: _less_or_equal(a, b),
    "gt": lambda xp, _, a, b: _less(b, a),
    "ge": lambda xp, _, a, b: _less_or_equal(b, a),
    "eq": lambda xp, _, a, b: _not(_different(a, b)),
    "ne": lambda xp, _, a, b: _different(a, b),
}

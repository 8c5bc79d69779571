"""The filters that chat templates may use, charged to the budget of the rendering. They need Jinja."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized

from jinja2 import Environment, pass_environment
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.filters import make_attrgetter

from .budget import BUDGET, Budget, BudgetExceeded

FILTER_STEPS = 5
"""Steps of a filter or test, beside those for its arguments and result."""

_SHALLOW = "attr count d default first items last length list map reject rejectattr reverse select selectattr"
"""Filters that look at items but not into them."""
_DEEP = (
    "abs capitalize dictsort e escape float forceescape groupby int lower max min safe sort string title trim truncate "
    "unique upper urlencode"
)
"""Filters that read all of their arguments."""


def length_of(value: object) -> int:
    """The length of a value, 0 if it has none."""
    return len(value) if isinstance(value, Sized) else 0


def allow_replace(budget: Budget, text: str, old: str, new: str) -> None:
    """Charges `text.replace(old, new)`."""
    budget.search(text, old)
    budget.allow(len(text) + text.count(old) * max(0, len(new) - len(old)))


def metered(function: Callable[..., object], *, deep: bool) -> Callable[..., object]:
    """A filter or test that is charged for its arguments and its result; a generator becomes a list."""

    @functools.wraps(function)
    def charged(*args: object, **kwargs: object) -> object:
        budget = BUDGET.get()
        budget.take(FILTER_STEPS)
        if deep:
            budget.read(*args, *kwargs.values())
        else:
            budget.take(1 + sum(len(arg) for arg in args if isinstance(arg, str | list | tuple | dict | range)))
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return budget.items(result)
        return budget.made(result)

    return charged


def _read[T](value: T) -> T:
    BUDGET.get().read(value)
    return value


def _made[T](value: T) -> T:
    return BUDGET.get().made(value)


def _each[T](values: Iterable[T]) -> Iterator[T]:
    budget = BUDGET.get()
    for value in values:
        budget.take()
        yield value


def _concat(values: list[object]) -> str:
    budget = BUDGET.get()
    budget.allow(budget.read(*values))
    return "".join(map(str, values))


def _center(value: str, width: int = 80) -> str:
    BUDGET.get().allow(len(value) + max(0, width))
    return JINJA_FILTERS["center"](value, width)


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    budget = BUDGET.get()
    budget.take(len(value))
    size = len(width) if isinstance(width, str) else max(0, width)
    budget.allow(len(value) + (len(value.splitlines()) + 2) * (size + 1))
    return JINJA_FILTERS["indent"](value, width, first, blank)


@pass_environment
def _join(environment: Environment, value: Iterable[object], d: str = "", attribute: str | int | None = None) -> str:
    budget = BUDGET.get()
    items = budget.items(value)
    if attribute is not None:
        items = [*map(make_attrgetter(environment, attribute), items)]
    budget.allow(budget.read(*items) + len(items) * len(str(d)))
    return str(d).join(map(str, items))


def _replace(value: object, old: str, new: str, count: int | None = None) -> str:
    budget = BUDGET.get()
    budget.read(value)
    text = str(value)
    allow_replace(budget, text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _format(value: object, *args: object, **kwargs: object) -> str:
    budget = BUDGET.get()
    budget.read(value)
    budget.percent(str(value), args or kwargs)
    return JINJA_FILTERS["format"](value, *args, **kwargs)


def _in_parts(name: str) -> Callable[..., list[object]]:
    """The filters batch and slice."""

    def parts(value: Iterable[object], count: int, fill_with: object = None) -> list[object]:
        budget = BUDGET.get()
        items = budget.items(value)
        budget.take(max(0, count))
        return budget.items(JINJA_FILTERS[name](items, count, fill_with))

    return parts


def _round(value: float, precision: int = 0, method: object = "common") -> float:
    if abs(precision) > 100:
        raise BudgetExceeded(f"the precision of round is at most 100, got {precision}")
    BUDGET.get().read(value)
    return JINJA_FILTERS["round"](value, precision, method)


@pass_environment
def _sum(
    environment: Environment, values: Iterable[object], attribute: str | int | None = None, start: object = 0
) -> float:
    items = [start, *BUDGET.get().items(values)]
    if attribute is not None:
        items[1:] = map(make_attrgetter(environment, attribute), items[1:])
    BUDGET.get().read(*items)
    numbers = [item for item in items if isinstance(item, int | float)]
    if len(numbers) < len(items):
        raise BudgetExceeded("the filter sum adds up numbers, and this is something else")
    return sum(numbers)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    budget = BUDGET.get()
    before = budget.steps
    size = budget.read(value)
    width = indent if isinstance(indent, int) else length_of(indent)
    if width > 100 or budget.read(separators) > 100:
        raise BudgetExceeded("indent and separators of tojson have at most 100 characters")
    depth = 1 + (_depth(value) if indent is not None else 0)
    budget.allow(2 * size + (before - budget.steps) * (8 + width * depth))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _depth(value: object) -> int:
    """How many containers are within each other, at most."""
    depth, level = 0, [value]
    while level := [
        inner
        for item in level
        if isinstance(item, Mapping | list | tuple)
        for inner in (item.values() if isinstance(item, Mapping) else item)
    ]:
        depth += 1
    return depth


FILTERS: dict[str, Callable[..., object]] = {
    **{"center": _center, "indent": _indent, "join": _join, "replace": _replace, "format": _format, "round": _round},
    **{"batch": _in_parts("batch"), "slice": _in_parts("slice"), "sum": _sum, "tojson": _to_json},
    **{"_read": _read, "_made": _made, "_each": _each, "_concat": _concat},
    **{name: metered(JINJA_FILTERS[name], deep=False) for name in _SHALLOW.split()},
    **{name: metered(JINJA_FILTERS[name], deep=True) for name in _DEEP.split()},
}
"""All filters; Jinja's others (wordwrap, urlize, ...) take more than linear time."""

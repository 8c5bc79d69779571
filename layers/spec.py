"""Specs: frozen values that describe a model or a run, compose, compare, and travel as JSON."""

import abc
import contextlib
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a misspelled name: what it is, "did you mean", and what exists."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return ValueError(f"unknown {what} {name!r}{hint} Known: {', '.join(known)}")


def missing_package(what: str, package: str) -> ValueError:
    """The error for an extra that is not installed, with the command that installs it where this Python looks."""
    return ValueError(
        f"{what} the package {package}, which is not installed: {sys.executable} -m pip install {package}"
    )


@dataclass(frozen=True)
class Range:
    """The finite numbers that a field accepts, from `low` to `high`.

    Attributes:
        low: smallest value.
        high: largest value; infinity stands for any finite number.
        above: `low` itself is excluded.
        below: `high` itself is excluded.
    """

    low: int | float
    high: int | float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: int | float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and over and under  # comparisons with NaN are false

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


POSITIVE = Range(1)
"""Counts that cannot be zero."""
NON_NEGATIVE = Range(0)
"""Counts and weights; zero often switches something off."""
DECAY = Range(0, 1, below=True)
"""Decays of moving averages."""
FRACTION = Range(0, 1)
"""Shares of something."""
SEED = Range(0, 2**64, below=True)
"""Seeds of random keys (`random_key`)."""


def ranged(default: int | float | None, accepted: Range) -> Any:
    """A dataclass field and the numbers it accepts, for `check_ranges`. None is accepted if it is the default."""
    return dataclasses.field(default=default, metadata={"range": accepted})


@dataclass(frozen=True, kw_only=True)
class Spec(abc.ABC):
    """A frozen description made of numbers, strings, tuples and other specs.

    Subclasses are frozen, keyword-only dataclasses. Class names are unique: they are the `kind` in JSON.
    """

    _kinds: ClassVar[dict[str, type["Spec"]]] = {}

    def __init_subclass__(cls) -> None:
        known = Spec._kinds.setdefault(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise TypeError(f"two specs are named {cls.__name__}: {known.__module__} and {cls.__module__}")
        Spec._kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Raises ValueError where a field that has a few names for values has another."""
        for name, wanted in typing.get_type_hints(type(self)).items():
            if typing.get_origin(wanted) is typing.Literal:
                _typed(getattr(self, name), wanted, f"{type(self).__name__}.{name}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; a dotted name (`"model.dim"`, as a dict key) reaches inside."""
        names = {field.name for field in dataclasses.fields(self)}
        direct: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        for path, value in changes.items():
            name, _, rest = path.partition(".")
            if name not in names:
                raise unknown(f"field of {type(self).__name__}", name, names)
            if rest:
                nested.setdefault(name, {})[rest] = value
            else:
                direct[name] = value
        for name, inner in nested.items():
            direct[name] = _replace_inside(direct.get(name, getattr(self, name)), inner)
        return dataclasses.replace(self, **direct)

    def flat(self) -> dict[str, Any]:
        """Every leaf by its dotted name, e.g. `{"block.0.mixer.heads": 8}`; nested specs add their `kind`."""
        return dict(_flatten("", self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: `{"kind": class name, field: value, ...}`."""
        return {"kind": type(self).__name__} | {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises ValueError on an unknown kind, field or wrong type of value."""
        kind = data.get("kind", "")
        if kind not in Spec._kinds:
            raise unknown("kind of spec", str(kind), Spec._kinds)
        found = Spec._kinds[kind]
        if not issubclass(found, cls):
            raise ValueError(f"expected a {cls.__name__}, got a {kind}")
        types_of = typing.get_type_hints(found)
        names = {field.name for field in dataclasses.fields(found)}
        for name in data.keys() - names - {"kind"}:
            raise unknown(f"field of {kind}", name, names)
        return found(**{name: _typed(data[name], types_of[name], f"{kind}.{name}") for name in names & data.keys()})


def check_ranges(spec: Spec, prefix: str = "") -> None:
    """Raises ValueError, naming the field, unless every field made by `ranged` holds a number inside its range.

    Args:
        spec: the value to check.
        prefix: what precedes the field in the message, e.g. "balance.".
    """
    for field in dataclasses.fields(spec):
        accepted = field.metadata.get("range")
        if accepted is None:
            continue
        value = getattr(spec, field.name)
        if value is None and field.default is None:
            continue
        whole = isinstance(field.default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            noun = "a whole number" if whole else "a number"
            raise ValueError(f"{prefix}{field.name} must be {noun}, got {value!r}")
        if value not in accepted:
            raise ValueError(f"{prefix}{field.name} must be {accepted}, got {value}")


def _replace_inside(value: Any, changes: dict[str, Any]) -> Any:
    if isinstance(value, Spec):
        return value.replace(**changes)
    if isinstance(value, tuple):
        items = list(value)
        for path, new in changes.items():
            index, _, rest = path.partition(".")
            if not index.isdecimal() or int(index) >= len(items):
                raise ValueError(f"expected an index below {len(items)}, got {index!r}")
            items[int(index)] = _replace_inside(items[int(index)], {rest: new}) if rest else new
        return tuple(items)
    raise ValueError(f"{value!r} has no fields to change, got {', '.join(changes)}")


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a spec holds numbers, strings, tuples and specs, got {value!r}")


def _flatten(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        yield prefix, tuple(value) if isinstance(value, list) else value
        return
    for name, inner in items:
        yield from _flatten(f"{prefix}.{name}" if prefix else str(name), inner)


def _typed(value: Any, wanted: Any, where: str) -> Any:
    """`value` from JSON as the annotated type `wanted`, or a ValueError that names the field."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        # None is for None alone: what is wrong inside "Norm | None" is told of the norm.
        options = [option for option in arguments if (option is type(None)) == (value is None)] or [*arguments]
        for option in options[:-1]:
            with contextlib.suppress(ValueError):
                return _typed(value, option, where)
        return _typed(value, options[-1], where)
    if origin is typing.Literal:
        if value not in arguments:
            raise unknown(where, str(value), map(str, arguments))
        return value
    if origin is tuple and isinstance(value, list):
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(inner) == len(value):
            return tuple(_typed(v, t, f"{where}.{i}") for i, (v, t) in enumerate(zip(value, inner, strict=True)))
    elif isinstance(wanted, type) and issubclass(wanted, Spec) and isinstance(value, Mapping):
        return wanted.from_dict(value)
    elif wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif wanted is type(None) and value is None:
        return None
    elif isinstance(wanted, type) and type(value) is wanted:
        return value
    raise ValueError(f"{where} must be {getattr(wanted, '__name__', wanted)}, got {value!r}")

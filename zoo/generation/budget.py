"""Bounds on what an untrusted chat template may compute: steps, and characters of text.

Every operation of a template passes through a `Budget` before it runs (zoo/generation/template.py). Its time is at most
proportional to the steps it takes, and its result at most as large as the characters it asks for. So the time and the
memory of a rendering are bounded whatever the template is, in any thread.
"""

import contextvars
import re
from collections.abc import Iterable, Mapping

MOST_STEPS = 2_000_000
"""Steps of a rendering: operations, items that loops and functions visit, and every 50th character they read."""
MOST_TEXT = 10_000_000
"""Characters of one text."""
MOST_TEXT_IN_ALL = 100_000_000
"""Characters of all texts that a rendering makes."""
MOST_BITS = 4096
"""Size of an integer."""
CHARACTERS_PER_STEP = 50

_VIEWS = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_DIGITS = re.compile(r"\d+")


class BudgetExceeded(Exception):
    """A template needs more than a budget allows."""


class Budget:
    """What is left of the steps and characters of one rendering. All methods raise `BudgetExceeded`."""

    def __init__(self) -> None:
        self.steps, self.characters = MOST_STEPS, MOST_TEXT_IN_ALL

    def take(self, steps: int = 1) -> None:
        """Takes steps."""
        self.steps -= steps
        if self.steps < 0:
            raise BudgetExceeded(f"it takes more than {MOST_STEPS:,} steps")

    def allow(self, characters: int) -> None:
        """Takes the characters of a text, or elements of a list, that is about to be made."""
        if characters > MOST_TEXT:
            raise BudgetExceeded(f"a text of {characters:,} characters is too large: the most are {MOST_TEXT:,}")
        self.characters -= characters
        self.take(1 + characters // CHARACTERS_PER_STEP)
        if self.characters < 0:
            raise BudgetExceeded(f"its texts together are too large: the most are {MOST_TEXT_IN_ALL:,} characters")

    def read(self, *values: object) -> int:
        """Takes the steps to visit all of some values, with everything they contain, and returns their characters.

        What is contained several times counts several times, as it does in text and in comparisons.
        """
        stack, characters = list(values), 0
        self.take(len(stack))
        while stack:
            value = stack.pop()
            if isinstance(value, str | bytes):
                characters += len(value)
                self.take(len(value) // CHARACTERS_PER_STEP)
            elif isinstance(value, int):
                characters += self._check_integer(value).bit_length() // 3 + 1
            elif isinstance(value, Mapping):
                self.take(2 * len(value))
                stack += [*value.keys(), *value.values()]
            elif isinstance(value, _VIEWS):
                self.take(len(value))
                stack += value
            elif type(value).__name__ == "Namespace":
                stack.append(object.__getattribute__(value, "_Namespace__attrs"))
                self.take()
            else:
                characters += 32
            if characters > MOST_TEXT:
                raise BudgetExceeded(f"a value is too large: the most are {MOST_TEXT:,} characters")
        return characters

    def made[T](self, value: T) -> T:
        """Takes the size of a result: its characters or elements, without what the elements contain."""
        if isinstance(value, (str, bytes, Mapping, *_VIEWS)):
            self.allow(len(value))
        elif isinstance(value, int):
            self._check_integer(value)
        return value

    def items[T](self, values: Iterable[T]) -> list[T]:
        """A list of the items of an iterable, with a step for each."""
        items = []
        for item in values:
            self.take()
            items.append(item)
        return items

    def search(self, text: str, part: object) -> None:
        """Takes the steps to look for a part in a text, at worst everywhere."""
        self.take(1 + len(text) * (len(part) if isinstance(part, str) else 1) // 1000)

    def operator(self, operator: str, left: object, right: object) -> None:
        """Takes what an operator of arithmetic or on sequences costs."""
        self.take()
        if operator == "%" and isinstance(left, str | bytes):
            self.percent(str(left), right)
        elif operator == "*" and isinstance(left, str | list | tuple) and isinstance(right, int):
            self.allow(len(left) * max(0, right))
        elif operator == "*" and isinstance(right, str | list | tuple) and isinstance(left, int):
            self.allow(len(right) * max(0, left))
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self.allow(len(left) + len(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = [abs(self._check_integer(value)).bit_length() for value in (left, right)]
            size = bits[0] * abs(right) if operator == "**" else sum(bits)
            if size > 2 * MOST_BITS:
                raise BudgetExceeded(f"{operator} of two integers is too large: the most are {MOST_BITS} bits")

    def percent(self, form: str, values: object) -> None:
        """Takes what `form % values` costs: each conversion may show all values, in a field of any width in it."""
        size = self.read(values)
        stars = values if isinstance(values, tuple) and "*" in form else ()
        widths = [abs(value) for value in stars if isinstance(value, int)]
        self.allow(len(form) + form.count("%") * (size + max([*widths, *_numbers(form)], default=0)))

    def format(self, form: str, values: object) -> None:
        """Takes what `form.format(...)` costs: each field may show all values, in any width in the form."""
        if re.search(r"\{[^{}]*[:!][^{}]*\{", form):
            raise BudgetExceeded("format fields within format fields are not allowed")
        self.allow(len(form) + form.count("{") * (self.read(values) + max(_numbers(form), default=0)))

    def _check_integer(self, value: int) -> int:
        if value.bit_length() > 2 * MOST_BITS:
            raise BudgetExceeded(f"an integer is too large: the most are {MOST_BITS} bits")
        return value


def _numbers(text: str) -> list[int]:
    return [int(digits[-10:]) if len(digits) < 10 else 10**10 for digits in _DIGITS.findall(text)]


BUDGET: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget of the rendering in this thread")
"""The budget of the template that is being rendered."""

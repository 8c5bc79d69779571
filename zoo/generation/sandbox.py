"""The Jinja sandbox of chat templates: every operation is charged to the budget of the rendering.

Output, comparisons, concatenation, loops, slices and keys of dicts pass filters that `Metering` puts around them in the
syntax tree. Operators, calls, filters and tests pass methods that Jinja has for sandboxes. Nothing is computed while a
template is compiled. This module needs Jinja (the `chat` extra); `ChatTemplate` imports it.
"""

import datetime
import functools
from collections.abc import Callable, Mapping
from types import BuiltinMethodType
from typing import NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .budget import BUDGET, Budget, BudgetExceeded
from .template_filters import FILTERS, allow_replace, length_of, metered

CALL_STEPS = 20
"""Steps of a call (of a macro, for instance), beside those for its arguments and result."""

_STRING_METHODS = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset(_STRING_METHODS.split())),
    (list, frozenset({"count", "index", "copy"})),
    (tuple, frozenset({"count", "index"})),
    (dict, frozenset({"get", "items", "keys", "values", "copy"})),
    (float, frozenset({"is_integer"})),
)
"""Methods that take time in proportion to the value and its arguments, and return nothing larger."""


def _allow_padding(budget: Budget, text: str, *arguments: object) -> None:
    budget.allow(len(text) + max((width for width in arguments if isinstance(width, int)), default=0))


def _allow_tabs(budget: Budget, text: str, *arguments: object) -> None:
    budget.allow(len(text) + text.count("\t") * max([8, *(width for width in arguments if isinstance(width, int))]))


def _allow_join(budget: Budget, text: str, *arguments: object) -> None:
    budget.allow(budget.read(*arguments) + len(text) * sum(map(length_of, arguments)))


def _allow_replacement(budget: Budget, text: str, *arguments: object) -> None:
    if len(arguments) < 2 or not isinstance(arguments[0], str) or not isinstance(arguments[1], str):
        raise TypeError("replace takes two strings")
    allow_replace(budget, text, arguments[0], arguments[1])


_GROWING_METHODS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _allow_padding),
    "expandtabs": _allow_tabs,
    "replace": _allow_replacement,
    "join": _allow_join,
}
"""String methods that may return a larger text, with functions that charge its size."""


def _charge_method(budget: Budget, method: BuiltinMethodType, args: tuple[object, ...], kwargs: Mapping) -> None:
    """Charges the call of a method of a value. Raises BudgetExceeded if templates may not call it."""
    owner, name = method.__self__, method.__name__
    budget.read(*args, *kwargs.values())
    if isinstance(owner, str) and name in _GROWING_METHODS:
        _GROWING_METHODS[name](budget, owner, *args, *kwargs.values())
        return
    if not any(isinstance(owner, kind) and name in names for kind, names in _METHODS):
        raise BudgetExceeded(f"it calls the method {name} of {type(owner).__name__}, which templates may not call")
    if isinstance(owner, str):
        budget.take(len(owner) // 2 if name in ("split", "rsplit", "splitlines") and not args[:1] else 0)
        for arg in args:
            budget.search(owner, arg)
        if name in ("split", "rsplit") and args and isinstance(args[0], str) and args[0]:
            budget.take(owner.count(args[0]))
    elif not isinstance(owner, dict):
        budget.read(owner)


class Metering(NodeTransformer):
    """Puts filters around the expressions for which Jinja compiles plain Python."""

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        """Text of the template goes to `finalize` too, as a constant: a loop may repeat it."""
        node.nodes = [
            nodes.Const(part.data, lineno=part.lineno) if isinstance(part, nodes.TemplateData) else part
            for part in node.nodes
        ]
        self.generic_visit(node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Comparisons read both sides."""
        self.generic_visit(node)
        node.expr = _through("_read", node.expr)
        for operand in node.ops:
            operand.expr = _through("_read", operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        """`a ~ b` makes a text."""
        self.generic_visit(node)
        return _through("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_For(self, node: nodes.For) -> nodes.For:
        """A loop takes a step for each item."""
        self.generic_visit(node)
        node.iter = _through("_each", node.iter)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        """A slice makes a list or text."""
        self.generic_visit(node)
        return _through("_made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        """A key of a dict is hashed."""
        self.generic_visit(node)
        node.key = _through("_read", node.key)
        return node


def _through(name: str, node: nodes.Node) -> nodes.Filter:
    """The node with a filter around it."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """What templates on the hub expect of Jinja, as in transformers, with every operation metered."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def _generate(self, source: nodes.Template, *args, **kwargs) -> str:
        source = Metering().visit(source)
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Charges an operator before it runs."""
        BUDGET.get().operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: object, argument: object) -> object:
        """Charges a key, which is hashed."""
        BUDGET.get().read(argument)
        return super().getitem(obj, argument)  # pyright: ignore[reportArgumentType]  # any key may be tried

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        """`str.format` and `str.format_map`, which charge their result."""
        form = super().wrap_str_format(value)
        if form is None:
            return None

        def bounded(*args: object, **kwargs: object) -> str:
            BUDGET.get().format(str(getattr(value, "__self__", "")), [*args, kwargs])
            return form(*args, **kwargs)

        return bounded

    def call(__self, __context: Context, __obj: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Charges a call, and its result."""
        budget = BUDGET.get()
        budget.take(CALL_STEPS)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int | float | list | tuple | dict | set | frozenset | type):
            _charge_method(budget, __obj, args, kwargs)  # pyright: ignore[reportArgumentType]  # has __self__
        elif isinstance(owner, LoopContext):
            budget.read(*args)  # loop.changed compares them
        elif isinstance(__obj, type) and __obj not in __self.globals.values():
            raise BudgetExceeded(f"it calls {__obj.__name__}, which templates may not call")
        return budget.made(super().call(__context, __obj, *args, **kwargs))


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's words, for training (SmolLM3)."""

    tags = {"generation"}  # noqa: RUF012  # declared so by Jinja

    def parse(self, parser: Parser) -> nodes.Scope:
        """A scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@functools.cache
def sandbox() -> Sandbox:
    """The environment in which templates are compiled and rendered."""
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=["jinja2.ext.loopcontrols", Generation],
        finalize=pass_context(_output),
    )
    environment.filters = FILTERS
    environment.tests = {name: metered(test, deep=True) for name, test in environment.tests.items()}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(message)  # pyright: ignore[reportArgumentType]  # templates may pass anything


def _strftime_now(form: str) -> str:
    if len(form) > 1000:
        raise BudgetExceeded(f"the format of strftime_now has at most 1000 characters, got {len(form):,}")
    return datetime.datetime.now().strftime(form)


def _output[T](context: Context, value: T) -> T:
    """Charges the characters of what a template writes. Jinja calls it for each piece of output."""
    budget = BUDGET.get()
    budget.allow(len(value) if isinstance(value, str) else budget.read(value))
    return value

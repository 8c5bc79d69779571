"""Chat templates: Jinja in a sandbox with bounded time and memory."""

import contextvars
import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...layers.spec import missing_package
from .budget import Budget, BudgetExceeded

Message = Mapping[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": text}`, with any other fields that a template reads."""

MOST_SOURCE = 500_000
"""Characters of a template."""

CALL_STEPS, FILTER_STEPS = 20, 5
"""Steps of a call (of a macro, for instance) and of a filter or test, beside those for their arguments and results."""

_BUDGET: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget of the rendering in this thread")


class ChatTemplate:
    """A Jinja template that turns messages into a prompt, as in a Hugging Face `tokenizer_config.json`.

    It comes with the weights and is not trusted. It runs in Jinja's immutable sandbox, without files or network, and
    with bounded time and memory (zoo/generation/budget.py).

    Args:
        template: the Jinja source.
        special_tokens: their texts by the names templates use, e.g. `{"bos_token": "<s>", "eos_token": "</s>"}`.

    Raises:
        ValueError: the template is not valid Jinja, or Jinja (the `chat` extra) is not installed.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str] | None = None):
        jinja2 = _jinja()
        self.source, self.special_tokens = template, dict(special_tokens or {})
        if len(template) > MOST_SOURCE:
            raise ValueError(f"a chat template has at most {MOST_SOURCE:,} characters, got {len(template):,}")
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid, in line {error.lineno}: {error.message}") from error
        except (RecursionError, SyntaxError, MemoryError) as error:  # from Python, which Jinja compiles to
            raise ValueError(f"the chat template is nested too deeply: {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"the chat template is not valid: {error}") from error

    def render(self, messages: Sequence[Message], *, prompt: bool = True, **variables: Any) -> str:
        """The text of messages. With `prompt` it ends where the reply begins. `variables` are passed to the template.

        Raises:
            ValueError: the template refuses the messages, fails, or needs more time or memory than it may use.
        """
        jinja2 = _jinja()
        if not messages:
            raise ValueError("a conversation needs at least one message, got none")
        for message in messages:
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError(f"a message has a role and content, got {message}")
        names = self.special_tokens | {"messages": list(messages), "add_generation_prompt": prompt} | variables
        token = _BUDGET.set(Budget())
        try:
            return self._template.render(names)
        except BudgetExceeded as error:
            raise ValueError(f"the chat template was stopped: {error}") from error
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
            MemoryError,
        ) as error:
            raise ValueError(f"the chat template failed: {error}") from error
        finally:
            _BUDGET.reset(token)


def _jinja() -> Any:
    """Jinja, which only chat templates need."""
    try:
        import jinja2.ext  # pyright: ignore[reportMissingImports]
        import jinja2.sandbox  # pyright: ignore[reportMissingImports]
        import jinja2.visitor  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise missing_package("chat templates need", "jinja2") from error
    return jinja2


_STRING_METHODS = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper"
)
# Methods that take time in proportion to the value and its arguments, and return nothing larger.
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset(_STRING_METHODS.split())),
    (list, frozenset({"count", "index", "copy"})),
    (tuple, frozenset({"count", "index"})),
    (dict, frozenset({"get", "items", "keys", "values", "copy"})),
    (float, frozenset({"is_integer"})),
)
# Methods that may return a larger text: they take its size, from the text and the arguments.
_WIDE: dict[str, Callable[[Budget, str, tuple[Any, ...]], Any]] = {
    name: lambda budget, text, args: budget.allow(len(text) + max((a for a in args if isinstance(a, int)), default=0))
    for name in ("center", "ljust", "rjust", "zfill")
} | {
    "expandtabs": lambda budget, text, args: budget.allow(
        len(text) + text.count("\t") * max([8, *(a for a in args if isinstance(a, int))])
    ),
    "replace": lambda budget, text, args: _allow_replace(budget, text, *args[:2]),
    "join": lambda budget, text, args: budget.allow(budget.read(*args) + len(text) * _length(*args)),
}


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _allow_replace(budget: Budget, text: str, old: str, new: str) -> None:
    budget.search(text, old)
    budget.allow(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _check_method(budget: Budget, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Takes what a call of a method of a value costs. Raises if templates may not call it."""
    owner, name = method.__self__, method.__name__
    budget.read(*args, *kwargs.values())
    if isinstance(owner, str) and name in _WIDE:
        _WIDE[name](budget, owner, (*args, *kwargs.values()))
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


@functools.cache
def _environment() -> Any:
    """What templates on the hub expect of Jinja, as in transformers, with every operation metered.

    Output, comparisons, concatenation, loops, slices and keys of dicts pass filters that `_Metering` puts around them.
    Operators, calls, filters and tests pass methods that Jinja has for sandboxes. Nothing is computed while compiling.
    """
    jinja2 = _jinja()
    filters = _filters(jinja2)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

        def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
            source = _metering(jinja2).visit(source)
            source.set_environment(self)
            return super()._generate(source, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _BUDGET.get().operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def getitem(self, obj: Any, argument: Any) -> Any:
            _BUDGET.get().read(argument)  # a key is hashed
            return super().getitem(obj, argument)

        def wrap_str_format(self, value: Any) -> Any:
            form = super().wrap_str_format(value)
            if form is None:
                return None

            def bounded(*args: Any, **kwargs: Any) -> str:
                _BUDGET.get().format(value.__self__, [*args, kwargs])
                return form(*args, **kwargs)

            return bounded

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            budget = _BUDGET.get()
            budget.take(CALL_STEPS)
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str | bytes | int | float | list | tuple | dict | set | frozenset | type):
                _check_method(budget, __obj, args, kwargs)
            elif isinstance(owner, jinja2.runtime.LoopContext):
                budget.read(*args)  # loop.changed compares them
            elif isinstance(__obj, type) and __obj not in __self.globals.values():
                raise BudgetExceeded(f"it calls {__obj.__name__}, which templates may not call")
            return budget.made(super().call(__context, __obj, *args, **kwargs))

    sandbox = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=["jinja2.ext.loopcontrols", _generation(jinja2)],
        finalize=jinja2.pass_context(_output),
    )
    sandbox.filters = filters
    sandbox.tests = {name: _metered(test, deep=True) for name, test in sandbox.tests.items()}
    del sandbox.globals["lipsum"]
    sandbox.globals["raise_exception"] = functools.partial(_fail, jinja2.TemplateError)
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _fail(kind: type[Exception], message: str) -> None:
    raise kind(message)


def _strftime_now(form: str) -> str:
    if len(form) > 1000:
        raise BudgetExceeded(f"the format of strftime_now has at most 1000 characters, got {len(form):,}")
    return datetime.datetime.now().strftime(form)


def _generation(jinja2: Any) -> Any:
    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks the model's words, for training (SmolLM3)."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    return Generation


def _metering(jinja2: Any) -> Any:
    """A visitor that puts filters around the expressions for which Jinja compiles plain Python."""
    nodes = jinja2.nodes

    def through(name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Metering(jinja2.visitor.NodeTransformer):
        def visit_Output(self, node: Any) -> Any:
            # Text of the template goes to `finalize` too, as a constant: a loop may repeat it.
            parts = [
                nodes.Const(p.data, lineno=p.lineno) if isinstance(p, nodes.TemplateData) else p for p in node.nodes
            ]
            node.nodes = parts
            return self.generic_visit(node)

        def visit_Compare(self, node: Any) -> Any:
            self.generic_visit(node)
            node.expr = through("_read", node.expr)
            for operand in node.ops:
                operand.expr = through("_read", operand.expr)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return through("_concat", nodes.List(node.nodes, lineno=node.lineno))

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = through("_each", node.iter)
            return node

        def visit_Getitem(self, node: Any) -> Any:
            self.generic_visit(node)
            return through("_made", node) if isinstance(node.arg, nodes.Slice) else node

        def visit_Pair(self, node: Any) -> Any:
            self.generic_visit(node)
            node.key = through("_read", node.key)
            return node

    return Metering()


def _output(context: Any, value: Any) -> Any:
    """Takes the characters of what a template writes. Jinja calls it for each piece of output."""
    budget = _BUDGET.get()
    budget.allow(len(value) if isinstance(value, str) else budget.read(value))
    return value


def _read(value: Any) -> Any:
    _BUDGET.get().read(value)
    return value


def _made(value: Any) -> Any:
    return _BUDGET.get().made(value)


def _each(values: Any) -> Iterator[Any]:
    budget = _BUDGET.get()
    for value in values:
        budget.take()
        yield value


def _concat(values: list[Any]) -> str:
    budget = _BUDGET.get()
    budget.allow(budget.read(*values))
    return "".join(map(str, values))


# Filters that look at items but not into them, and filters that read all of their arguments.
_SHALLOW = "attr count d default first items last length list map reject rejectattr reverse select selectattr"
_DEEP = (
    "abs capitalize dictsort e escape float forceescape groupby int lower max min safe sort string title trim truncate "
    "unique upper urlencode"
)


def _metered(function: Callable[..., Any], *, deep: bool) -> Callable[..., Any]:
    """A filter or test that takes steps for its arguments and for its result; a generator becomes a list."""

    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.take(FILTER_STEPS)
        if deep:
            budget.read(*args, *kwargs.values())
        else:
            budget.take(1 + sum(len(arg) for arg in args if isinstance(arg, str | list | tuple | dict | range)))
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return budget.items(result)
        return budget.made(result)

    return metered


def _filters(jinja2: Any) -> dict[str, Callable[..., Any]]:
    """The filters that chat templates may use. Jinja's others (wordwrap, urlize, ...) take more than linear time."""
    known = jinja2.filters.FILTERS

    def center(value: str, width: int = 80) -> str:
        _BUDGET.get().allow(len(value) + max(0, width))
        return known["center"](value, width)

    def indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        budget = _BUDGET.get()
        budget.take(len(value))
        size = len(width) if isinstance(width, str) else max(0, width)
        budget.allow(len(value) + (len(value.splitlines()) + 2) * (size + 1))
        return known["indent"](value, width, first, blank)

    @jinja2.pass_environment
    def join(environment: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        budget = _BUDGET.get()
        items = budget.items(value)
        if attribute is not None:
            items = [*map(jinja2.filters.make_attrgetter(environment, attribute), items)]
        budget.allow(budget.read(*items) + len(items) * len(str(d)))
        return str(d).join(map(str, items))

    def replace(value: Any, old: str, new: str, count: int | None = None) -> str:
        budget = _BUDGET.get()
        budget.read(value)
        text = str(value)
        _allow_replace(budget, text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def format_(value: Any, *args: Any, **kwargs: Any) -> str:
        budget = _BUDGET.get()
        budget.read(value)
        budget.percent(str(value), args or kwargs)
        return known["format"](value, *args, **kwargs)

    def in_parts(name: str) -> Callable[..., Any]:
        def parts(value: Any, count: int, fill_with: Any = None) -> list[Any]:
            budget = _BUDGET.get()
            items = budget.items(value)
            budget.take(max(0, count))
            return budget.items(known[name](items, count, fill_with))

        return parts

    def round_(value: float, precision: int = 0, method: Any = "common") -> float:
        if abs(precision) > 100:
            raise BudgetExceeded(f"the precision of round is at most 100, got {precision}")
        _BUDGET.get().read(value)
        return known["round"](value, precision, method)

    @jinja2.pass_environment
    def sum_(environment: Any, values: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
        items = [start, *_BUDGET.get().items(values)]
        if attribute is not None:
            items[1:] = map(jinja2.filters.make_attrgetter(environment, attribute), items[1:])
        _BUDGET.get().read(*items)
        if not all(isinstance(item, int | float) for item in items):
            raise BudgetExceeded("the filter sum adds up numbers, and this is something else")
        return sum(items)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        budget = _BUDGET.get()
        before = budget.steps
        size = budget.read(value)
        width = indent if isinstance(indent, int) else _length(indent)
        if width > 100 or budget.read(separators) > 100:
            raise BudgetExceeded("indent and separators of tojson have at most 100 characters")
        depth = 1 + (_depth(value) if indent is not None else 0)
        budget.allow(2 * size + (before - budget.steps) * (8 + width * depth))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    own = {"center": center, "indent": indent, "join": join, "replace": replace, "format": format_, "round": round_}
    own |= {"batch": in_parts("batch"), "slice": in_parts("slice"), "sum": sum_, "tojson": to_json}
    own |= {"_read": _read, "_made": _made, "_each": _each, "_concat": _concat}
    shallow = {name: _metered(known[name], deep=False) for name in _SHALLOW.split()}
    return own | shallow | {name: _metered(known[name], deep=True) for name in _DEEP.split()}


def _depth(value: Any) -> int:
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

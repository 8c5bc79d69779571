"""Chat templates: Jinja that turns messages into a prompt, in a sandbox with bounded time and memory."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...layers.spec import missing_package
from .budget import BUDGET, Budget, BudgetExceeded

if TYPE_CHECKING:
    from .sandbox import Sandbox

Message = Mapping[str, object]
"""`{"role": "system" | "user" | "assistant", "content": text}`, with any other fields that a template reads."""

MOST_SOURCE = 500_000
"""Characters of a template."""


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
        environment = _sandbox()
        from jinja2 import TemplateSyntaxError

        self.source, self.special_tokens = template, dict(special_tokens or {})
        if len(template) > MOST_SOURCE:
            raise ValueError(f"a chat template has at most {MOST_SOURCE:,} characters, got {len(template):,}")
        try:
            self._template = environment.from_string(template)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid, in line {error.lineno}: {error.message}") from error
        except (RecursionError, SyntaxError, MemoryError) as error:  # from Python, which Jinja compiles to
            raise ValueError(f"the chat template is nested too deeply: {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"the chat template is not valid: {error}") from error

    def render(self, messages: Sequence[Message], *, prompt: bool = True, **variables: object) -> str:
        """The text of messages. With `prompt` it ends where the reply begins. `variables` are passed to the template.

        Raises:
            ValueError: the template refuses the messages, fails, or needs more time or memory than it may use.
        """
        from jinja2 import TemplateError

        if not messages:
            raise ValueError("a conversation needs at least one message, got none")
        for message in messages:
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError(f"a message has a role and content, got {message}")
        names = self.special_tokens | {"messages": list(messages), "add_generation_prompt": prompt} | variables
        token = BUDGET.set(Budget())
        try:
            return self._template.render(names)
        except BudgetExceeded as error:
            raise ValueError(f"the chat template was stopped: {error}") from error
        except (
            TemplateError,
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
            BUDGET.reset(token)


def _sandbox() -> "Sandbox":
    """The sandbox. Raises ValueError if Jinja, which only chat templates need, is not installed."""
    try:
        import jinja2  # noqa: F401

        from .sandbox import sandbox
    except ImportError as error:
        raise missing_package("chat templates need", "jinja2") from error
    return sandbox()

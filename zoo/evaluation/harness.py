"""A model for lm-evaluation-harness (the `eval` extra): tasks by likelihoods of continuations, or by generated text."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from tokenizers import Tokenizer

from ...layers.spec import missing_package
from ..decoder import DecoderModel
from ..generation.chat import ChatTemplate
from ..generation.generate import complete
from ..generation.sampling import Sampling
from .score import Row, Scorer


class Candidate:
    """What the harness asks of a model, in plain Python; `harness_model` makes it an `lm_eval.api.model.LM`.

    Args:
        model: the decoder.
        tokenizer: of the model.
        stop: strings that end a generated text.
        start: the token before a text that has nothing before it.
        template: of chats, for tasks that ask for it.
        length: tokens a row has at most.
        batch: rows at a time.
        dtype: what the model computes in.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str],
        start: int,
        template: ChatTemplate | None = None,
        length: int = 1024,
        batch: int = 4,
        dtype: Any = jnp.float32,
    ):
        self.scorer = Scorer(model, length=length, batch=batch, dtype=dtype)
        self.model, self.tokenizer, self.stop, self.start, self.template = (
            model,
            tokenizer,
            tuple(stop),
            start,
            template,
        )
        self._adds_start = tokenizer.encode("").ids[:1] == [start]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log-probability of the continuation, and whether greedy gives it.

        What is too long is cut on the left. Raises ValueError where a continuation is empty or longer than a row.
        """
        found = self.scorer.rows([self._row(*pair) for pair in pairs])
        return [(one.log_prob, one.greedy) for one in found]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text, of every token once, in windows without overlap where it is long."""
        rows = [list(self.scorer.windows([self.start, *self._ids(text)], self.scorer.length - 1)) for text in texts]
        found = iter(self.scorer.rows([row for part in rows for row in part]))
        return [sum(next(found).log_prob for _ in part) for part in rows]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The text after each context, up to one of the strings `until`; greedy unless the request samples.

        Raises ValueError where a request has settings that mean nothing here.
        """
        texts: list[str] = []
        for context, settings in requests:
            given = dict(settings)
            until = given.pop("until", None) or []
            until = [until] if isinstance(until, str) else list(until)
            tokens = int(given.pop("max_gen_toks", given.pop("max_new_tokens", 256)))
            sampled = bool(given.pop("do_sample", float(given.get("temperature", 0.0)) > 0))
            names = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"} & given.keys()
            values = {name: given.pop(name) for name in names}
            if not sampled:
                values["temperature"] = 0.0
            if given:
                raise ValueError(f"generation settings {sorted(given)} mean nothing here, got {given}")
            ids = self._ids(context)
            begin = [] if ids and not self._adds_start else self._before(ids)
            prompt = [*begin, *ids[-max(1, self.scorer.length - tokens - len(begin)) :]]
            stop = tuple(dict.fromkeys([*until, *self.stop]))
            options: dict[str, Any] = {"sampling": Sampling(**values), "stop": stop, "dtype": self.scorer.dtype}
            texts.append(complete(self.model, self.tokenizer, [prompt], max_tokens=tokens, **options)[0].text)
        return texts

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _before(self, ids: Sequence[int]) -> list[int]:
        """The token before a text; none where the text has it, as a chat template may have put it there."""
        return [] if ids[:1] == [self.start] else [self.start]

    def _row(self, context: str, continuation: str) -> Row:
        """Spaces between the two belong to the continuation, and both are tokenized as one text."""
        kept = context.rstrip()
        before, ids = self._ids(kept), self._ids(context + continuation)
        count = len(ids) - len(before)
        if not continuation or not 0 < count < self.scorer.length:
            raise ValueError(
                f"a continuation has at least 1 token and at most {self.scorer.length - 1}, got {count}: "
                f"{continuation[:60]!r}"
            )
        before = self._before(ids) if count < len(ids) else [self.start]
        return Row(tuple([*before, *ids][-self.scorer.length :]), count)


def harness_model(candidate: Candidate) -> Any:
    """The candidate as an `lm_eval.api.model.LM`. Raises ValueError where lm-eval is not installed."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise missing_package("tasks take", "lm-eval") from error

    class HarnessModel(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return candidate.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return candidate.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return candidate.generate_until([request.args for request in requests])

        @property
        def tokenizer_name(self) -> str:
            return "flaxzoo"

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "" if candidate.template is None or not chat_template else candidate.template.source

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if candidate.template is None:
                raise ValueError("the model has no chat template, and the task asks for one")
            return candidate.template.render(chat_history, prompt=add_generation_prompt)

    return HarnessModel()

"""A model for lm-evaluation-harness (the `eval` extra), with the results of the harness's own Hugging Face backend."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from ...layers.spec import missing_package
from ..decoder import DecoderModel
from ..formats.tokenizer_file import prepare_tokenizer
from ..generation.generate import complete
from ..generation.sampling import GREEDY, Sampling
from ..generation.template import ChatTemplate
from ..text_encoding import encode
from .score import Scorer
from .windows import Window, split_into_windows

if TYPE_CHECKING:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

DEFAULT_NEW_TOKENS = 256
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the most tokens to generate, the first one given counts."""
SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
END_OF_CHAT = "END_OF_CHAT "
"""Marks the end of a message that the model continues. Its space shows whether the template strips messages."""


class HarnessBackend:
    """Answers the requests of lm-evaluation-harness. `harness_lm` makes it an `lm_eval.api.model.LM`.

    Tokens, windows and cuts are those of the harness's Hugging Face backend, HFLM in lm_eval/models/huggingface.py:
    texts get the special tokens that the tokenizer adds, unless they begin with the prefix token as text, and text that
    spells a special token is that token.

    Args:
        model: the decoder.
        tokenizer: tokenizer of the model.
        prefix: token on which the first token of a text is conditioned: BOS, or EOS for a tokenizer without BOS.
        stop: strings that end a generated text, beside those of a request.
        template: chat template, for tasks that use one.
        length: tokens that the model reads at once, at most.
        batch: windows in a batch.
        dtype: dtype of the computation.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer,
        *,
        prefix: int,
        stop: Sequence[str] = (),
        template: ChatTemplate | None = None,
        length: int = 1024,
        batch: int = 4,
        dtype: DTypeLike = jnp.float32,
    ):
        self.scorer = Scorer(model, length=length, batch=batch, dtype=dtype)
        self.model, self.tokenizer, self.template = model, prepare_tokenizer(tokenizer), template
        self.prefix, self.stop = prefix, tuple(stop)
        self._prefix_text = tokenizer.decode([prefix], skip_special_tokens=False)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-probability of the continuation, and whether greedy decoding gives it.

        Whitespace between context and continuation counts as part of the continuation. Tokens of the context beyond
        `length` are cut off at its start. An empty context is the prefix token.

        Raises ValueError if a continuation has no token of its own or more than `length` tokens.
        """
        likelihoods = self.scorer.likelihoods([self._window(*pair) for pair in pairs])
        return [(likelihood.log_prob, likelihood.greedy) for likelihood in likelihoods]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text: of each of its tokens once, BOS included where the tokenizer adds it.

        The first token is conditioned on the prefix token. Windows move by `length` tokens, and later ones do not
        start with the prefix token.
        """
        length = self.scorer.length
        split = [
            list(split_into_windows(self._encode(text), prefix=self.prefix, length=length, stride=length))
            for text in texts
        ]
        likelihoods = iter(self.scorer.likelihoods([window for windows in split for window in windows]))
        return [sum((next(likelihoods).log_prob for _ in windows), 0.0) for windows in split]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The text after each context, up to one of the strings `until`. Greedy unless the request samples.

        The context and the new tokens together have at most `length` tokens, so a long context is cut at its start.

        Raises ValueError on generation settings that are not supported.
        """
        return [self._generate(context, settings) for context, settings in requests]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a chat up to where the model answers or, without a generation prompt, continues the last message.

        Raises ValueError if the model has no chat template, or the template leaves out the last message.
        """
        if self.template is None:
            raise ValueError("this task uses a chat template, and the model has none")
        if add_generation_prompt:
            return self.template.render(messages)
        last = {**messages[-1], "content": messages[-1]["content"] + END_OF_CHAT}
        text = self.template.render([*messages[:-1], last], prompt=False)
        end = text.rfind(END_OF_CHAT.strip())
        if end < 0:
            raise ValueError(f"the chat template leaves out the last message: {messages[-1]['content'][:60]!r}")
        return text[:end] if text[end:].startswith(END_OF_CHAT) else text[:end].rstrip()

    def _encode(self, text: str) -> list[int]:
        special = not text.startswith(self._prefix_text)
        return encode(self.tokenizer, text, special_tokens=True, add_special_tokens=special)

    def _window(self, context: str, continuation: str) -> Window:
        length = self.scorer.length
        if context:
            before = self._encode(context.rstrip())
            scored = self._encode(context + continuation)[len(before) :]
        else:
            before, scored = [], encode(self.tokenizer, continuation, special_tokens=True)
            if scored[:1] == [self.prefix]:
                before, scored = scored[:1], scored[1:]
        if not 0 < len(scored) <= length:
            raise ValueError(
                f"a continuation needs at least 1 token beyond its context and at most {length}, got {len(scored)} for "
                f"the continuation {continuation[:60]!r} of {context[-60:]!r}"
            )
        ids = [*(before or [self.prefix]), *scored]
        return Window(tuple(ids[-(length + 1) :]), len(scored))

    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        until, new_tokens, sampling = _generation_settings(settings)
        room = self.scorer.length - new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks must be below the length of {self.scorer.length}, so that the model can read the "
                f"context, got {new_tokens}"
            )
        prompt = self._encode(context)[-room:] or [self.prefix]
        stop = tuple(dict.fromkeys([*until, *self.stop]))
        (completion,) = complete(
            self.model,
            self.tokenizer,
            [prompt],
            max_tokens=new_tokens,
            sampling=sampling,
            stop=stop,
            dtype=self.scorer.dtype,
        )
        # HFLM decodes new tokens without those before, which drops the leading space of sentencepiece tokenizers.
        text = self.tokenizer.decode(completion.ids)
        return text[: min((at for at in map(text.find, stop) if at >= 0), default=None)]


def _generation_settings(settings: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop strings, most new tokens, and sampling of a request. Raises ValueError on any other setting."""
    rest = dict(settings)
    until = rest.pop("until", None) or []
    lengths = [rest.pop(name) for name in LENGTH_NAMES if name in rest]
    samples = rest.pop("do_sample", None)
    values = {name: rest.pop(name) for name in SAMPLING_NAMES if name in rest}
    if rest:
        raise ValueError(f"generation settings {sorted(rest)} are not supported, got {rest}")
    if samples is None:
        samples = float(values.get("temperature", 0.0)) > 0
    values["temperature"] = values.get("temperature", 1.0) if samples else GREEDY.temperature
    return (
        [string for string in ([until] if isinstance(until, str) else until) if string],
        next((int(length) for length in lengths if length is not None), DEFAULT_NEW_TOKENS),
        Sampling(**values),
    )


def harness_lm(backend: HarnessBackend) -> "LM":
    """The backend as an `lm_eval.api.model.LM`. Raises ValueError if lm-eval is not installed."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise missing_package("tasks take", "lm-eval") from error

    class HarnessModel(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return backend.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return backend.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return backend.generate_until([request.args for request in requests])

        @property
        def tokenizer_name(self) -> str:
            return "flaxzoo"

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "" if backend.template is None or not chat_template else backend.template.source

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return backend.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    return HarnessModel()

"""`zoo generate`: the continuation of a prompt."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from ... import zoo
from ...zoo.generation.generate import Options
from ...zoo.text_encoding import unescaped
from ..runs.status import compiling_shown
from .flags import parse_flags
from .inference import SOURCE, ModelFlags, SamplingFlags, note


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt.

    Example: `zoo generate runs/shakespeare --prompt "JULIET." --temperature 0.7`
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=SOURCE)]
    prompt: str = "\n"
    """The text to continue."""
    max_tokens: int = 300
    """The largest number of tokens to generate."""
    samples: int = 1
    """Number of texts; a single one is streamed."""
    speculate: int = 0
    """Speculative decoding with N tokens at a time, predicted from the text so far. Changes only the speed."""
    special_tokens: bool | None = None
    """Read text of the prompt that spells a special token as that token; by default as the run was trained
    (data.special_tokens), and as plain text for other models."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = SamplingFlags()
    weights: tyro.conf.OmitArgPrefixes[ModelFlags] = ModelFlags()


def parse(arguments: Sequence[str]) -> Generate:
    """The spec that the arguments describe."""
    return parse_flags(Generate, arguments, "zoo generate")


def run(spec: Generate) -> None:
    """Writes the texts to standard output."""
    prompt = unescaped(spec.prompt)
    text_model = spec.weights.open(spec.model).optimize_for_decoding()
    special = text_model.special_tokens if spec.special_tokens is None else spec.special_tokens
    limit = spec.max_tokens
    options = Options(
        sampling=spec.sampling.over(text_model.sampling),
        stop=text_model.end_ids,
        seed=spec.sampling.seed,
        dtype=text_model.dtype,
        cache_dtype=spec.weights.cache_dtype or None,
        speculation=zoo.Speculation(tokens=spec.speculate) if spec.speculate else None,
        special_tokens=special,
    )
    note(f"sampling: {spec.sampling.describe(text_model.sampling, text_model.recommended)}")
    bold = Console(soft_wrap=True, highlight=False, markup=False)
    shown = prompt.lstrip("\n")
    if spec.samples == 1:
        stream = zoo.stream(text_model.model, text_model.tokenizer, prompt, max_tokens=limit, **options)
        with compiling_shown() as stop_showing:
            for index, piece in enumerate(itertools.chain(stream, [""])):
                if not index:
                    stop_showing()
                    bold.print(shown, style="bold", end="")
                print(piece, end="", flush=True)
        print("\n")
        speed = stream.completion.speed
    else:
        with compiling_shown():
            prompts = [prompt] * spec.samples
            completions = zoo.complete(text_model.model, text_model.tokenizer, prompts, max_tokens=limit, **options)
        for completion in completions:
            bold.print(Text(shown, style="bold") + Text(f"{completion.text}\n", style="not bold"))
        speed = completions[0].speed
    note(f"({speed})")

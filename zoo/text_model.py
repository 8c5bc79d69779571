"""A model with all that its texts need: tokenizer, chat template, the tokens that end a text, sampling defaults."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tokenizers import Tokenizer

from ..layers.spec import unknown
from .decoder import Decoder, DecoderModel
from .evaluation.windows import prefix_token
from .families.registry import read
from .formats.load import is_run, load, open_source, runs_of
from .formats.source import Progress, Source
from .formats.text_ends import end_ids, generation_config, named_special_tokens, sampling_origin, sampling_settings
from .generation.chat import Conversation
from .generation.generate import Completion, Options, Prompt, complete, generate, stream
from .generation.optimize import optimize_for_decoding
from .generation.sampling import Sampling, recommended_sampling
from .generation.template import ChatTemplate

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TextModel:
    """A model, its tokenizer, and how it writes text. `zoo.open` makes one of any checkpoint.

    The methods are the functions of the same names with this model's tokenizer, end tokens, sampling and dtype.
    """

    model: DecoderModel
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    """Tokens that end a text (zoo/formats/text_ends.py). The first one begins a text if the tokenizer adds nothing."""
    template: ChatTemplate | None
    """The chat template; None for a model without one."""
    dtype: Any
    """The dtype the model computes in."""
    sampling: Sampling = Sampling()
    """How tokens are chosen unless a call says otherwise: the settings of generation_config.json."""
    recommended: tuple[str, ...] = ()
    """The fields of `sampling` that generation_config.json sets."""
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the names that chat templates use, e.g. {"bos_token": "<s>"}."""

    special_tokens: bool = False
    """Whether text that spells a special token is read as that token, as the run was trained."""

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts of the tokens that end a text."""
        return tuple(str(self.tokenizer.id_to_token(index)) for index in self.end_ids)

    @property
    def prefix(self) -> int | None:
        """Token on which the first token of a text is conditioned in scoring; None if the tokenizer has none."""
        eos = self.named_tokens.get("eos_token")
        ends = self.stop if eos is None else (eos, *self.stop)
        return prefix_token(self.tokenizer, self.named_tokens.get("bos_token"), ends)

    def optimize_for_decoding(self) -> "TextModel":
        """This text model with its model in the form that decodes fastest. The original model is no longer usable."""
        return dataclasses.replace(self, model=optimize_for_decoding(self.model, self.dtype, donate=True))

    def with_template(self, source: str) -> "TextModel":
        """This text model with another chat template, which sees the model's special tokens."""
        return dataclasses.replace(self, template=ChatTemplate(source, self.named_tokens))

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int = 200, **options: Unpack[Options]) -> list[str]:
        """`zoo.generate`: continues each prompt and returns the continuations."""
        return generate(self.model, self.tokenizer, prompts, max_tokens=max_tokens, **self._options(options))

    def complete(
        self, prompts: Sequence[Prompt], *, max_tokens: int = 200, **options: Unpack[Options]
    ) -> list[Completion]:
        """`zoo.complete`: continues each prompt."""
        return complete(self.model, self.tokenizer, prompts, max_tokens=max_tokens, **self._options(options))

    def stream(self, prompt: Prompt, *, max_tokens: int = 200, **options: Unpack[Options]) -> stream:
        """`zoo.stream`: continues one prompt and gives the text in pieces."""
        return stream(self.model, self.tokenizer, prompt, max_tokens=max_tokens, **self._options(options))

    def chat(self, *, system: str | None = None, **options: Any) -> Conversation:
        """A `Conversation` with this model; `options` are its keyword arguments.

        Raises ValueError if the model has no chat template.
        """
        if self.template is None:
            raise ValueError("the model has no chat template; give one with with_template(TEXT)")
        return Conversation(self.model, self.tokenizer, self.template, system=system, **self._with_defaults(options))

    def _options(self, options: Options) -> Any:
        return {"special_tokens": self.special_tokens} | self._with_defaults(options)

    def _with_defaults(self, options: Mapping[str, Any]) -> Any:
        return {"sampling": self.sampling, "stop": self.end_ids, "dtype": self.dtype} | dict(options)


def open(
    source: str | Path | Source,
    *,
    dtype: Any = None,
    mesh: Mesh | Callable[[Decoder], Mesh] | None = None,
    step: int | None = None,
    ignore: Collection[str] = (),
    text_only: bool = False,
    progress: Progress | None = None,
) -> TextModel:
    """Opens a checkpoint as a model that writes text.

    Args:
        source: a Hugging Face folder, a `.gguf` file, the folder of a run of `flaxzoo.train`, the name of a repository
            on the Hugging Face hub ("org/name", which needs the `hub` extra), or an open `Source`.
        dtype: what the model computes in, and the dtype that parameters are loaded in. By default parameters keep the
            dtype they are stored in, and the model computes in it (in float32 if that is float16). The parameters of a
            run stay float32.
        mesh: splits the parameters; a mesh, or a function from the model's spec to one. One device by default.
        step: the checkpoint of a run; the latest by default.
        ignore: as of `load`.
        text_only: as of `load`.
        progress: called after each tensor with the bytes loaded and the bytes in all.

    Raises:
        ValueError: as `load`, and where the source has no tokenizer.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    dtype = None if dtype is None else jnp.dtype(dtype)
    if isinstance(source, str | Path) and is_run(source):
        runs = runs_of(source)
        model, tokenizer = runs.load(source, step=step, mesh=mesh)
        described: Any = runs.text(source)
    else:
        if step is not None:
            raise ValueError(f"step selects a checkpoint of a run, and {source} is not a run; leave it out")
        described = open_source(source, ignore=ignore, text_only=text_only)
        if mesh is not None and not isinstance(mesh, Mesh):
            mesh = mesh(read(described.config))
        model, tokenizer = load(described, dtype=dtype, mesh=mesh, progress=progress)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer: put its tokenizer.json beside the weights")
    tokens = named_special_tokens(described, tokenizer)
    template = getattr(described, "chat_template", None)
    stored = jax.tree.leaves(model)[0].dtype
    settings = sampling_settings(generation_config(described))
    return TextModel(
        model,
        tokenizer,
        end_ids(described, tokenizer),
        None if template is None else ChatTemplate(template, tokens),
        dtype or (jnp.dtype("float32") if stored == jnp.float16 else stored),
        recommended_sampling(settings, sampling_origin(described)),
        tuple(settings),
        tokens,
        getattr(described, "special_tokens", False),
    )

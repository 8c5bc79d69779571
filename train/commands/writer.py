"""What a SOURCE on the command line comes to: a model, its tokenizer, how it chats and where its texts end."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from ... import zoo
from ...layers.spec import unknown
from ...zoo.decoder import DecoderModel
from ...zoo.evaluation.windows import prefix_token
from ...zoo.families import family
from ...zoo.formats.hugging_face import CheckpointFolder, read_json
from ...zoo.formats.source import token_of
from ...zoo.generation.chat import ChatTemplate
from ..data import separator
from ..distributed import mesh as meshes
from ..runs import folder as folders

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Writer:
    """Everything that generation needs."""

    model: DecoderModel
    tokenizer: Tokenizer
    stop: tuple[str, ...]
    """The tokens that end a text."""
    template: ChatTemplate | None
    dtype: Any
    """What the model computes in."""
    prefix: int | None
    """Token on which the first token of a text is conditioned, in scoring."""
    special_tokens: bool = False
    """Whether text that spells a special token is read as that token, as the run was trained."""

    def optimize_for_decoding(self) -> "Writer":
        """The same with the model in the form that decodes fastest, which takes the place of this one's model."""
        return dataclasses.replace(self, model=zoo.optimize_for_decoding(self.model, self.dtype, donate=True))


def open_writer(
    source: str | Path, *, step: int | None = None, mesh: str = "", dtype: str = "", progress: Any = None
) -> Writer:
    """The model of a source with all that belongs to it.

    Args:
        source: the folder of a run, a Hugging Face folder, a `.gguf` file, or a name on the hub.
        step: of a run, the checkpoint; the latest by default.
        mesh: axes and sizes to place the parameters on, e.g. "tensor=4"; one device by default.
        dtype: what the model computes in; by default float32 for a run, and for others what they are stored in.
        progress: told bytes loaded and bytes in all.

    Raises ValueError where there is no such source, it is damaged, or it lacks a tokenizer.
    """
    if dtype and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    path = Path(source)
    if folders.is_named(path):
        model, tokenizer = folders.load(path, step=step, mesh=mesh)
        described = folders.Folder(path).described
        stop, template = ((), None) if described is None else _text_of(described, tokenizer)
        end = str(tokenizer.id_to_token(separator(tokenizer)))
        prefix = prefix_token(tokenizer, None, [end]) if described is None else _prefix(described, tokenizer, stop)
        stop = tuple(dict.fromkeys((end, *stop)))
        special_tokens = folders.Folder(path).run().data.special_tokens
        return Writer(model, tokenizer, stop, template, jnp.dtype(dtype or "float32"), prefix, special_tokens)
    if step is not None:
        raise ValueError(f"step is of the checkpoints of a run, and {source} is none; leave it out")
    opened = zoo.open_source(source)
    many = bool(mesh) or jax.process_count() > 1
    placed = meshes.for_parameters(family.read(opened.config), mesh) if many else None
    wanted = jnp.dtype(dtype) if dtype else None
    model, tokenizer = zoo.load(opened, dtype=wanted, mesh=placed, progress=progress)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer: put its tokenizer.json beside the weights")
    stop, template = _text_of(opened, tokenizer)
    stored = jax.tree.leaves(model)[0].dtype
    computed = jnp.float32 if stored == jnp.float16 else stored
    prefix = _prefix(opened, tokenizer, stop)
    return Writer(model, tokenizer, stop, template, jnp.dtype(dtype) if dtype else computed, prefix)


def _prefix(source: Any, tokenizer: Tokenizer, stop: tuple[str, ...]) -> int | None:
    """`prefix_token` of a source, by the BOS and EOS that tokenizer_config.json names, else by those of the config."""
    folder = source.path if isinstance(source, CheckpointFolder) else None
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        named = _named_tokens(read_json(folder / "tokenizer_config.json"))
        return prefix_token(tokenizer, named.get("bos_token"), [*filter(None, [named.get("eos_token")]), *stop])
    return prefix_token(tokenizer, token_of(tokenizer, source.config.get("bos_token_id")), stop)


def _named_tokens(described: dict[str, Any]) -> dict[str, str]:
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in described.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def _text_of(source: Any, tokenizer: Tokenizer) -> tuple[tuple[str, ...], ChatTemplate | None]:
    """The tokens that end a text, and how the model chats."""
    tokens, template = _described(source, tokenizer)
    stop = tuple(tokens.pop("stop"))
    return stop, None if template is None else ChatTemplate(template, tokens)


def _described(source: Any, tokenizer: Tokenizer) -> tuple[dict[str, Any], str | None]:
    """Special tokens by the names that templates use, the tokens that end a text as "stop", and the template."""
    config, template = dict(source.config), source.chat_template
    named: dict[str, Any] = {}
    stop: list[str] = []
    if isinstance(source, CheckpointFolder):
        folder = source.path
        described = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        if (folder / "generation_config.json").is_file():
            config |= {k: v for k, v in read_json(folder / "generation_config.json").items() if k == "eos_token_id"}
        named |= _named_tokens(described)
    for name in ("bos_token", "eos_token"):
        ids = config.get(f"{name}_id")
        texts = [token_of(tokenizer, number) for number in (ids if isinstance(ids, list) else [ids])]
        stop += [text for text in texts if text and name == "eos_token"]
        if texts and texts[0]:
            named.setdefault(name, texts[0])
    stop += [named["eos_token"]] if "eos_token" in named else []
    return named | {"stop": list(dict.fromkeys(stop))}, template

"""A family of models: how its `config.json` is read and written, and the names of its tensors.

A family is a value in a file of `zoo/families/`, which the registry imports; it is listed nowhere else:

    FAMILY = Family(
        model_types=("llama",),
        architecture="LlamaForCausalLM",
        read=read,      # Config -> Decoder; a field that it does not read is an error
        write=write,    # Decoder -> fields of a config.json; what it writes is read back and compared
        names=NAMES,    # checkpoint name: (axes, parameter, ...), see names.py
    )

Helpers: `config.Config` (the fields), `layer_pattern` (decoders whose layers differ), `rope_config`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..decoder import Decoder
from .config import Config
from .names import Table


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models."""

    model_types: tuple[str, ...]
    """The `model_type` of its configs; the first is the one written."""
    architecture: str
    """The class of transformers, written into `architectures`."""
    read: Callable[[Config], Decoder]
    write: Callable[[Decoder], dict[str, object]]
    names: Table
    prefix: str = "model."
    """The prefix of names that a checkpoint without a head leaves out."""
    buffers: tuple[str, ...] = ()
    """Names of tensors that some checkpoints hold and that are not part of the decoder, as in the table of names.

    `{layers}` is the number of layers, `*` matches anything.
    """

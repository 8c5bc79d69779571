"""What a family of models is: how its `config.json` reads and what its tensors are called.

A family is a value, one in a file of `zoo/families/`, where it is found without being listed anywhere:

    FAMILY = Family(
        model_types=("llama",),
        architecture="LlamaForCausalLM",
        read=read,      # Config -> Decoder; every field it does not take is an error, so none is ignored
        write=write,    # Decoder -> fields of a config.json; need not check that the family can express the decoder:
                        # what it writes is read back and compared
        names=NAMES,    # the checkpoint's name: (axes, ours, ...), see names.py
    )

Helpers: `config.Config` (the fields that `read` is given), `blocks.per_layer` (a decoder whose layers differ),
`blocks.part` (a mixer or feed-forward layer of the type that the family has), `rope_config`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...layers.spec import unknown
from ..decoder import Decoder
from .config import Config
from .layer_pattern import Inexpressible
from .names import Table


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models."""

    model_types: tuple[str, ...]
    """The `model_type` of its configs; the first is the one written."""
    architecture: str
    """The class of transformers, written into `architectures`."""
    read: Callable[[Config], Decoder]
    write: Callable[[Decoder], dict[str, Any]]
    names: Table
    prefix: str = "model."
    """What names start with that a checkpoint without a head leaves out."""
    buffers: tuple[str, ...] = ()
    """Names, as in the table, of tensors that some checkpoints hold and that are no part of the decoder.

    `{layers}` is the number of its layers, `*` stands for anything.
    """


def find(config: Mapping[str, Any]) -> Family:
    """The family of a config. Raises ValueError where there is none, with those there are."""
    from . import FAMILIES  # which import this module

    known = {name: family for family in FAMILIES for name in family.model_types}
    name = config.get("model_type")
    if not isinstance(name, str) or name not in known:
        raise unknown("model_type", str(name), known)
    return known[name]


def read(config: Mapping[str, Any], *, ignore: Collection[str] = ()) -> Decoder:
    """The decoder that a config describes.

    Args:
        config: as in a Hugging Face `config.json`, of transformers 4 or 5.
        ignore: fields that are not known, and that the caller says change nothing.

    Raises:
        ValueError: on an unknown family, an option that is not supported, or a field that is not known.
    """
    family = find(config)
    if config.get("quantization_config") is not None:
        raise ValueError(
            "quantized weights (quantization_config) are not supported; take the original weights, or a GGUF file"
        )
    try:
        fields = Config(config, ignore)
        decoder = family.read(fields)
        fields.done()
    except ValueError as error:
        raise ValueError(f"config.json of model_type {config['model_type']!r}: {error}") from error
    return decoder


def write(decoder: Decoder, model_type: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family of a decoder, and its config.

    Args:
        decoder: the model's description.
        model_type: the family to take; the first that can express the decoder if not given.

    Raises:
        Inexpressible: where no family, or not this one, can; it says which settings are in the way.
    """
    from . import FAMILIES  # which import this module

    families = FAMILIES if model_type is None else (find({"model_type": model_type}),)
    closest: tuple[float, str, str] | None = None
    for family in families:
        fields: dict[str, Any] = {"model_type": family.model_types[0], "architectures": [family.architecture]}
        try:
            fields |= family.write(decoder)
            unlike = differences(decoder, read(fields))
            distance = len(unlike)
        except ValueError as error:
            unlike, distance = [str(error)], math.inf
        if not unlike:
            return family, fields
        if closest is None or distance < closest[0]:
            closest = (distance, family.model_types[0], "; ".join(unlike[:8]))
    assert closest is not None
    wanted = (
        f"the family {model_type!r} cannot" if model_type else f"no family can; the closest, {closest[1]!r}, cannot"
    )
    hint = "" if model_type else '; config={"model_type": ...} asks for another one, and tells why not'
    raise Inexpressible(f"this decoder has no Hugging Face config: {wanted} express {closest[2]}{hint}")


def differences(decoder: Decoder, other: Decoder) -> list[str]:
    """The settings in which two decoders compute differently; how their blocks are stacked is none."""

    def flat(decoder: Decoder) -> dict[str, Any]:
        outer = decoder.replace(first=(), block=decoder.all_blocks[:1], layers=1).flat()
        return {name: value for name, value in outer.items() if not name.startswith("block.")}

    found = _unlike("", flat(decoder), flat(other))
    if decoder.layers != other.layers:
        return [*found, f"layers={decoder.layers}"]
    for depth, (ours, theirs) in enumerate(zip(decoder.all_blocks, other.all_blocks, strict=True)):
        if ours != theirs:
            return found + _unlike(f"layer {depth}: ", ours.flat(), theirs.flat())
    return found


def _unlike(where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    names = [name for name in dict.fromkeys((*ours, *theirs)) if ours.get(name) != theirs.get(name)]
    return [f"{where}{name}={ours.get(name)!r} (only {theirs.get(name)!r})" for name in names]

"""The families: found by `model_type`, and by which of them can express a decoder."""

import difflib
import importlib
import math
import pkgutil
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ..decoder import Decoder
from .config import Config
from .family import Family
from .layer_pattern import Inexpressible


def _families() -> tuple[Family, ...]:
    """The families of all modules beside this one, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names if name != "registry"]
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Family))


FAMILIES = _families()
"""All families."""
BY_TYPE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.model_types}
"""The families by `model_type`."""


def find(config: Mapping[str, object]) -> Family:
    """The family of a config.

    Raises ValueError where there is none: with the families that exist, the name that a misspelled one is close to, or
    how to load the text part of a multimodal model.
    """
    name = config.get("model_type")
    if isinstance(name, str) and name in BY_TYPE:
        return BY_TYPE[name]
    text = config.get("text_config")
    part = text.get("model_type", f"{name}_text") if isinstance(text, dict) else None
    if isinstance(part, str) and part in BY_TYPE:
        raise ValueError(
            f"model_type {name!r} is multimodal, and its text part is of the family {part!r}: to load the text part "
            "alone, pass text_only=True (on the command line: --text-only)"
        )
    close = difflib.get_close_matches(str(name), [known for known in BY_TYPE if _misspelled(str(name), known)], 1, 0.85)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"no family has the model_type {name!r:.100}{hint} Families: {', '.join(sorted(BY_TYPE))}")


def _misspelled(name: str, known: str) -> bool:
    """Whether two names differ in letters alone: another digit or part makes another architecture."""
    return re.findall(r"\d+|_", name) == re.findall(r"\d+|_", known)


def read(config: Mapping[str, object], *, ignore: Collection[str] = ()) -> Decoder:
    """The decoder that a config describes.

    Args:
        config: as in a Hugging Face `config.json`, of transformers 4 or 5.
        ignore: fields that are not known, also inside `rope_parameters`, and that the caller says change nothing.

    Raises:
        ValueError: on an unknown family, an option that is not supported, or a field that is not known.
    """
    return _read(config, ignore)[0]


def ignored_fields(config: Mapping[str, object], ignore: Collection[str]) -> list[str]:
    """Those of `ignore` that reading the config leaves out. Raises ValueError as `read` does."""
    return _read(config, ignore)[1]


def _read(config: Mapping[str, object], ignore: Collection[str]) -> tuple[Decoder, list[str]]:
    family = find(config)
    if config.get("quantization_config") is not None:
        raise ValueError(
            "quantized weights (quantization_config) are not supported; take the original weights, or a GGUF file"
        )
    try:
        fields = Config(config, ignore)
        decoder = family.read(fields)
        fields.check_all_read()
    except ValueError as error:
        raise ValueError(f"config.json of model_type {config['model_type']!r}: {error}") from error
    return decoder, sorted(fields.ignored)


def write(decoder: Decoder, model_type: object = None) -> tuple[Family, dict[str, object]]:
    """The family of a decoder, and its config.

    Args:
        decoder: the model's description.
        model_type: the family to take; the first that can express the decoder if not given.

    Raises:
        Inexpressible: where no family, or not this one, can; it says which settings are in the way.
    """
    families = FAMILIES if model_type is None else (find({"model_type": model_type}),)
    closest: tuple[float, str, str] | None = None
    for family in families:
        fields: dict[str, object] = {"model_type": family.model_types[0], "architectures": [family.architecture]}
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

    def flat(decoder: Decoder) -> dict[str, object]:
        outer = decoder.replace(first=(), block=decoder.all_blocks[:1], layers=1).flat()
        return {name: value for name, value in outer.items() if not name.startswith("block.")}

    found = _unlike("", flat(decoder), flat(other))
    if decoder.layers != other.layers:
        return [*found, f"layers={decoder.layers}"]
    for depth, (ours, theirs) in enumerate(zip(decoder.all_blocks, other.all_blocks, strict=True)):
        if ours != theirs:
            return found + _unlike(f"layer {depth}: ", ours.flat(), theirs.flat())
    return found


def _unlike(where: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    names = [name for name in dict.fromkeys((*ours, *theirs)) if ours.get(name) != theirs.get(name)]
    return [f"{where}{name}={ours.get(name)!r} (only {theirs.get(name)!r})" for name in names]

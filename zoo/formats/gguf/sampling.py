"""Recommended sampling settings: fields of generation_config.json, which are keys `general.sampling.*` in GGUF."""

import logging
from collections.abc import Mapping

import numpy as np

from ...generation.sampling import recommended_sampling
from ..text_ends import GENERATION_CONFIG, sampling_settings
from .config import shortest

PREFIX = "general.sampling."
KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""The keys, without the prefix, by the name of the field."""
NO_SAMPLING = frozenset(
    {"do_sample", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
)
"""Further fields of generation_config.json that lose nothing: GGUF has other keys for them, or they say nothing."""
NEUTRAL: Mapping[str, object] = {"xtc_probability": 0, "mirostat": 0, "penalty_last_n": -1}
"""Values of keys that no field has, with which these keys change nothing."""
_log = logging.getLogger(__name__)


def write_sampling(fields: Mapping[str, object]) -> dict[str, object]:
    """The metadata of the fields of a generation_config.json. Fields for which GGUF has no key are logged.

    Raises ValueError if a setting is not a number or out of its range.
    """
    settings = sampling_settings(fields)
    recommended_sampling(settings, GENERATION_CONFIG)
    lost = [name for name, value in fields.items() if value is not None and name not in {*KEYS, *NO_SAMPLING}]
    if lost:
        _log.warning("GGUF has no key for these fields of generation_config.json: %s: left out", ", ".join(lost))
    values: dict[str, object] = {}
    for name, value in settings.items():
        values[PREFIX + KEYS[name]] = np.int32(min(value, 2**31 - 1)) if name == "top_k" else float(value)
    if settings.get("repetition_penalty", 1) != 1:
        values[f"{PREFIX}penalty_last_n"] = np.int32(-1)  # on all tokens, as in transformers, and not on the last 64
    return values


def read_sampling(metadata: Mapping[str, object]) -> dict[str, object]:
    """The fields of a generation_config.json that the metadata of a file correspond to, empty if they have none.

    Values that switch a filter off in llama.cpp (top_k below 0, for instance) become the field's own value for that.
    Keys that no field has are logged.
    """
    given = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    fields: dict[str, object] = {}
    for name, key in KEYS.items():
        value = given.pop(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            if value is not None:
                raise ValueError(f"{PREFIX}{key} must be a number, got {value!r:.60}")
            continue
        value = shortest(value) if isinstance(value, float) else value
        if name in ("temperature", "top_k", "min_p"):
            value = max(value, 0)
        fields[name] = min(value, 1.0) if name == "top_p" else value
    if (temperature := fields.get("temperature")) is not None:
        fields = {"do_sample": temperature != 0} | fields
    lost = [f"{key}={value!r:.60}" for key, value in given.items() if key not in NEUTRAL or value != NEUTRAL[key]]
    if lost:
        _log.warning("sampling settings that are not supported: %s: left out", ", ".join(lost))
    return fields

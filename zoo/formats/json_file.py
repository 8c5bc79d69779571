"""JSON files that need not be trusted."""

import json
from pathlib import Path
from typing import Any

JsonObject = dict[str, Any]
"""A JSON object. Its values are of any JSON type, and each is checked where it is read."""
MAX_JSON = 64 * 1024 * 1024
"""Bytes that a JSON file beside the weights may have; the largest index on the hub has 8 MB."""


def read_json(path: Path) -> JsonObject:
    """A JSON object from a file that may be damaged: ValueError says what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_JSON:,}")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {str(data)[:60]!r}")
    return data

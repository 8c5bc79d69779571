"""Repositories of the Hugging Face hub, through huggingface_hub (the `hub` extra)."""

import re
from pathlib import Path

from ...layers.spec import missing_package
from .hugging_face import COMPANIONS

PATTERNS = (
    *("config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *COMPANIONS,
)
"""The files that are fetched: never code, never a pickle, nor the weights in a maker's own format beside
(consolidated.safetensors, original/model.safetensors)."""


def is_name(text: str) -> bool:
    """Whether this may be the name of a repository: "org/name"."""
    part = r"[A-Za-z0-9][\w.-]{0,95}"
    return re.fullmatch(f"{part}/{part}", text) is not None


def download(name: str) -> Path:
    """The folder of a repository in the hub's local cache, fetched if it is not there yet.

    Raises ValueError where huggingface_hub is not installed or does not give the repository, with its reason.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise missing_package(
            f"{name} is no folder here, and to fetch it from the Hugging Face hub takes", "huggingface_hub"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(PATTERNS)))
    except Exception as error:  # of many kinds: no network, no such repository, not allowed, no space
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name} is no folder here, and the Hugging Face hub does not give it: {reason}. Check the name and the "
            "network, accept the licence on its page and run `hf auth login` if it has one, or download it elsewhere "
            "and give the folder"
        ) from error

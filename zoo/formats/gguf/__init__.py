"""GGUF, the format of llama.cpp: read as a source of weights, and written."""

from .file import GgufFile as GgufFile
from .save import save_gguf as save_gguf

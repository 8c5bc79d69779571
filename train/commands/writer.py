"""The names under which `zoo.TextModel` and `zoo.open` were shown before."""

from ...zoo.text_model import TextModel as Writer
from ...zoo.text_model import open as open_writer

__all__ = ["Writer", "open_writer"]

"""Training: data, step, loop, checkpoints, meshes, and the `zoo` command."""

from ..zoo.load import RUN_LOADERS
from .folder import load as load
from .loop import Result as Result
from .loop import train as train

RUN_LOADERS.append(load)  # zoo.load knows no training, and so no runs, of its own

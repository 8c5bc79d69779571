"""Training: data, step, loop, checkpoints, meshes, and the `zoo` command."""

from .folder import load as load
from .loop import Result as Result
from .loop import train as train

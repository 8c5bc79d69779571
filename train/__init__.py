"""Training: data, step, loop, checkpoints, meshes, and the `zoo` command."""

from ..zoo.load import RUNS, Runs
from .folder import load as load
from .folder import open_run
from .loop import Result as Result
from .loop import train as train

RUNS.append(Runs(load, open_run))

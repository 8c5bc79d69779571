"""Training: data, step, loop, checkpoints, meshes, and the `zoo` command."""

from ..zoo.formats.load import RUNS, Runs
from .runs.folder import load as load
from .runs.folder import open_run
from .runs.loop import Result as Result
from .runs.loop import train as train

RUNS.append(Runs(load, open_run))

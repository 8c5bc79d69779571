"""Training: data, step, loop, checkpoints, meshes, and the `zoo` command."""

from ..zoo.formats.load import RUNS, Runs
from .distributed.mesh import make as make_mesh
from .distributed.mesh import place as place_batch
from .runs.folder import load as load
from .runs.folder import open_run, text_of_run
from .runs.loop import Result as Result
from .runs.loop import train as train
from .step import Batch as Batch
from .step import State as State
from .step import initial_state as initial_state
from .step import make_step as make_step

__all__ = ["Batch", "Result", "State", "initial_state", "load", "make_mesh", "make_step", "place_batch", "train"]

RUNS.append(Runs(load, open_run, text_of_run))

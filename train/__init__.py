"""Training: data, step, loop, checkpoints, meshes, and the `zoo` command.

Names are imported when they are first used, so that `zoo --help` and `zoo list` start without JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .distributed.mesh import make as make_mesh
    from .distributed.mesh import place as place_batch
    from .runs.folder import load as load
    from .runs.loop import Result as Result
    from .runs.loop import train as train
    from .runs.reader import RUN_READER as RUN_READER
    from .step import Batch as Batch
    from .step import State as State
    from .step import initial_state as initial_state
    from .step import make_step as make_step
else:
    MODULES = {name: ("step", name) for name in ("Batch", "State", "initial_state", "make_step")}
    MODULES |= {name: ("runs.loop", name) for name in ("Result", "train")}
    MODULES |= {"load": ("runs.folder", "load"), "RUN_READER": ("runs.reader", "RUN_READER")}
    MODULES |= {"make_mesh": ("distributed.mesh", "make"), "place_batch": ("distributed.mesh", "place")}

    def __getattr__(name):
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = MODULES[name]
        value = getattr(importlib.import_module(f".{module}", __name__), attribute)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *MODULES})


__all__ = ["Batch", "Result", "State", "initial_state", "load", "make_mesh", "make_step", "place_batch", "train"]

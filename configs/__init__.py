"""Models and runs by name, as plain Python functions that return values.

Names are imported when they are first used: `catalog`, from which `zoo list` reads, needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import files as files
    from . import models as models
    from . import runs as runs
    from .named import MODELS as MODELS
    from .named import RUNS as RUNS
    from .named import get as get
    from .named import get_model as get_model
    from .named import get_run as get_run
    from .named import unknown_name as unknown_name
    from .run import Balance as Balance
    from .run import Data as Data
    from .run import Optimizer as Optimizer
    from .run import Run as Run
else:
    MODULES = dict.fromkeys(("MODELS", "RUNS", "get", "get_model", "get_run", "unknown_name"), "named")
    MODULES |= dict.fromkeys(("Balance", "Data", "Optimizer", "Run"), "run")
    MODULES |= {name: name for name in ("files", "models", "runs")}

    def __getattr__(name):
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f".{MODULES[name]}", __name__)
        value = module if MODULES[name] == name else getattr(module, name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *MODULES})

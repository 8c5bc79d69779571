"""A process for each variant of a training step, so that its peak memory is its own and variants can take turns."""

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Times = dict[str, float]
"""`wall` seconds and `cpu` seconds, user and system."""


class Clock:
    """Wall and CPU seconds of this process since the last lap."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> Times:
        """The seconds, and starts the next lap."""
        before = getattr(self, "now", (0.0, 0.0))
        self.now = (time.perf_counter(), sum(os.times()[:2]))
        return {"wall": self.now[0] - before[0], "cpu": self.now[1] - before[1]}


def serve(connection: Any, make_step: Callable, state: Any, batch: Any, make_state: Callable) -> None:
    """Compiles and sends the times of that; makes a step with each batch it gets, until None; sends the peak memory."""
    import jax

    clock = Clock()
    traced = make_step().trace(state, batch)  # making the step is part of tracing
    times = {"trace": clock.lap()}
    lowered = traced.lower()
    times["lower"] = clock.lap()
    compiled = lowered.compile()
    times["compile"] = clock.lap()
    connection.send(times)
    state, places = None, {name: x.sharding for name, x in batch.items()}
    while (arrays := connection.recv()) is not None:
        state = make_state() if state is None else state
        batch = {name: jax.device_put(arrays[name], places[name]) for name in places}
        jax.block_until_ready((state, batch))
        clock.lap()
        state, metrics = jax.block_until_ready(compiled(state, batch))
        connection.send(clock.lap() | {name: float(metrics[name]) for name in ("loss", "gradient_norm")})
    unit = 1 if sys.platform == "darwin" else 1024
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class Child:
    """A process that runs one of the functions above; `first` is the first thing it sent."""

    def __init__(self, function: Callable, layers: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=function, args=(other, layers, folder), daemon=True)
        self.process.start()
        other.close()
        self.first = self.connection.recv()

    def ask(self, message: Any) -> Any:
        """Sends a message and waits for the answer."""
        self.connection.send(message)
        return self.connection.recv()

    def end(self) -> int:
        """Ends the process; returns its peak memory in bytes. Until asked for a step, that is what compiling takes."""
        peak = self.ask(None)
        self.process.join()
        return peak

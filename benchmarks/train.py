"""Our training step beside a plain one: speed, compile time, peak memory; and our compile time by depth.

    make bench-train                      measure, print, and write benchmarks/results/train.{json,md}
    make bench-train ARGS="--check"       and fail where a target is missed

The run is `configs.runs.bench_cpu`, at a constant learning rate, on one CPU device. Both start from the same parameters
and see the same batches, and every loss and gradient norm must agree. Each variant has its own process, so that memory
is its own; they take turns step by step, so that a busy machine slows both; numbers are medians. CPU seconds are user
and system time of the process: they tell of work, wall seconds also of how well it is spread over cores.
"""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DEPTHS = (8, 32, 64)
PARAMETERS = "parameters.npz"


class Clock:
    """Wall and CPU seconds since the last `lap`."""

    def __init__(self):
        self.lap()

    def lap(self):
        now = (time.perf_counter(), sum(os.times()[:2]))
        passed = {"wall": now[0] - self.last[0], "cpu": now[1] - self.last[1]} if hasattr(self, "last") else {}
        self.last = now
        return passed


# In a process of its own ---------------------------------------------------------------------------------------------


def prepare(connection, layers, folder):
    """Writes the parameters that both start from; sends the versions and the shape of a batch."""
    import jax
    import numpy as np
    from flaxzoo.train import mesh as meshes
    from flaxzoo.train.step import initial_state

    run = bench_run(layers)
    mesh, _ = meshes.make(run)
    with jax.set_mesh(mesh):
        params = initial_state(run, mesh)["params"]
    np.savez(folder / PARAMETERS, **jax.device_get(params))
    connection.send({"vocab": run.model.vocab, "shape": (run.batch, run.length)})


def ours(connection, layers, folder):
    """Our step, as `zoo train` runs it."""
    import jax
    import jax.numpy as jnp
    from flaxzoo.train import mesh as meshes
    from flaxzoo.train.step import initial_state, make_step

    run = bench_run(layers)
    mesh, _ = meshes.make(run)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    integers, reals = (jax.ShapeDtypeStruct((run.batch, run.length), d, sharding=whole) for d in (jnp.int32, jnp.float32))
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), integers) | {"weights": reals}
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(lambda: initial_state(run, mesh))
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
        serve(connection, lambda: make_step(run), state, batch, lambda: initial_state(run, mesh))


def plain(connection, layers, folder):
    """The step of plain.py."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import plain as model

    def params(load=jnp.asarray):
        with np.load(folder / PARAMETERS) as file:
            return jax.tree.map(lambda name: load(file[name]), model.NAMES)

    run = bench_run(layers)
    batch = {name: jax.ShapeDtypeStruct((run.batch, run.length), jnp.int32) for name in ("tokens", "targets")}
    state = jax.eval_shape(lambda: model.initial_state(params()))
    serve(connection, lambda: jax.jit(model.step, donate_argnums=0), state, batch, lambda: model.initial_state(params()))


def bench_run(layers):
    from flaxzoo.configs.runs import bench_cpu

    return bench_cpu().replace(
        **{"model.layers": layers, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
    )


def serve(connection, make_step, state, batch, make_state):
    """Compiles the step and sends what that took; then makes a step with each batch it is sent, until it gets None."""
    import jax

    clock = Clock()
    traced = make_step().trace(state, batch)
    took = {"trace": clock.lap()}
    lowered = traced.lower()
    took["lower"] = clock.lap()
    compiled = lowered.compile()
    took["compile"] = clock.lap()
    connection.send(took)
    state, places = None, {name: x.sharding for name, x in batch.items()}
    while (arrays := connection.recv()) is not None:
        state = make_state() if state is None else state
        batch = jax.block_until_ready({name: jax.device_put(arrays[name], places[name]) for name in places})
        jax.block_until_ready(state)
        clock.lap()
        state, metrics = jax.block_until_ready(compiled(state, batch))
        connection.send(clock.lap() | {name: float(metrics[name]) for name in ("loss", "gradient_norm")})
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    connection.send({"peak": peak, "planned": compiled.memory_analysis().temp_size_in_bytes})


class Child:
    """A process that runs one of the functions above."""

    def __init__(self, function, layers, folder):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=function, args=(other, layers, folder), daemon=True)
        self.process.start()
        other.close()
        self.first = self.connection.recv()

    def ask(self, message):
        self.connection.send(message)
        return self.connection.recv() if message is not None or True else None

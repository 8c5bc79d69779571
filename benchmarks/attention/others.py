"""Attention measured without a schedule: processing of masks, a million tokens compiled, and this CPU."""

import statistics
import time
from typing import Any

from cases import TOPOLOGIES, WINDOW

MASK_BLOCK = 1024


def masks(connection: Any, quick: bool) -> None:
    """Seconds and bytes of the schedules of three masks, and those of others where it does not take many minutes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flaxzoo.layers.kernels.attention import blocks
    from flaxzoo.layers.kernels.attention import pair_function as pairs
    from flaxzoo.layers.kernels.attention.masks import Causal, Documents, Window
    from programs import PACKAGES, splash_kernel

    settings = tuple({"block_q": MASK_BLOCK, "block_k": MASK_BLOCK, "compute": 512}.items())
    for length in (2**15, 2**17, 2**20):
        ids = jnp.asarray(np.repeat(np.arange(1, 65), length // 64)[None], jnp.int32)
        ours = {"causal": Causal(), "window": Causal() & Window(WINDOW), "documents": Causal() & Documents(ids)}
        for name, mask in ours.items():
            began = time.perf_counter()
            function, sizes = pairs.trace(mask.visible), pairs.Sizes(1, 1, length, length)
            hoisted = function.hoisted_values(sizes)
            found = blocks.classify(function, hoisted, sizes, MASK_BLOCK, MASK_BLOCK, kv_heads=1)
            seconds = time.perf_counter() - began
            row: dict[str, Any] = {"length": length, "mask": name, "ours": {"seconds": seconds, "bytes": found.nbytes}}
            for package in PACKAGES if name != "documents" and length <= (2**15 if quick else 2**17) else ():
                began = time.perf_counter()
                kernel = splash_kernel(package, name == "window", length, 1, "forward", settings)
                seconds = time.perf_counter() - began
                row[package] = {"seconds": seconds, "bytes": sum(x.nbytes for x in jax.tree.leaves(kernel))}
            connection.send(row)
    connection.send(None)


def million(connection: Any, quick: bool) -> None:
    """Bytes of HBM of attention to a million tokens, 8 query heads and 1 of keys, compiled for one chip."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flaxzoo.layers.kernels.attention import attend
    from flaxzoo.layers.kernels.attention.masks import Causal, Window
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    length = 2**17 if quick else 2**20
    for chip in ("v5p", "v6e"):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
        mesh = Mesh(np.array(devices[:1]), ("x",), axis_types=(AxisType.Explicit,))
        place = NamedSharding(mesh, PartitionSpec())
        q, k = (jax.ShapeDtypeStruct((1, length, n, 128), jnp.bfloat16, sharding=place) for n in (8, 1))
        for name, mask in {"causal": Causal(), "window": Causal() & Window(WINDOW)}.items():

            def forward(q: Any, k: Any, v: Any, mask: Any = mask) -> Any:
                return attend(q, k, v, mask=mask)

            def both(q: Any, k: Any, v: Any, g: Any, forward: Any = forward) -> Any:
                return jax.vjp(forward, q, k, v)[1](g)

            for which, function, arguments in (("forward", forward, (q, k, k)), ("both passes", both, (q, k, k, q))):
                began = time.perf_counter()
                with jax.set_mesh(mesh):
                    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
                    memory: Any = lowered.compile().memory_analysis()
                row = {"chip": chip, "length": length, "mask": name, "pass": which}
                row["seconds"] = time.perf_counter() - began
                row |= {
                    "arguments": memory.argument_size_in_bytes,
                    "results": memory.output_size_in_bytes,
                    "temp": memory.temp_size_in_bytes,
                }
                connection.send(row)
    connection.send(None)


def cpu(connection: Any, quick: bool) -> None:
    """Seconds and temporary bytes of ours and of `jax.nn.dot_product_attention`, in turns."""
    import jax
    import jax.numpy as jnp
    from flaxzoo.layers.kernels.attention import attend
    from flaxzoo.layers.kernels.attention.masks import Causal, Window

    functions = {
        "ours, causal": lambda q, k, v: attend(q, k, v, mask=Causal()),
        "ours, window 512": lambda q, k, v: attend(q, k, v, mask=Causal() & Window(512)),
        "jax.nn, causal": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
    }
    for length in (2048, 4096) if quick else (2048, 4096, 8192):
        q, k, v = (jax.random.normal(jax.random.key(i), (1, length, 8, 64)) for i in range(3))
        programs = {}
        for name, function in functions.items():
            gradient = jax.grad(lambda q, k, v, f=function: jnp.sum(f(q, k, v)), (0, 1, 2))
            for mode, one in (("forward", function), ("gradient", gradient)):
                programs[name, mode] = jax.jit(one).lower(q, k, v).compile()
        times = in_turns({key: lambda program=program: program(q, k, v) for key, program in programs.items()})  # noqa: B023
        for (name, mode), program in programs.items():
            temp = program.memory_analysis().temp_size_in_bytes
            row = {"length": length, "name": name, "mode": mode, "seconds": times[name, mode], "temp_bytes": temp}
            connection.send(row)
    connection.send(None)


def in_turns(calls: dict[Any, Any], turns: int = 4) -> dict[Any, float]:
    """Median seconds of each, run in turns, forwards and backwards, after one turn that does not count."""
    import jax

    times: dict[Any, list[float]] = {key: [] for key in calls}
    for turn in range(turns):
        for key in list(calls)[:: 1 - 2 * (turn % 2)]:
            began = time.perf_counter()
            jax.block_until_ready(calls[key]())
            times[key].append(time.perf_counter() - began)
    return {key: statistics.median(found[1:]) for key, found in times.items()}

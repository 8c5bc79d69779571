"""Block sizes ranked: for the TPU kernels by the schedule of the compiler, for the others by time on this machine."""

import argparse
from typing import Any

from cases import PASSES, TOPOLOGIES, Case, Pass
from others import in_turns
from search import search, stages

HEADS = {
    "64": Case("causal", 4096, 4, 4, size=64),
    "128": Case("causal", 4096, 4, 2),
    "256": Case("causal", 4096, 4, 4, size=256),
    "192/128": Case("causal", 4096, 4, 4, size=192, value_size=128),
}
"""By head dim."""
PORTABLE = (256, 512, 1024)


def jobs(results: Any, arguments: argparse.Namespace) -> list[tuple[Any, ...]]:
    """What is asked for, the chips shared out to processes."""
    there = {results.key("blocks", row) for row in results.found.get("blocks", [])}
    names = [name for name in TOPOLOGIES if name in arguments.chips.split(",")]
    wanted = [
        [
            (chip, dims, which)
            for dims in HEADS
            for chip in names[turn :: arguments.processes]
            for which in PASSES
            if not (arguments.resume and (chip, dims, which) in there)
        ]
        for turn in range(arguments.processes)
    ]
    return [(work, share) for share in wanted if share]


def work(connection: Any, wanted: list[tuple[str, str, Pass]]) -> None:
    """Sends a row for each of (chip, head dims, pass): all blocks that were tried."""
    from schedule import Compiler

    compiler = Compiler()
    try:
        from programs import ours, shipped

        for chip, dims, which in wanted:
            case = HEADS[dims]

            def measure(settings: Any, chip: str = chip, case: Case = case, which: Pass = which) -> Any:
                return compiler.measure(chip, ours, case, which, settings)

            _, tried = search(measure, [[shipped(compiler.devices(chip)[0], case)], *stages("ours", case, which)])
            connection.send({"chip": chip, "dims": dims, "pass": which, "tried": tried})
    finally:
        compiler.close()
        connection.send(None)


def here(connection: Any, quick: bool) -> None:
    """Sends seconds of `portable` for sizes of its blocks, on the CPU or GPU of this machine."""
    import jax
    import jax.numpy as jnp
    from flaxzoo.layers.kernels.attention import attend, portable
    from flaxzoo.layers.kernels.attention.masks import Causal

    def attention(q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v, mask=Causal(), implementation="portable")

    gradient = jax.grad(lambda *arrays: jnp.sum(attention(*arrays)), (0, 1, 2))
    for length in (2048,) if quick else (2048, 8192):
        arrays = [jax.random.normal(jax.random.key(i), (1, length, 8, 64)) for i in range(3)]
        calls = {}
        for block in PORTABLE:
            setattr(portable, "BLOCK", block)  # noqa: B010
            for which, function in (("forward", attention), ("gradient", gradient)):
                program = jax.jit(lambda *arrays, function=function: function(*arrays)).lower(*arrays).compile()
                calls[block, which] = lambda program=program, arrays=arrays: program(*arrays)
        for (block, which), seconds in in_turns(calls, turns=6).items():
            row = {"backend": jax.default_backend(), "length": length, "block": block, "pass": which}
            connection.send(row | {"seconds": seconds})
    connection.send(None)

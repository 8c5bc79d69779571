"""The processes of a job, as each of them sees it: which one writes, and what all of them come to know.

With one process every function here is free. With several, each process must call it at the same place.
"""

import contextvars
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_alone = contextvars.ContextVar("alone", default=False)
"""Whether only this process is where it is, and must not wait for the others."""


class RemoteError(OSError, ValueError):
    """What went wrong in another process, in its words."""


def writes() -> bool:
    """Whether this process writes files and shows progress: the first one does, for all."""
    return jax.process_index() == 0


def quiet() -> bool:
    """Whether another process shows what this one would. JAX is not started to know it."""
    return jax.distributed.is_initialized() and not writes()


def gather[T](value: T) -> list[T]:
    """What every process has, in their order; plain JSON data."""
    _assert_all_here()
    if jax.process_count() == 1:
        return [value]
    data = _encoded(value)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    rows = multihost_utils.process_allgather(_padded(data, max(sizes)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first[T](make: Callable[[], T]) -> T:
    """What `make()` returns in the first process, told to all; plain JSON data. The others wait for it meanwhile.

    Raises what `make` raises; in the other processes, `RemoteError` with its text. `make` may not ask the others.
    """
    _assert_all_here()
    if jax.process_count() == 1:
        return _made(make)
    answer: dict[str, Any] = {}
    problem: Exception | None = None
    if writes():
        try:
            answer = {"value": _made(make)}
        except Exception as error:  # the others wait: whatever it is, they must hear of it
            problem, answer = error, {"error": f"{error}"}
    data = _encoded(answer)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    told = multihost_utils.broadcast_one_to_all(_padded(data, size))
    if problem is not None:
        raise problem
    answer = json.loads(told[:size].tobytes())
    if "error" in answer:
        raise RemoteError(answer["error"])
    return answer["value"]


def check_same(what: dict[str, str]) -> None:
    """Raises ValueError unless `what`, values by name, is the same in every process; names what differs and where."""
    everywhere = gather(what)
    for name, value in everywhere[0].items():
        others = [index for index, each in enumerate(everywhere) if each.get(name) != value]
        if others:
            raise ValueError(
                f"all processes must have the same {name}, but process 0 has {value} and process {others[0]} "
                f"{everywhere[others[0]].get(name)} ({len(others)} of {len(everywhere)} differ); start all with "
                "the same command, the same version of flaxzoo and the same files"
            )


def largest(number: Callable[[], int], mesh: Mesh) -> Callable[[], int]:
    """The largest of the processes' numbers, computed on the devices of the (ambient) mesh, in the background.

    It is waited for where what is returned is called. One process alone reads its number there, and no earlier.
    """
    _assert_all_here()
    if jax.process_count() == 1:
        return number
    own = np.full(1, number(), np.int32)
    places = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    numbers = jax.make_array_from_callback((mesh.size,), places, lambda index: own)
    found = _max(numbers)
    return lambda: int(found)


@jax.jit
def _max(numbers: jax.Array) -> jax.Array:
    return jnp.max(numbers)


def _made[T](make: Callable[[], T]) -> T:
    token = _alone.set(True)
    try:
        return make()
    finally:
        _alone.reset(token)


def _assert_all_here() -> None:
    """Also with one process, where it would do no harm: the fault is found without several."""
    assert not _alone.get(), "what the first process makes for all may not ask the others: they wait for it"


def _encoded(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _padded(data: np.ndarray, size: int) -> np.ndarray:
    """`data` with zeros behind it, up to a power of two that is at least `size`: few sizes, few compilations."""
    padded = np.zeros(1 << max(10, int(size - 1).bit_length()), np.uint8)
    padded[: min(size, data.size)] = data[:size]
    return padded

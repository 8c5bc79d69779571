"""One token of every row into a cache, by each platform's own way."""

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.kernels import cache_update as cache_update
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

WAYS = {
    "tiles": lambda *x: cache_update.write_tiles(*x, interpret=pltpu.InterpretParams(detect_races=True)),
    "all": cache_update.write_all,
    "each": cache_update.write_mapped,
    "in turn": cache_update.write_in_loop,
}


def numbers(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (50 * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


VECTORS, SCALES = [(5, 2, 64, 64), (4, 2, 64, 64), (4, 1, 96, 128), (3, 2, 20, 8)], (4, 3, 64)
CASES = [
    *((way, shape) for way in ("tiles", "each", "in turn") for shape in VECTORS),
    *((way, SCALES) for way in ("all", "each", "in turn")),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize(("way", "shape"), CASES)
def test_a_token_of_every_row(shape: tuple[int, ...], dtype: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also past the end, where nothing is written, and where not all rows are taken at once."""
    monkeypatch.setattr(cache_update, "ROWS_AT_ONCE", 2)
    old, new = numbers(0, shape, dtype), numbers(1, (*shape[:2], 1, *shape[3:]), dtype)
    index = np.array([shape[2] - 1, 0, shape[2], 17, 16][: shape[0]], np.int32)
    wanted = np.array(old)
    for row, slot in enumerate(index):
        if slot < shape[2]:
            wanted[row, :, slot] = np.asarray(new)[row, :, 0]
    found = jax.jit(WAYS[way])(old, new, jnp.asarray(index))
    assert found.dtype == old.dtype
    np.testing.assert_array_equal(np.asarray(found), wanted)


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64 alone")
@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 600), ("int8", 8)])
def test_tpus_write_in_place(dtype: str, rows: int) -> None:
    """The cache that goes in is the one that comes out, and no copy of it is made on the way."""
    host = {"chips_per_host_bounds": (1, 1, 1)}
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", **host).devices[0]
    mesh = jax.make_mesh((1,), ("x",), devices=[device])
    place = NamedSharding(mesh, PartitionSpec())

    def made(shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    arguments = made((rows, 1, 8192, 128), dtype), made((rows, 1, 1, 128), dtype), made((rows,), jnp.int32)
    with jax.set_mesh(mesh):
        program = jax.jit(cache_update.write_token, donate_argnums=0).trace(*arguments).lower().compile()
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert text is not None
    assert "attention_put" in text
    size = rows * 8192 * 128 * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < 2**20

"""Checkpoints: what was saved comes back, on any mesh, after any kill, or an error says what is wrong."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.train.checkpoints import array_store, manifest, step_folders
from flaxzoo.train.checkpoints.checkpoints import (
    Checkpoints,
    DamagedCheckpoint,
    SaveFailed,
    check_space,
    required_bytes,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding


class Moments(NamedTuple):
    count: Any
    mu: Any


def mesh_of(*sizes: int) -> Mesh:
    count = int(np.prod(sizes))
    return Mesh(np.array(jax.devices()[:count]).reshape(sizes), ("fsdp", "tensor")[: len(sizes)])


def state_of(step: int, *, rows: int = 64) -> dict[str, Any]:
    weights = (jnp.arange(rows * 16, dtype=jnp.float32) * (step + 1)).reshape(rows, 16)
    return {
        "params": {"blocks": [{"kernel": weights}, {"kernel": -weights}], "embed": weights.astype(jnp.bfloat16)},
        "opt": (Moments(jnp.int32(step), {"codes": (weights % 100).astype(jnp.int8)}), ()),
        "step": jnp.int32(step),
        "key": jax.random.key(step),
        "streams": jax.random.split(jax.random.key(step, impl="rbg"), 8),
        "empty": jnp.zeros((0, 4)),
    }


def shapes_of(state: Any, sharding: Any = None) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype, path
        np.testing.assert_array_equal(plain(left), plain(right), err_msg=str(path))


def saved(folder: Path, *steps: int, **options: Any) -> None:
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"data": {"next": step}})


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# What was saved comes back.


def test_state_and_extra_come_back(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state_of(3), {"data": {"next": 7}, "loss": 2.5})
        state, extra = checkpoints.restore(shapes_of(state_of(0)))
        assert checkpoints.steps() == [3]
        assert checkpoints.extra() == extra == {"data": {"next": 7}, "loss": 2.5}
    assert_same(state, state_of(3))
    assert not state["step"].committed  # it may meet arrays of any mesh
    assert jax.random.bits(state["key"]) == jax.random.bits(jax.random.key(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "3"]


def test_python_and_numpy_leaves(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        array = np.arange(4, dtype=np.float32)
        checkpoints.save(0, {"scalars": [2, 0.5, True], "array": array}, {})
        array[:] = -1
        target = {"scalars": [jnp.int32(0), jnp.float32(0), jnp.bool_(False)], "array": jnp.zeros(4)}
        state, _ = checkpoints.restore(target)
        assert_same(state, {"scalars": [jnp.int32(2), jnp.float32(0.5), jnp.bool_(True)], "array": jnp.arange(4.0)})
        for leaf in (np.arange(3, dtype=np.int64), "text", object()):
            with pytest.raises(ValueError, match="must be jax arrays"):
                checkpoints.save(1, {"leaf": leaf}, {})
        with pytest.raises(ValueError, match="twice"):
            checkpoints.save(1, {"a": {"b.c": jnp.zeros(1), "b": {"c": jnp.ones(1)}}}, {})
        with pytest.raises(ValueError, match="names made of letters"):
            checkpoints.save(1, {"../a": jnp.zeros(1)}, {})
        with pytest.raises(ValueError, match="plain JSON"):
            checkpoints.save(1, {"a": jnp.zeros(1)}, {"array": jnp.zeros(1)})
        assert checkpoints.steps() == [0]


@pytest.mark.parametrize("sizes", [(4, 2), (8,), (1,)])
def test_restores_onto_another_mesh(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    rows = NamedSharding(mesh_of(8), PartitionSpec("fsdp"))
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, rows) if leaf.ndim and leaf.size else leaf, state_of(5))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
        spec = PartitionSpec(*("fsdp", "tensor")[: len(sizes)])

        def target_of(leaf: jax.Array) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh_of(*sizes), spec if leaf.ndim == 2 else PartitionSpec())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        target = jax.tree.map(target_of, state)
        restored, _ = checkpoints.restore(target)
    assert_same(restored, state_of(5))
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_restores_onto_one_device(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    device = SingleDeviceSharding(jax.devices()[3])
    restored, _ = Checkpoints(tmp_path, read_only=True).restore(shapes_of(state_of(0), device))
    assert_same(restored, state_of(2))
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {device}


@pytest.mark.parametrize("devices", [1, 8])
def test_state_may_be_donated_right_after_save(tmp_path: Path, devices: int) -> None:
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), state), donate_argnums=0)
    rows = NamedSharding(mesh_of(devices), PartitionSpec("fsdp"))
    state = {"w": {str(i): jax.device_put(jnp.zeros((1024, 512)), rows) for i in range(4)}, "step": jnp.int32(0)}
    with Checkpoints(tmp_path, keep_last=100) as checkpoints:
        for step in range(6):
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = advance(state)
        target = shapes_of(state)
        for step in checkpoints.steps():
            restored, _ = checkpoints.restore(target, step)
            assert {float(value) for leaf in jax.tree.leaves(restored) for value in np.unique(leaf)} == {3.0 * step}
        assert checkpoints.steps() == [0, 1, 2, 3, 4, 5]


def test_subtree_needs_only_its_own_files(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    shutil.rmtree(tmp_path / "1" / "state" / "opt")
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert_same(checkpoints.restore_subtree("params", shapes_of(state_of(0)["params"])), state_of(1)["params"])
    assert checkpoints.restore_subtree("step", jnp.int32(0)) == 1
    with pytest.raises(DamagedCheckpoint, match=r"state/opt/\S+: missing"):
        checkpoints.restore(shapes_of(state_of(0)))
    with pytest.raises(ValueError, match="has empty, key, opt, params, step, streams, but no 'ema'"):
        checkpoints.restore_subtree("ema", jnp.int32(0))


def test_a_target_that_does_not_fit_is_named_leaf_by_leaf(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    target = shapes_of(state_of(0))
    target["params"]["blocks"][1]["kernel"] = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    target["params"]["new"] = target["params"].pop("embed")
    target["streams"] = shapes_of(jax.random.split(jax.random.key(0), 8))
    with pytest.raises(ValueError) as caught:
        Checkpoints(tmp_path, read_only=True).restore(target)
    for line in (
        "1 not in the checkpoint: params/new bfloat16[64,16]",
        "1 not in the target: params/embed bfloat16[64,16]",
        "2 of another shape or dtype: params/blocks/1/kernel was saved as float32[64,16], the target is float32[64,8]",
        "streams was saved as key<rbg>[8], the target is key<threefry2x32>[8]",
    ):
        assert line in str(caught.value)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_a_program_that_fails_finishes_its_save(tmp_path: Path) -> None:
    program = """
import sys, jax.numpy as jnp
from pathlib import Path
from flaxzoo.train.checkpoints.checkpoints import Checkpoints
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(1, {"w": jnp.ones((2048, 2048))}, {})
    sys.exit(3)
"""
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (3, "", "")
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]


def test_what_is_not_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none", read_only=True)
    assert checkpoints.steps() == []
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoints.restore({})
    with pytest.raises(ValueError, match="read_only"):
        checkpoints.save(0, state_of(0), {})
    saved(tmp_path, 1, 2)
    with pytest.raises(ValueError, match=r"steps \[1, 2\], but none of step 3"):
        Checkpoints(tmp_path, read_only=True).restore({}, step=3)


def test_saving_is_asynchronous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = manifest.seal
    monkeypatch.setattr(manifest, "seal", lambda *args: (time.sleep(0.5), seal(*args)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"step": jnp.int32(0)}, {})
        assert checkpoints.steps() == []
        checkpoints.wait()
        assert checkpoints.steps() == [0]
        checkpoints.save(1, {"step": jnp.int32(1)}, {}, wait=True)
        assert checkpoints.steps() == [0, 1]


def test_orbax_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        saved(tmp_path, 1)
        Checkpoints(tmp_path, read_only=True).restore(shapes_of(state_of(0)))
    assert [record for record in caplog.records if record.name == "absl"] == []
    assert capfd.readouterr() == ("", "")


# Which of them stay.


def test_last_and_best_stay(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        kept = []
        for step, loss in enumerate([3.0, 1.0, float("nan"), None, 2.0, 1.0, 4.0, 5.0, 0.5]):
            checkpoints.save(step, {"step": jnp.int32(step)}, {}, loss=loss, wait=True)
            kept.append(checkpoints.steps())
    assert kept == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [5, 6], [5, 6, 7], [7, 8]]
    saved(tmp_path / "last", 1, 2, 3, keep_last=1, keep_best=0)
    assert Checkpoints(tmp_path / "last", read_only=True).steps() == [3]


def test_saving_again_replaces_and_ends_what_came_after(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep_last=3)
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        checkpoints.save(2, state_of(20), {"again": True}, wait=True)
        assert checkpoints.steps() == [1, 2]
        state, extra = checkpoints.restore(shapes_of(state_of(0)))
    assert_same(state, state_of(20))
    assert extra == {"again": True}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Checkpoints(tmp_path):
        with pytest.raises(SaveFailed, match="written to by another job"):
            Checkpoints(tmp_path)
        Checkpoints(tmp_path, read_only=True)
    Checkpoints(tmp_path).close()


# Damage.


def test_every_kind_of_damage_is_found(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 1, 2, 3, keep_last=3)
    folder = tmp_path / "checkpoints" / "3"
    data = largest_file(folder)
    name = str(data.relative_to(folder))

    def check(file: str, problem: str) -> None:
        with pytest.raises(DamagedCheckpoint) as caught:
            Checkpoints(folder.parent, read_only=True).restore(shapes_of(state_of(0)))
        assert (caught.value.step, caught.value.previous) == (3, 2)
        assert f"step 3 in {folder.parent} is damaged: {file}: {problem}" in str(caught.value)
        assert f"the last whole one is step 2: `zoo train {tmp_path} --step 2 --yes`" in str(caught.value)

    shutil.copytree(folder, tmp_path / "intact")
    for path, damage, problem in [
        (name, flip_byte, "checksum"),
        (name, lambda path: os.truncate(path, 10), "size 10 bytes"),
        (name, Path.unlink, "missing"),
        ("extra.json", flip_byte, "checksum"),
        ("manifest.json", flip_byte, ""),
        ("manifest.json", lambda path: path.write_text("{"), "not readable"),
    ]:
        damage(folder / path)
        check(path, problem)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "intact", folder)
    assert_same(Checkpoints(folder.parent, read_only=True).restore(shapes_of(state_of(0)))[0], state_of(3))


def test_previous_is_the_last_that_verifies(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep_last=3)
    for step in (2, 3):
        flip_byte(largest_file(tmp_path / str(step)))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(DamagedCheckpoint, match="--step 1 --yes`") as caught:
        checkpoints.restore(shapes_of(state_of(0)))
    assert caught.value.previous == 1
    assert_same(checkpoints.restore(shapes_of(state_of(0)), step=1)[0], state_of(1))
    flip_byte(largest_file(tmp_path / "1"))
    with pytest.raises(DamagedCheckpoint, match="no other checkpoint there is whole") as caught:
        checkpoints.restore(shapes_of(state_of(0)))
    assert caught.value.previous is None


def test_folders_that_are_no_checkpoints_are_not_listed(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "9").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps() == [1]
    assert_same(checkpoints.restore(shapes_of(state_of(0)))[0], state_of(1))
    with pytest.raises(DamagedCheckpoint, match=r"manifest.json: missing"):
        checkpoints.restore(shapes_of(state_of(0)), step=9)


# Kills.

LOOP = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from flaxzoo.train.checkpoints.checkpoints import Checkpoints

def state_of(step):
    return {"params": {"w": jnp.full((1024, 512), step, jnp.float32)}, "opt": {"m": jnp.full((1024, 512), -step)},
            "step": jnp.int32(step)}

with Checkpoints(Path(sys.argv[1]), keep_last=2, keep_best=1) as checkpoints:
    step = 0
    if checkpoints.steps():
        state, extra = checkpoints.restore(jax.eval_shape(lambda: state_of(0)))
        step = int(state["step"])
        assert extra == {"step": step}
    print("open", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_of(step), {"step": step}, loss=1 / step)
        print("whole", step - 1, flush=True)
"""


def killed(folder: Path, delay: float) -> tuple[int, str]:
    """Runs the loop on `folder` and kills it `delay` seconds after its first save; the last step it saw whole."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-W", "error", "-c", LOOP, str(folder)]
    loop = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert loop.stdout is not None
    first = [loop.stdout.readline(), loop.stdout.readline()]
    time.sleep(delay)
    loop.send_signal(signal.SIGKILL)
    rest, noise = loop.communicate()
    assert loop.returncode == -signal.SIGKILL, noise
    return int((first + [line for line in rest.splitlines(keepends=True) if line.endswith("\n")])[-1].split()[1]), noise


def kill_often(folder: Path, kills: int, seed: int) -> None:
    source = random.Random(seed)
    half_written = 0
    for _ in range(kills):
        whole, noise = killed(folder, source.uniform(0, 0.4))
        assert noise == ""
        checkpoints = Checkpoints(folder, read_only=True)
        steps = checkpoints.steps()
        assert len(steps) >= min(whole, 2)
        assert not whole or steps[-1] in (whole, whole + 1, whole + 2)
        for step in steps:
            target = {"params": {"w": jnp.zeros((1024, 512))}, "opt": {"m": jnp.zeros((1024, 512), jnp.int32)}}
            state, extra = checkpoints.restore(target | {"step": jnp.int32(0)}, step)
            assert [int(value) for leaf in jax.tree.leaves(state) for value in np.unique(leaf)] == [-step, step, step]
            assert extra == {"step": step}
        half_written += len([path for path in folder.iterdir() if path.suffix in (".partial", ".deleted")])
        Checkpoints(folder).close()
        assert {path.name for path in folder.iterdir()} == {".lock", *map(str, steps)}
    assert half_written, "no kill fell into a save"


def test_kills_leave_whole_checkpoints(tmp_path: Path) -> None:
    kill_often(tmp_path, kills=4, seed=int(time.time()))


@pytest.mark.slow
def test_many_kills_leave_whole_checkpoints(tmp_path: Path) -> None:
    kill_often(tmp_path, kills=25, seed=int(time.time()))


def test_killed_while_one_is_replaced_or_deleted(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep_last=3)
    (tmp_path / "2").rename(tmp_path / "2.replaced")  # killed before the new one had the name
    shutil.copytree(tmp_path / "3", tmp_path / "3.replaced")  # killed before the old one was deleted
    (tmp_path / "1").rename(tmp_path / "1.deleted")
    (tmp_path / "2.partial").mkdir()
    Checkpoints(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "2", "3"]
    assert_same(Checkpoints(tmp_path, read_only=True).restore(shapes_of(state_of(0)), 2)[0], state_of(2))


# Disks that are full or do not let us.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("a small file system can be mounted only by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


BIG = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}


def big(value: float) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(int(value)), (1024, 1024))}


def test_a_full_disk_is_seen_before_anything_is_written(small_disk: Path) -> None:
    with Checkpoints(small_disk / "checkpoints") as checkpoints:
        checkpoints.save(1, big(1), {}, wait=True)
        with pytest.raises(SaveFailed) as caught:
            checkpoints.save(2, big(2), {})
        free = step_folders.free(small_disk)
        message = f"cannot save the checkpoint of step 2 in {small_disk}/checkpoints: no space left on the device; "
        numbers = f"{required_bytes(BIG):,} bytes are needed and {free:,} are free there"
        assert message + numbers in str(caught.value)
        assert "the last whole checkpoint is step 1, still intact. Free space there" in str(caught.value)
        assert f"then `zoo train {small_disk}` continues" in str(caught.value)
        assert checkpoints.steps() == [1]


def test_a_disk_that_fills_up_while_a_save_is_written(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(1, big(1), {}, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(step_folders, "free", lambda folder: 10**9)
        checkpoints.save(2, big(2), {})
    with pytest.raises(SaveFailed, match=r"step 2 in .*no space left on the device; .*whole checkpoint is step 1"):
        checkpoints.save(3, {"w": jnp.zeros(4)}, {})
    assert sorted(path.name for path in small_disk.iterdir()) == [".lock", "1"]
    checkpoints.save(3, {"w": jnp.zeros(4)}, {})  # the error was reported once; a small one fits
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]
    np.testing.assert_array_equal(checkpoints.restore(BIG, 1)[0]["w"], big(1)["w"])
    Checkpoints(small_disk).close()
    assert capfd.readouterr() == ("", "")


def test_a_read_only_disk(small_disk: Path) -> None:
    saved(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SaveFailed, match=r"Read-only file system; .* whole checkpoint is step 1"):
        Checkpoints(small_disk)
    with pytest.raises(SaveFailed, match="not a folder that can be written"):
        check_space(small_disk, state_of(0), copies=1)
    assert_same(Checkpoints(small_disk, read_only=True).restore(shapes_of(state_of(0)))[0], state_of(1))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveFailed, match=r"Not a directory; .* no checkpoint is whole yet"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(SaveFailed, match=r"file is not a folder that can be written"):
        check_space(tmp_path / "file" / "checkpoints", state_of(0), copies=1)


@pytest.mark.parametrize("ending", ["save", "wait", "close", "restore"])
def test_an_error_in_the_background_surfaces_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.zeros(4)}, {}, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "seal", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        checkpoints.save(2, {"a": jnp.zeros(4)}, {})
        actions = {
            "save": lambda: checkpoints.save(3, {"a": jnp.zeros(4)}, {}),
            "wait": checkpoints.wait,
            "close": checkpoints.close,
            "restore": lambda: checkpoints.restore({"a": jnp.zeros(4)}),
        }
        with pytest.raises(SaveFailed, match=r"step 2 in .*: OSError: Input/output error; .* is step 1, still intact"):
            actions[ending]()
    checkpoints.close()
    assert checkpoints.steps() == [1]


def test_space_is_checked_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path / "run" / "checkpoints", BIG, copies=4)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(step_folders, "free", lambda folder: 10**7)
    check_space(tmp_path, BIG, copies=2)
    with pytest.raises(SaveFailed, match=r"3 copies of the state .*10,000,000 are free there; no checkpoint is whole"):
        check_space(tmp_path, BIG, copies=3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, big(1), {})
    check_space(tmp_path, BIG, copies=3)  # the one that is there makes room


def test_required_bytes_hold_a_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    used = sum(path.stat().st_size for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert used < required_bytes(shapes_of(state_of(1))) == required_bytes(state_of(1))
    assert required_bytes(big(1)) < 1.05 * 4 * 1024**2


def test_the_format_on_disk(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    record = json.loads((tmp_path / "1" / "manifest.json").read_text())["content"]
    assert (record["format"], record["step"], record["loss"]) == (1, 1, None)
    assert record["leaves"]["opt/0/mu/codes"] == ["int8", [64, 16]]
    assert array_store.describe(state_of(1)) == record["leaves"]
    path = tmp_path / "1" / "manifest.json"
    newer = record | {"format": 2}
    path.write_text(json.dumps({"content": newer, "checksum": manifest._checksum_of(newer)}))
    with pytest.raises(ValueError, match="format 2, this flaxzoo reads format 1"):
        Checkpoints(tmp_path, read_only=True).extra()

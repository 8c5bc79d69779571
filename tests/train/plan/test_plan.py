"""Plans of training jobs: what is read off compiled programs, against what arithmetic says."""

import io
import json
import math
import runpy
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import pytest
from flaxzoo import configs
from flaxzoo.configs import Optimizer, Run, models
from flaxzoo.train.commands import cli
from flaxzoo.train.distributed import hardware
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.train.plan import chips as chips_module
from flaxzoo.train.plan import hlo
from flaxzoo.train.plan import report as plan_report
from flaxzoo.train.plan import search as plan_search
from flaxzoo.train.plan.chips import TOPOLOGIES, chip_of, slice_of, tpus
from flaxzoo.train.plan.kernels import Kernels, grouped_seconds, outer_seconds, put_seconds, visits
from flaxzoo.train.plan.plan import Memory, Plan, _missing, devices_of, first_that_fits, plan, remedies
from flaxzoo.train.plan.time import Time, Traffic, time_of
from flaxzoo.zoo.parameters import describe
from rich.console import Console

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64 alone")
MODEL = models.small(vocab=1024, dim=256, layers=4, heads=4, kv_heads=2, hidden=512)
TEXT = """HloModule jit_step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %work = f32[8]{0} fusion(%p), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"1500"}
  %all-gather-start.1 = (bf16[4,16]{1,0}, bf16[16,16]{1,0}) all-gather-start(%work), replica_groups=[2,4]<=[4,2]T(1,0)
  %more = f32[8]{0} fusion(%p), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"3000"}
  %done = bf16[16,16]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %t = (s32[], f32[8]) tuple(%p, %work)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %twelve = s32[]{:T(128)} constant(12)
  %index = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%index, %twelve), direction=LT
}

%scatter (q: bf16[64,16]) -> bf16[8,16] {
  %q = bf16[64,16]{1,0} parameter(0)
  %all-reduce.2 = bf16[64,16]{1,0} all-reduce(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %cut = bf16[8,16]{1,0} dynamic-slice(%all-reduce.2), dynamic_slice_sizes={8,16}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %attention_forward.3 = (bf16[1,8]{1,0}) custom-call(%x), custom_call_target="tpu_custom_call"
  %loop = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%body
  %fusion.7 = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%scatter
  ROOT %sum = f32[] all-reduce(%x), replica_groups=mesh['data'=4,'fsdp'=2] {'data'}, to_apply=%add
}
"""


def plan_of(job: Run, *, time: Time | None, **changes: Any) -> Plan:
    """A plan that nothing was compiled for."""
    slice_: dict[str, Any] = {"topology": "v5e:2x2", "chip": tpus()["TPU v5 lite"], "mesh": {"fsdp": 1}}
    return Plan(job, **{**slice_, "memory": Memory(2**34), **changes}, time=time)


def run(**changes: object) -> Run:
    return Run(model=MODEL, batch=8, length=256, dtype="bfloat16", **changes)  # pyright: ignore[reportArgumentType]


def timed(text: str, rounds: int | None = None, mesh: dict[str, int] | None = None) -> Time:
    chip, mesh = tpus()["TPU v5 lite"], mesh or {"data": 4, "fsdp": 2}
    kernels = Kernels(MODEL, chip, mesh, 8 * 256)
    return time_of(
        hlo.Program(text), chip, mesh, kernels.training(256), lambda op: rounds if op.code == "while" else None
    )


def test_a_program_is_walked_with_the_counts_of_its_loops() -> None:
    program = hlo.Program(TEXT)
    times = {op.name: count for op, count in program.walk()}
    assert times["work"] == times["done"] == 12
    assert times["loop"] == times["fusion.7"] == 1
    assert "q" not in times  # a fusion is one operation
    assert next(op for op, _ in program.walk() if op.kernel).kernel == "attention_forward"


def test_the_time_of_a_program_is_that_of_its_parts() -> None:
    chip = tpus()["TPU v5 lite"]
    found = timed(TEXT)
    assert found.compute == pytest.approx(12 * 4500 / 1.5e9)
    assert set(found.traffic) == {("all-gather", "data"), ("reduce-scatter", "data+fsdp"), ("all-reduce", "data")}
    gathered = found.traffic["all-gather", "data"]
    # The tuple of a start holds the part of 4 rows and the whole of 16; a chip sends three quarters of the whole.
    assert gathered.bytes == pytest.approx(12 * 0.75 * 16 * 16 * 2)
    assert gathered.exposed == pytest.approx(12 * max(0.0, gathered.seconds / 12 - 3000 / 1.5e9))
    scattered = found.traffic["reduce-scatter", "data+fsdp"]
    assert scattered.bytes == pytest.approx(7 / 8 * 64 * 16 * 2)
    assert scattered.exposed == pytest.approx(scattered.seconds)
    assert found.seconds == pytest.approx(found.compute + found.attention + found.communication)
    # One forward pass of attention for four layers: a quarter of what all would take.
    flops = 4 * 4 * 64 * (256 - 1) / 2 * 8 * 256 * 4 / 8
    assert found.attention == pytest.approx(flops / 4 / (chip.attention[0] * chip.tflops * 1e12))


def test_stages_do_not_share_a_layer() -> None:
    found = [timed(TEXT, mesh=mesh) for mesh in ({"data": 8}, {"pipeline": 4, "data": 2})]
    assert found[1].attention == pytest.approx(4 * found[0].attention)


@pytest.mark.parametrize(
    ("text", "axes", "count"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", "fsdp", 2),
        ("replica_groups=[4,2]<=[8]", "tensor", 2),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", "data+tensor", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", "data+fsdp", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'tensor','data'}", "data+tensor", 4),
        ("source_target_pairs={{0,4},{4,0}}", "data", 2),
        ("channel_id=3", "data+fsdp+tensor", 8),
    ],
)
def test_the_axes_of_a_collective(text: str, axes: str, count: int) -> None:
    op = hlo.Operation("x", "f32[8]", "all-gather", f"%y), {text}, dimensions={{0}}")
    assert op.group({"data": 2, "fsdp": 2, "tensor": 2}) == (axes, count)


def test_what_goes_to_the_host_has_no_model() -> None:
    line = "  %away = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%x)\n  ROOT %sum"
    assert timed(TEXT.replace("  ROOT %sum", line)).unknown == ["copies to and from the host"]


def test_numbers_of_8_bits_have_bytes() -> None:
    assert [hlo.bytes_of(kind, "8,128") for kind in ("f8e4m3fn", "f8e5m2", "s8", "s4")] == [1024, 1024, 1024, 512]
    usual = configs.get_run("bench_cpu")
    line = plan_report.train_line("bench_cpu", usual.replace(quantize="int8", mesh="fsdp=4"), usual)
    assert line == "zoo train bench_cpu --quantize int8 --mesh fsdp=4"


def test_what_has_no_model_gets_no_time() -> None:
    text = TEXT.replace("direction=LT", "direction=NE")
    found = timed(text.replace("attention_forward", "mystery"))
    assert found.unknown == ["mystery", "a loop of unknown length"]
    made = plan_of(run(), mesh={"data": 4, "fsdp": 2}, topology="v5e:2x4", memory=Memory(1e9), time=found)
    with pytest.raises(ValueError, match="no model of the time of mystery, a loop of unknown length"):
        _ = made.tokens_per_second
    shown = io.StringIO()
    plan_report.page(made, Console(file=shown, width=200))
    assert "No time is reported: there is no model of mystery, a loop of unknown length." in shown.getvalue()
    # Of a loop of the entry it may be given how often it runs.
    assert timed(text, rounds=12).seconds == pytest.approx(timed(TEXT).seconds)
    assert "step_seconds" not in json.loads(plan_report.json_of(made))


def test_a_conditional_is_the_branch_that_it_takes() -> None:
    """One alone, as is left of a choice between platforms, or that of a number which is in the program."""
    branch = (
        '\n%left (p: f32[8]) -> f32[8] {\n  %spent = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"3"}\n}\n'
    )
    text = TEXT.replace("\nENTRY", f"{branch}{branch.replace('left', 'right').replace('spent', 'more')}\nENTRY")
    before = timed(TEXT).compute
    for index, branches, cycles in (
        ("constant(1)", "%left, %right", 3),
        ("parameter(1)", "%left", 3),
        ("constant(0)", "%empty, %right", 0),
    ):
        line = f"  %i = s32[] {index}\n  %c = f32[8]{{0}} conditional(%i, %x), branch_computations={{{branches}}}\n"
        found = timed(text.replace("  %loop =", f"{line}  %loop ="))
        assert found.compute - before == pytest.approx(cycles / 1.5e9)
        assert found.unknown == []
    line = "  %c = f32[8]{0} conditional(%x, %x), branch_computations={%left, %right}\n"
    assert timed(text.replace("  %loop =", f"{line}  %loop =")).unknown == ["a conditional"]


COPIES = """HloModule x

%sparse (t: bf16[64,16]) -> bf16[8,16] {
  %t = bf16[64,16]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,16]{1,0} all-gather(%t), replica_groups=[1,8]<=[8], dimensions={0}
}

%looks (t: bf16[64,16]) -> bf16[8,16] {
  %u = bf16[64,16]{1,0} parameter(0)
  ROOT %gather.1 = bf16[8,16]{1,0} fusion(%u), kind=kCustom, calls=%gathers
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = bf16[64,16]{1,0} parameter(0)
  %y = f32[1024]{0} parameter(1)
  %copy-start.1 = (f32[1024]{0:T(128)S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%y)
  %work = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"1"}
  %copy-done.1 = f32[1024]{0:T(128)S(1)} copy-done(%copy-start.1)
  %offload = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%looks
  %offload.update = ((bf16[64,16]{1,0}), bf16[8,16]{1,0}) call-update(%offload, %x)
  %offload.done = bf16[8,16]{1,0} call-done(%offload.update)
  %gathering = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), to_apply=%sparse
  %gathering.update = ((bf16[64,16]{1,0}), bf16[64,16]{1,0}) call-update(%gathering, %x)
  %more = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"1500"}
  %gathered = bf16[64,16]{1,0} call-done(%gathering.update)
  %sort.1 = f32[1024]{0} sort(%y), dimensions={0}
  ROOT %put = f32[1024]{0} dynamic-update-slice(%sort.1, %x, %zero)
}
"""


def test_what_has_no_cycles_takes_its_bytes() -> None:
    chip = tpus()["TPU v5 lite"]
    found = time_of(hlo.Program(COPIES), chip, {"fsdp": 8}, lambda op, program: None)
    speed = 0.9 * 819e9
    copies = found.traffic["copies", "HBM"]
    # To the chip's own memory it is read; the call to the SparseCore reads and writes 8 rows.
    assert copies.bytes == 4 * 1024 + 2 * 2 * 8 * 16
    assert copies.count == 2
    assert copies.exposed == pytest.approx(copies.seconds - 1 / 1.5e9)
    gathered = found.traffic["all-gather", "fsdp"]  # by a call to the SparseCore as well, behind another operation
    assert gathered.bytes == pytest.approx(7 / 8 * 2 * 64 * 16)
    assert gathered.exposed == pytest.approx(gathered.seconds - 1500 / 1.5e9)
    # Sorted numbers are read and written; of an update in place, what is put there.
    assert found.untold == pytest.approx(2 * (4 * 1024 + 2 * 64 * 16) / speed)
    assert found.compute == pytest.approx(1501 / 1.5e9)


def test_the_products_of_experts_are_those_of_their_tiles() -> None:
    assert visits(4, 1, 2) == [(0, 0), (0, 1)]
    found = visits(8192, 8, 128)
    assert [place for _, place in found] == sorted(place for _, place in found)
    assert {group for group, _ in found} == set(range(8))
    assert 64 < len(found) <= 64 + 7  # each group but the first may begin within a tile
    chip = tpus()["TPU v5 lite"]
    model = configs.get_model("mixtral_8x7b")
    kernels = Kernels(model, chip, {"expert": 2, "tensor": 2}, 8192)
    line = (
        '%a, %b), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[1]{0}, s32[9]{0}, '
        'bf16[16384,4096]{1,0}, %s}, frontend_attributes={ragged_dot_tiling="128,4096,256"}'
    )
    op = hlo.Operation("ragged-dot-none.3", "bf16[16384,14336]{1,0:T(8,128)}", "custom-call", "")
    forward = hlo.Operation(op.name, op.type, op.code, line.replace("%s", "bf16[8,4096,14336]{2,1,0}"))
    # Two of eight experts a token, at an even load: 8192 rows of the 16384 that there is room for.
    assert kernels.grouped(forward) == grouped_seconds(chip, 8192, (8, 4096, 14336), [128, 4096, 256], 2)
    outer = hlo.Operation(op.name, "bf16[8,4096,14336]{2,1,0}", op.code, line.replace("%s", "bf16[16384,14336]{1,0}"))
    assert kernels.grouped(outer) == outer_seconds(chip, 8192, (8, 4096, 14336), [128, 4096, 256], 2)
    assert kernels.grouped(op) is None
    few = Kernels(model, chip, {"expert": 2, "tensor": 2}, 512)
    assert few.grouped(forward) is not None
    assert few.grouped(outer) is None  # groups that are smaller than a tile


def test_the_models_of_kernels_are_as_their_schedules() -> None:
    """Constants are measured on the first case; the others are within a quarter."""
    rows = json.loads(Path("benchmarks/results/kernels.json").read_text())["rows"]
    assert {row["chip"] for row in rows} == {chip.name for chip in tpus().values()}
    for chip in tpus().values():
        mine = [row for row in rows if row["chip"] == chip.name]
        first = {row["kind"]: row for row in reversed(mine)}
        assert chip.decode == pytest.approx(first["decode"]["share"], abs=0.006)
        assert chip.grouped == pytest.approx([first[kind]["over"] for kind in ("grouped", "outer")], abs=0.006)
        for row in (row for row in mine if row["kind"] == "put"):
            count, slots, heads = row["case"]
            assert 1e6 * put_seconds(chip, (count, heads, slots, 128), 2) == pytest.approx(row["us"], rel=0.25)
        for row in (row for row in mine if row["kind"] in ("grouped", "outer")):
            count, groups, *weights = row["case"]
            tiles = [int(size) for size in row["tiling"].split(",")]
            told = outer_seconds if row["kind"] == "outer" else grouped_seconds
            if row["kind"] == "grouped" or count >= groups * tiles[0]:
                seconds = told(chip, count, (groups, *weights), tiles, 2)
                assert 1e6 * seconds == pytest.approx(row["us"], rel=0.25)


@needs_libtpu
@pytest.mark.parametrize(
    "topology", ["v5e:2x2", *(pytest.param(f"colab-{c}", marks=pytest.mark.slow) for c in ("v5e", "v6e"))]
)
def test_a_plan_adds_up(topology: str) -> None:
    found = plan(run(remat="full"), topology)
    count = math.prod(found.mesh.values())
    size = sum(known.size for known in describe(MODEL.abstract()).values())
    # All matrices are split; vectors are not.
    assert 4 * size / count <= found.memory.parameters < 4.1 * size / count
    assert found.memory.optimizer >= 2 * found.memory.parameters
    assert found.fits
    assert found.memory.used < found.memory.capacity
    assert found.time is not None
    assert found.time.unknown == []
    assert found.time.attention > 0
    assert 0.02 < found.mfu < 1
    gathered = found.time.traffic.get(("all-gather", "fsdp"), Traffic()).bytes
    if count == 1:
        assert set(found.time.traffic) <= {("copies", "HBM")}
    else:  # in bfloat16: matrices of layers for the forward pass, for what is recomputed, and for the backward pass
        layers, tables = 4 * (2 * 256 * 64 * (4 + 2) + 3 * 256 * 512), 2 * 1024 * 256
        gathered /= 2 * (count - 1) / count
        assert 2 * layers + tables <= gathered <= 3 * layers + tables
    text = io.StringIO()
    plan_report.page(found, Console(file=text, width=200), watts=100)
    for part in (f"{found.tokens_per_second:,.0f} tokens/s a chip", "fits:", "kWh a million tokens", found.chip.trust):
        assert part in text.getvalue()
    saved = json.loads(plan_report.json_of(found, usd_hour=3.6))
    assert saved["usd_per_million_tokens"] == pytest.approx(1e3 / found.tokens_per_second)
    assert saved["memory"]["used"] == found.memory.used


@needs_libtpu
@pytest.mark.slow
def test_stages_take_no_more_memory_for_more_micro_batches() -> None:
    """And what goes between them is the residual stream of each micro-batch; attention kernels run on every stage."""
    rows, count = 2, {}
    for parts in (4, 12):
        made = run(mesh="pipeline=2,fsdp=2", remat="full").replace(batch=2 * rows * parts, accumulate=parts)
        found = count[parts] = plan(made, "v5e:2x2")
        assert found.time is not None
        assert found.time.unknown == []
        moved = found.time.traffic["collective-permute", "pipeline"].bytes
        assert moved == 2 * (parts + 1) * rows * 256 * 256 * 2  # forward and back in each tick, a device's rows
        assert ("all-gather", "fsdp") in found.time.traffic
        text = io.StringIO()
        plan_report.page(found, Console(file=text, width=200))
        assert f"Each of 2 stages waits {found.bubble:.0%} of the time with accumulate={parts}" in text.getvalue()
    assert count[12].bubble == 1 / 13
    stream = rows * 256 * 256 * 2
    assert count[12].memory.used - count[12].memory.batch < count[4].memory.used - count[4].memory.batch + stream
    attention = [found.time.attention for found in count.values() if found.time]
    # A tick of a stage does two of the four layers forward, and forward again and back.
    each = attention[0] / (4 + 1)
    assert attention[1] == pytest.approx((12 + 1) * each)


@needs_libtpu
@pytest.mark.slow
def test_a_full_fine_tune_of_half_a_billion_fits_colab() -> None:
    """With adafactor, whose state is next to nothing, and nothing but matrix products kept."""
    model = configs.MODELS["qwen2_5_0_5b"]()
    made = Run(model=model, batch=4, length=1024, dtype="bfloat16", remat="full", optimizer=Optimizer(name="adafactor"))
    found = plan(made, "colab-v5e")
    assert found.fits
    assert found.memory.used < 12 * 2**30
    assert found.memory.optimizer < 0.3 * found.memory.parameters


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much_and_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = models.small(vocab=1024, dim=256, layers=4, heads=2, kv_heads=2, hidden=16384)
    made = Run(model=wide, batch=32, length=8192, dtype="bfloat16")
    found = plan(made, "v5e:1x1")
    assert not found.fits
    assert found.time is None
    assert found.memory.missing > 2**28
    assert found.memory.used == pytest.approx(found.memory.capacity + found.memory.missing)
    tried: list[Run] = []
    better = first_that_fits(made, "v5e:1x1", tried.append)
    assert better is not None
    assert better.fits
    assert better.run in tried
    assert plan_report.change_text(made, better.run).startswith("--remat ")


def test_the_mildest_remedy_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(made: Run, topology: str) -> Plan:
        missing = 0.0 if made.accumulate >= 4 else 1e9
        return plan_of(made, topology=topology, memory=Memory(2**34, missing=missing), time=None)

    monkeypatch.setattr("flaxzoo.train.plan.plan.plan", fake)
    tried: list[Run] = []
    better = first_that_fits(run(), "v5e:1x1", tried.append)
    assert better is not None
    assert better.run == tried[-1] == run(remat="full", accumulate=4)
    assert len(tried) == 4
    assert first_that_fits(run(remat="full", accumulate=8), "v5e:1x1", tried.append) is None


def test_what_the_compiler_says_is_missing() -> None:
    text = (
        "RESOURCE_EXHAUSTED: E1000: total memory required for HLO temporaries (40.39G) exceeds available HBM (15.75G)."
    )
    assert _missing(text, tpus()["TPU v5 lite"]) == pytest.approx((40.39 - 15.75) * 2**30)
    with pytest.raises(ValueError, match="the TPU compiler refuses the program: INTERNAL: no"):
        _missing("INTERNAL: no\nmore", tpus()["TPU v5 lite"])


def test_remedies_are_in_order() -> None:
    offloaded = remedies(run(remat="dots_offload"))
    assert [(other.remat, other.accumulate) for other in offloaded[:3]] == [
        ("full_offload", 1),
        ("full_offload", 2),
        ("full_offload", 4),
    ]
    texts = [plan_report.change_text(run(), other) for other in remedies(run())]
    assert texts == [
        "--remat dots",
        "--remat full",
        "--remat full --accumulate 2",
        "--remat full --accumulate 4",
        "--remat full --accumulate 8",
    ]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v6:2x4", r"unknown topology 'v6:2x4'; did you mean 'v6e:2x4'"),
        ("colab", r"did you mean 'colab-v6e' or 'colab-v5e'"),
        ("v5e:2x3", r"the first two are 1 or even, e.g. 'v5e:2x4', got 'v5e:2x3'"),
        ("v5p:3x2x2", r"the first two are 1 or even, e.g. 'v5p:2x2x1', got 'v5p:3x2x2'"),
        ("v6e:4", r"a slice has 2 or 3 sides .* got 'v6e:4'"),
        ("v5e:2y2", r"a topology is written 'v6e:2x4': a chip and the sides of a slice, got 'v5e:2y2'"),
    ],
)
def test_names_of_topologies(topology: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slice_of(topology)
    assert {slice_of(name) for name in TOPOLOGIES} == {"v5e:1x1", "v6e:1x1", "v5e:2x4"}


@needs_libtpu
def test_a_slice_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="the first two are 1 or even, .* got 'v5e:3x7'"):
        plan(run(), "v5e:3x7")
    with pytest.raises(ValueError, match="mesh fsdp=8 needs 8 devices, there are 4"):
        plan(run(mesh="fsdp=8"), "v5e:2x2")


@needs_libtpu
def test_the_table_of_chips_is_what_the_compiler_says() -> None:
    for chip in tpus().values():
        devices = devices_of(f"{chip.name}:{chip.example}")
        assert hardware.peak_flops(devices[0]) == chip.tflops * 1e12
        assert {device.device_kind for device in devices} == {chip.kind}
        assert len(devices) == chip.devices * len({tuple(device.coords) for device in devices})
        assert chip_of(f"{chip.name}:{chip.example}") == (chip, len(devices))


def test_peaks_are_those_of_a_jax_device_in_the_table() -> None:
    """MFU of a loop, plans and benchmarks read the same numbers. TPU7x has 2307 TFLOP/s a chip of two devices."""
    rows = tomllib.loads((Path(chips_module.__file__).parent / "chips.toml").read_text())
    for kind, row in rows.items():
        for name in (kind, *row.get("aliases", ())):
            assert chips_module.peak_flops(name) == row["tflops"] * 1e12, name
    names = [name for kind, row in rows.items() for name in (kind, *row.get("aliases", ()))]
    assert len(names) == len(set(names))
    for kind, chip in chips_module.chips().items():
        assert chip.tflops == rows[kind]["tflops"]
    tpu7x = chips_module.chips()["TPU7x"]
    assert tpu7x.devices * tpu7x.tflops == 2307
    for name in ("TPU v4 lite", "NVIDIA L40S", "NVIDIA H100 PCIe Gen9", "cpu"):  # no prefix of a name counts
        assert chips_module.peak_flops(name) is None
    assert hardware.peak_flops(jax.devices()[0]) is None  # a CPU


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Run, str]] = []

    def fake(made: Run, topology: str) -> Plan:
        asked.append((made, topology))
        return plan_of(made, topology=topology, time=Time(compute=0.5))

    monkeypatch.setattr(plan_report, "plan", fake)
    cli.dispatch(["plan", "qwen2_5_0_5b", "--topology", "v5e:2x2", "--remat", "dots", "--optimizer", "lion", "--json"])
    ((made, topology),) = asked
    assert (made.batch, made.length, made.remat, made.optimizer.name, topology) == (8, 1024, "dots", "lion", "v5e:2x2")
    assert json.loads(capsys.readouterr().out)["step_seconds"] == 0.5
    cli.dispatch(["plan", "shakespeare", "--topology", "colab-v5e", "--batch", "32"])
    assert asked[-1][0] == configs.get_run("shakespeare").replace(batch=32)
    assert "tokens/s a chip" in capsys.readouterr().out


def test_layouts_divide_and_are_ranked() -> None:
    made = run()
    found = list(plan_search.layouts(made, 8))
    assert len({(one.mesh, one.remat, one.accumulate) for one in found}) == len(found)
    assert {one.remat for one in found} == set(plan_search.REMATS)
    for one in found:
        sizes = meshes.parse(one.mesh)
        assert math.prod(sizes.values()) == 8
        assert made.batch // one.accumulate % (sizes.get("data", 1) * sizes.get("fsdp", 1)) == 0
        assert sizes.get("tensor", 1) in (1, 2)  # two heads of keys and values
        assert one.replace(mesh="", remat="none", accumulate=1) == made
    chip, known = tpus()["TPU v6 lite"], describe(MODEL.abstract())
    guesses = {(one.mesh, one.remat, one.accumulate): plan_search.guess(one, chip, known) for one in found}
    assert guesses["fsdp=8", "full", 1].bytes < guesses["fsdp=8", "dots", 1].bytes < guesses["fsdp=8", "none", 1].bytes
    assert guesses["fsdp=8", "full", 1].bytes < guesses["data=8", "full", 1].bytes
    assert guesses["fsdp=8", "none", 1].seconds < guesses["fsdp=8", "full", 1].seconds


def test_momentum_in_bfloat16_is_tried_where_it_is_asked_for() -> None:
    made = run()
    wide, both = list(plan_search.layouts(made, 4)), list(plan_search.layouts(made, 4, momentum=True))
    narrow = [one for one in both if one.optimizer.momentum_dtype == "bfloat16"]
    assert {one.optimizer.momentum_dtype for one in wide} == {"float32"}
    assert len(both) == 2 * len(wide) == 2 * len(narrow)
    chip, known = tpus()["TPU v6 lite"], describe(MODEL.abstract())
    size = sum(what.size for what in known.values())
    less = plan_search.guess(wide[0], chip, known).bytes - plan_search.guess(narrow[0], chip, known).bytes
    assert less == pytest.approx(2 * size / 4, rel=0.01)
    usual = configs.get_run("bench_cpu")
    line = plan_report.train_line("bench_cpu", usual.replace(**{"optimizer.momentum_dtype": "bfloat16"}), usual)
    assert line == "zoo train bench_cpu --optimizer.momentum_dtype bfloat16"


def test_the_front_is_what_nothing_beats() -> None:
    def made(speed: float, gib: float, missing: float = 0.0) -> Plan:
        chip = tpus()["TPU v5 lite"]
        memory = Memory(chip.hbm, parameters=gib * 2**30, missing=missing)
        return plan_of(run(), chip=chip, mesh={"fsdp": 4}, memory=memory, time=Time(compute=1 / speed))

    plans = [made(5, 9), made(4, 10), made(3, 4), made(2, 4), made(1, 1), made(9, 20, missing=1.0)]
    assert plan_search.pareto(plans) == [plans[0], plans[2], plans[4]]


@needs_libtpu
@pytest.mark.slow
def test_a_search_finds_what_is_no_slower_than_plain_sharding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = run(mesh="fsdp=4", remat="full")
    cli.dispatch(["plan", "bench_cpu", "--topology", "v5e:2x2", "--search", "--plot", str(tmp_path / "plan.png")])
    out = capsys.readouterr().out
    assert "layouts of v5e:2x2 ranked by arithmetic, 8 compiled" in out
    assert "zoo train bench_cpu --mesh " in out
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    ranked, plans = plan_search.search(wanted, "v5e:2x2", lambda *_: None, count=4)
    assert ranked == len(list(plan_search.layouts(wanted, 4)))
    assert plans[0].tokens_per_second >= plan(wanted, "v5e:2x2").tokens_per_second


@needs_libtpu
@pytest.mark.slow
def test_a_search_is_no_slower_than_the_layout_by_hand() -> None:
    """Minutes on two cores that have nothing else to do."""
    rows = json.loads(Path("benchmarks/results/plan.json").read_text())["rows"]
    (by_hand,) = (row for row in rows if row["job"] == "Llama 3.1 8B v6e:2x4")
    made = Run(model=configs.MODELS["llama3_1_8b"](), batch=16, length=8192, dtype="bfloat16")
    _, plans = plan_search.search(made, "v6e:2x4", lambda *_: None)
    assert plans[0].fits
    assert plans[0].tokens_per_second >= 0.999 * by_hand["tokens_per_second_per_chip"]


BENCHMARK: dict[str, Any] = runpy.run_path("benchmarks/plan.py")
RECORDED: dict[str, Any] = json.loads(Path("benchmarks/results/plan.json").read_text())


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["Llama 3.1 8B v6e:2x4", "Llama 3.1 8B v5p:2x2x2", "Llama 3 70B v6e:16x16", "Mixtral 8x7B v5p:4x4x4"],
)
def test_large_jobs_are_planned_as_recorded(name: str) -> None:
    (job,) = (job for job in BENCHMARK["JOBS"] if job.name == name)
    (recorded,) = (row for row in RECORDED["rows"] if row["job"] == name)
    found = BENCHMARK["measured"](job)
    assert found["fits"]
    assert found["time"]["unknown"] == []
    assert found["memory"]["used"] == pytest.approx(recorded["memory"]["used"], rel=0.02)
    assert found["step_seconds"] == pytest.approx(recorded["step_seconds"], rel=0.02)


def test_the_tables_of_the_docs_are_those_recorded() -> None:
    text = "".join(Path(f"docs/{name}.md").read_text() for name in ("plan", "training"))
    assert RECORDED.keys() == BENCHMARK["PARTS"].keys()
    for name, part in BENCHMARK["PARTS"].items():
        assert part.table(RECORDED[name]) in text


def test_the_options_of_a_chip_are_the_best_of_those_tried() -> None:
    best = max(RECORDED["options"], key=lambda row: row["tokens_per_second_per_chip"])
    assert best["options"] == tpus()["TPU v6 lite"].options


def test_the_layout_by_hand_is_among_those_that_are_compiled() -> None:
    """For Llama 3.1 8B on v6e:2x4, by arithmetic alone: what a search finds can't be slower than it."""
    made = Run(model=configs.MODELS["llama3_1_8b"](), batch=16, length=8192, dtype="bfloat16")
    chip, known = tpus()["TPU v6 lite"], describe(made.model.abstract())
    guesses = [plan_search.guess(one, chip, known) for one in plan_search.layouts(made, 8)]
    best = sorted((one for one in guesses if one.bytes < chip.hbm), key=lambda one: one.seconds)[:8]
    assert made.replace(mesh="fsdp=8", remat="full") in [one.run for one in best]


def test_a_search_without_a_layout_that_fits() -> None:
    with pytest.raises(ValueError, match=r"no layout fits v5e:1x1: the smallest of \d+ needs 1\d\d\.. GiB of 15.75"):
        plan_search.search(run().replace(model=configs.MODELS["llama3_1_8b"]()), "v5e:1x1", lambda *_: None)


def test_the_command_that_trains() -> None:
    made = configs.get_run("bench_cpu").replace(mesh="fsdp=4", remat="dots", accumulate=2)
    line = "zoo train bench_cpu --mesh fsdp=4 --remat dots --accumulate 2"
    assert plan_report.train_line("bench_cpu", made, configs.get_run("bench_cpu")) == line


def test_the_shares_of_attention_are_those_measured() -> None:
    rows = json.loads(Path("benchmarks/results/attention.json").read_text())["found"]["chips"]
    for chip in tpus().values():
        for which, share in zip(("forward", "backward"), chip.attention, strict=True):
            (row,) = (
                row
                for row in rows
                if (row["chip"], row["case"], row["pass"], row["who"])
                == (chip.name, "causal 4K, 32:8, 128", which, "ours")
            )
            pairs = 32 * 4096 * 4097 // 2
            flops = 2 * pairs * 128 * (2 if which == "forward" else 5)
            assert share == pytest.approx(flops / (row["us"] * 1e-6 * chip.tflops * 1e12), abs=0.006)

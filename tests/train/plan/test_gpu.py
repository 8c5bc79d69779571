"""Plans for GPUs: what is read off a program of theirs, and a real compile where the compiler is installed."""

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from flaxzoo.configs import Run, models
from flaxzoo.train.plan import plan as plans
from flaxzoo.train.plan import report as plan_report
from flaxzoo.train.plan.chips import Gpu, chips, slice_of
from flaxzoo.train.plan.hlo import Operation, Program
from flaxzoo.train.plan.kernels import Kernels
from flaxzoo.train.plan.plan import Memory, compiled, devices_of, plan
from flaxzoo.train.plan.time import Time, time_of
from flaxzoo.zoo.parameters import describe
from rich.console import Console

TEXT = (Path(__file__).parent / "h100.hlo").read_text()
MODEL = models.small(vocab=1024, dim=128, layers=1, heads=2, kv_heads=2, hidden=512)
H100 = chips()["NVIDIA H100 80GB HBM3"]


def timed(text: str, *, loops: bool = True) -> Time:
    kernels = Kernels(MODEL, H100, {"fsdp": 2}, 2 * 1024)
    told = kernels.loops(1024) if loops else None
    return time_of(Program(text), H100, {"fsdp": 2}, kernels.training(1024), told)


def fusion(flops: int, models: str) -> tuple[Operation, Program]:
    """One with a product of so many FLOPs, or none, of which the compiler's models say something."""
    program = Program(
        f"""%inside (a: bf16[{flops // 64},8]) -> bf16[{flops // 64},4] {{
  %a = bf16[{flops // 64},8]{{1,0}} parameter(0)
  %b = bf16[8,4]{{1,0}} parameter(1)
  ROOT %c = f32[{flops // 64},4]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""
    )
    line = f'%x), calls={"%inside" if flops else "%none"}, backend_config={{"reification_cost":[{models}]}}'
    return Operation("fusion.1", "f32[8,4]{1,0}", "fusion", line), program


def model(executed: float, memory: float) -> str:
    return f'{{"exec_time_us":{executed},"compute_time_us":0,"memory_access_time_us":{memory},"name":""}}'


@pytest.mark.parametrize(
    ("flops", "models", "seconds"),
    [
        (0, model(3, 2) + "," + model(2.5, 0), 2.5e-6),  # the least of what the models say
        (0, model(0, 0), 0.0),
        (0, "", None),
        (6400, model(9, 3) + "," + model(5, 4) + "," + model(7, 0), 3e-6),  # the last one does not tell bytes
        (640_000_000, model(9, 0.3), 640e6 / 989.5e12),
        (640_000_000, "", 640e6 / 989.5e12),
    ],
)
def test_an_operation_takes_its_bytes_or_its_products(flops: int, models: str, seconds: float | None) -> None:
    found = H100.seconds(*fusion(flops, models))
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_products_of_other_widths_take_other_peaks() -> None:
    op, program = fusion(6400, "")
    sixteen = program.flops(op)
    assert sixteen == 6400
    for kind, factor in (("s8", 0.5), ("f8e4m3fn", 0.5), ("f32", 2)):
        for name in ("a", "b"):
            changed = program.named[name]
            program.named[name] = Operation(name, f"{kind}[{changed.type.partition('[')[2]}", "parameter", "0)")
        assert program.flops(op) == factor * sixteen


def test_the_time_of_a_gpu_program() -> None:
    program, found = Program(TEXT), timed(TEXT)
    assert found.unknown == []
    times = {op.name: count for op, count in program.walk(Kernels(MODEL, H100, {}, 1).loops(1024))}
    (rows,) = (op for op in program.named.values() if op.code == "while" and "known_trip_count" in op.rest)
    (columns,) = (op for op in program.named.values() if op.code == "while" and op is not rows)
    (choice,) = (op for op in program.named.values() if op.code == "conditional")
    # Two rows of blocks; the first sees a block, the second two.
    assert times[columns.name] == 2
    assert times[choice.name] == pytest.approx(3, abs=0.01)
    # A block is computed without its mask: two products of 2 heads x 512 x 512 x 64.
    products = {op.name: program.flops(op) for op in program.named.values() if op.code == "fusion"}
    inside = [times[name] for name, flops in products.items() if flops == 2 * 2 * 512 * 512 * 64 and name in times]
    assert inside == [times[choice.name]] * 2
    assert found.attention > 3 * 2 * 2 * 2 * 512 * 512 * 64 / 989.5e12
    # The matrix is gathered, half of it by each, and multiplied with 1024 tokens.
    gathered = found.traffic["all-gather", "fsdp"]
    assert gathered.bytes == 128 * 128 * 2 / 2
    assert gathered.seconds == pytest.approx(gathered.bytes / 450e9 + 1e-6)
    assert products["gemm_fusion_dot.5"] == 2 * 1024 * 128 * 128
    assert found.compute > 2 * 1024 * 128 * 128 / 989.5e12


def test_kernels_of_ours_take_their_products() -> None:
    found = {}
    for name, products in (("forward", 2), ("backward_queries", 3), ("backward_keys", 4)):
        call = (
            '  %k = bf16[2,512,2,64]{3,2,1,0} custom-call(%param.26), custom_call_target="mosaic_gpu_v2", metadata='
            f'{{op_name="jit(step)/jvp()/attention_{name}/mpmd_map" scheduling_name="k"}}\n  ROOT %all-reduce.1.2'
        )
        time = timed(TEXT.replace("  ROOT %all-reduce.1.2", call), loops=False)
        assert "mosaic_gpu_v2" not in time.unknown
        found[name] = time.attention - timed(TEXT, loops=False).attention
        # A token sees half of its document, in 2 heads of 64, and a device has 1024 tokens.
        assert found[name] == pytest.approx(products * 2 * 2 * 64 * 1024 * 1023 / 2 / 989.5e12, rel=0.01)


def test_what_else_a_gpu_calls_has_no_model() -> None:
    call = '  %g = bf16[8]{0} custom-call(%param.26), custom_call_target="__cudnn$fmhaSoftmax"\n  ROOT %all-reduce.1.2'
    assert timed(TEXT.replace("  ROOT %all-reduce.1.2", call)).unknown == ["__cudnn$fmhaSoftmax"]
    # Nor have loops that are not attention's.
    assert timed(TEXT.replace("blockwise_attention", "other")).unknown == ["a loop of unknown length"]


def test_what_is_put_into_its_place_beside_the_computation_takes_its_own_bytes() -> None:
    text = """%put (stack: f32[24,8], row: f32[1,8], at: s32[]) -> f32[24,8] {
  %stack = f32[24,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  ROOT %in = f32[24,8]{1,0} dynamic-update-slice(%stack, %row, %at), metadata={}
}

ENTRY %main (a: f32[24,8], b: f32[1,8]) -> f32[24,8] {
  %a = f32[24,8]{1,0} parameter(0)
  %start = ((f32[24,8]{1,0}, f32[1,8]{1,0}), f32[24,8]{1,0}, u32[]) fusion-start(%a, %b), kind=kLoop, calls=%put
  %done = f32[24,8]{1,0} fusion-done(%start)
}
"""
    found = time_of(Program(text), H100, {"fsdp": 1}, lambda op, program: None)
    assert found.traffic["copies", "HBM"].bytes == 2 * 4 * 8
    cut = time_of(Program(text.replace("dynamic-update-slice", "dynamic-slice")), H100, {"fsdp": 1}, lambda *_: None)
    assert cut.traffic["copies", "HBM"].bytes == 2 * 4 * 24 * 8


@pytest.mark.parametrize(
    ("kind", "code", "shapes", "sent"),
    [
        ("all-gather", "-start", "((bf16[8,4]{1,0}, f32[2]{0}), (bf16[64,4]{1,0}, f32[16]{0}))", 7 / 8 * 576),
        ("all-gather", "-start", "((bf16[8,4]{1,0}), bf16[64,4]{1,0})", 7 / 8 * 512),
        ("reduce-scatter", "-start", "((bf16[64,4]{0,1}, f32[16]{0}), (bf16[8,4]{0,1}, f32[2]{0}))", 7 / 8 * 576),
        ("reduce-scatter", "", "(bf16[8,4]{1,0}, f32[2]{0})", 7 / 8 * 576),
        ("all-reduce", "-start", "((f32[16]{0}), f32[16]{0})", 2 * 7 / 8 * 64),
        ("all-reduce", "-start", "f32[16]{0}", 2 * 7 / 8 * 64),
    ],
)
def test_bytes_of_collectives(kind: str, code: str, shapes: str, sent: float) -> None:
    end = f"  %done = f32[2]{{0}} {kind}-done(%x)\n" if code else ""
    line = f"  %x = {shapes} {kind}{code}(%p), replica_groups=mesh['fsdp'=8] {{'fsdp'}}\n"
    program = Program(f"ENTRY %main (p: f32[2]) -> f32[2] {{\n{line}{end}}}\n")
    found = time_of(program, H100, {"fsdp": 8}, lambda op, program: None)
    assert found.traffic[kind, "fsdp"].bytes == pytest.approx(sent)
    assert found.traffic[kind, "fsdp"].exposed == pytest.approx(sent / 450e9 + 7e-6)


def test_a_gpu_has_what_jax_takes_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert H100.hbm == 0.75 * 79.11 * 2**30
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert H100.hbm == 0.9 * 79.11 * 2**30

    class Found:
        peak_memory_in_bytes, argument_size_in_bytes, generated_code_size_in_bytes = 7e10, 6e10, 0

    class Made:
        def compile(self, options: Any) -> "Made":
            assert options == {"xla_gpu_collect_cost_model_stats": True}
            return self

        def memory_analysis(self) -> Found:
            return Found()

        def as_text(self) -> str:
            return TEXT

    fits, not_ = Memory(7.1e10, parameters=6e10), Memory(6.9e10, parameters=6e10)
    assert compiled(Made(), fits, H100) is not None
    assert fits.temporary == 1e10
    assert compiled(Made(), not_, H100) is None
    assert not_.missing == pytest.approx(1e9)


def test_topologies_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [slice_of(text) for text in ("h100:1", "a100:8")] == ["h100:1", "a100:8"]
    for text in ("h100:16", "h200:2x4"):
        with pytest.raises(ValueError, match=f"'{text[:4]}:1' to '{text[:4]}:8', got '{text}'"):
            slice_of(text)
    monkeypatch.setattr(plans, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"plans for GPUs take the package 'jax\[cuda13\]', which is not installed"):
        devices_of("h100:8")


@pytest.mark.skipif(
    not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)), reason="needs the compiler of GPUs"
)
@pytest.mark.parametrize("topology", ["h100:1", "h100:8", "a100:2", "h200:4"])
def test_a_plan_for_gpus_adds_up(topology: str) -> None:
    made = models.small(vocab=1024, dim=256, layers=4, heads=4, kv_heads=2, hidden=512)
    found = plan(Run(model=made, batch=8, length=1024, dtype="bfloat16", remat="full"), topology)
    count = math.prod(found.mesh.values())
    assert isinstance(found.chip, Gpu)
    assert topology == f"{found.chip.name}:{count}"
    size = sum(known.size for known in describe(made.abstract()).values())
    assert 4 * size / count <= found.memory.parameters < 4.1 * size / count
    assert found.memory.tiles < 2**20
    assert found.fits
    assert found.time is not None
    assert found.time.unknown == []
    assert (("all-gather", "fsdp") in found.time.traffic) == (count > 1)
    # No faster than the products of the model at the peak, forward, again and backward.
    least = 4 * made.flops(1024) * 8 * 1024 / count / (found.chip.tflops * 1e12)
    assert found.time.busy > least
    assert 0 < found.mfu < 0.75
    assert found.time.attention > 0
    shown = io.StringIO()
    plan_report.page(found, Console(file=shown, width=200))
    assert "A step takes at least" in shown.getvalue()
    assert "took 1.5 times as long" in shown.getvalue()

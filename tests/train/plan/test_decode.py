"""Plans of generation: the program that draws tokens, compiled for chips that are not there."""

import io
import json
from importlib.util import find_spec
from typing import Any

import pytest
from flaxzoo.configs import models
from flaxzoo.train.commands import cli
from flaxzoo.train.plan import decode as plan_decode
from flaxzoo.train.plan.chips import tpus
from flaxzoo.train.plan.decode import DecodePlan, Decoding, plan_decoding
from flaxzoo.train.plan.hlo import Operation, Program
from flaxzoo.train.plan.kernels import Kernels, put_seconds
from flaxzoo.train.plan.plan import Memory
from flaxzoo.train.plan.time import Time
from flaxzoo.zoo import MLA
from flaxzoo.zoo.generation.state import STRIDE
from flaxzoo.zoo.parameters import describe
from rich.console import Console

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is for Linux on x86-64 alone")
MODEL = models.small(vocab=1024, dim=256, layers=4, heads=4, kv_heads=2, hidden=512)
SIZE = sum(known.size for known in describe(MODEL.abstract()).values())


def made(decoding: Decoding, **changes: Any) -> DecodePlan:
    memory = Memory(2**34, parameters=2 * SIZE, cache=2**20, temporary=2**20)
    given: dict[str, Any] = {"memory": memory, "time": Time(compute=3.2, attention=STRIDE * 0.1), **changes}
    return DecodePlan(decoding, topology="v5e:2x2", chip=tpus()["TPU v5 lite"], mesh={"tensor": 4}, **given)


@needs_libtpu
@pytest.mark.parametrize(("topology", "mesh", "dtype"), [("v5e:2x2", "", "bfloat16"), ("v6e:1x1", "", "int8")])
def test_a_plan_of_decoding_adds_up(topology: str, mesh: str, dtype: Any) -> None:
    found = plan_decoding(Decoding(model=MODEL, batch=8, length=2048, mesh=mesh, cache_dtype=dtype), topology)
    split = 2 if topology == "v5e:2x2" else 1  # two heads of keys and values
    assert found.mesh == {"tensor": split}
    assert found.fits
    assert 2 * SIZE / split <= found.memory.parameters < 2.1 * SIZE / split
    vectors = 2 * 4 * 8 * 2048 * 2 / split  # keys and values, layers, rows, tokens, heads
    assert found.memory.cache == vectors * (64 * 2 if dtype == "bfloat16" else 64 + 4)
    assert found.memory.used < found.memory.capacity
    assert found.time is not None
    assert found.time.unknown == []
    # Attention of four layers reads the whole cache each round, in bfloat16, and writes a token of each row before.
    chip = tpus()[found.chip.kind]
    put = 2 * 4 * put_seconds(chip, (8, 2 // split, 2048, 64), 1 if dtype == "int8" else 2)
    read = vectors * 128 / (chip.decode * chip.hbm_gbps * 1e9)
    assert found.time.attention == pytest.approx(STRIDE * (read + put), rel=0.1)
    assert found.seconds > found.least > 0
    assert ("all-reduce", "tensor") in found.time.traffic or split == 1
    assert found.largest_batch > 8
    text = io.StringIO()
    plan_decode.page(found, Console(file=text, width=200), usd_hour=3.6)
    for part in (
        f"{found.tokens_per_second:,.1f} tokens/s a chip",
        "fits:",
        f"{found.largest_batch} rows",
        "a million",
    ):
        assert part in text.getvalue()
    saved = json.loads(plan_decode.json_of(found))
    assert saved["token_seconds"] == found.seconds
    assert saved["memory"]["cache"] == found.memory.cache


@needs_libtpu
def test_caches_that_are_whole_on_every_device() -> None:
    """Those of latent attention, whose heads share one key."""
    mixer = MLA(heads=4, kv_rank=128, nope_dim=64, rope_dim=64, value_dim=64)
    model = MODEL.replace(layers=1, **{"block.0.mixer": mixer})
    found = plan_decoding(Decoding(model=model, batch=8, length=2048, mesh="tensor=4"), "v5e:2x2")
    assert found.fits
    assert found.time is not None
    assert found.time.attention > 0


@needs_libtpu
@pytest.mark.slow
def test_attention_alone_touches_the_caches() -> None:
    """No layer's cache is cut out of those of all, and written back: what XLA computes does not grow with them."""
    model = MODEL.replace(**{"block.0.mixer.head_dim": 128})
    times = [
        plan_decoding(Decoding(model=model, batch=8, length=length, mesh="tensor=2"), "v5e:2x2").time
        for length in (4096, 8192)
    ]
    assert all(times)
    short, long = [(time.attention, time.compute + time.untold) for time in times if time]
    assert long[0] > 1.5 * short[0]
    assert long[1] < 1.05 * short[1]


def test_times_are_of_one_token() -> None:
    found = made(Decoding(model=MODEL, batch=8))
    assert found.seconds == pytest.approx(0.2)
    assert found.tokens_per_second == pytest.approx(8 / 0.2 / 4)
    # Embeddings that are not the head are looked up, not read.
    tied = made(Decoding(model=MODEL.replace(tied=True), batch=8))
    apart = made(Decoding(model=MODEL.replace(tied=False), batch=8))
    assert tied.least - apart.least == pytest.approx(2 * 1024 * 256 / 4 / 819e9)
    assert found.largest_batch == int((2**34 - 2 * SIZE) / (2**21 / 8))
    unknown = made(Decoding(model=MODEL), time=Time(unknown=["mystery"]))
    with pytest.raises(ValueError, match="no model of the time of mystery"):
        _ = unknown.seconds
    text = io.StringIO()
    plan_decode.page(unknown, Console(file=text, width=200))
    assert "No time is reported: there is no model of mystery." in text.getvalue()
    assert "token_seconds" not in json.loads(plan_decode.json_of(unknown))


def test_attention_of_decoding_takes_the_bytes_of_its_cache() -> None:
    chip = tpus()["TPU v6 lite"]
    program = Program("")
    program.named["k"] = Operation("k", "bf16[8,8,8192,128]{3,2,1,0:T(8,128)(2,1)S(1)}", "fusion", "")
    line = '%k, %k), custom_call_target="tpu_custom_call"'
    kernels = Kernels(MODEL, chip, {"tensor": 8}, 8)
    size = 2 * 2 * 8 * 8 * 8192 * 128
    attention = Operation("attention_forward.1", "bf16[8,1,32,128]", "custom-call", line)
    assert kernels.decoding(attention, program) == pytest.approx(size / (chip.decode * 1640e9))
    put = Operation("attention_put.2", "bf16[8,8,8192,128]{3,2,1,0:T(8,128)(2,1)}", "custom-call", line)
    assert kernels.decoding(put, program) == put_seconds(chip, (8, 8, 8192, 128), 2) < 3e-6
    assert kernels.decoding(Operation("mystery", "bf16[8]", "custom-call", line), program) is None


def test_what_does_not_fit_is_told() -> None:
    found = made(Decoding(model=MODEL), memory=Memory(1e9, parameters=2e9, missing=1e9), time=None)
    text = io.StringIO()
    plan_decode.page(found, Console(file=text, width=200))
    assert "does not fit" in text.getvalue()
    assert "--cache-dtype int8" in text.getvalue()


def test_the_command_plans_decoding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Decoding] = []

    def fake(decoding: Decoding, topology: str) -> DecodePlan:
        asked.append(decoding)
        return made(decoding)

    monkeypatch.setattr(plan_decode, "plan_decoding", fake)
    line = ["plan", "qwen2_5_0_5b", "--topology", "v5e:2x2", "--decode", "--batch", "8", "--length", "4096"]
    line += ["--cache-dtype", "int8", "--json"]
    cli.dispatch(line)
    (decoding,) = asked
    assert (decoding.batch, decoding.length, decoding.dtype, decoding.cache_dtype) == (8, 4096, "bfloat16", "int8")
    assert json.loads(capsys.readouterr().out)["tokens_per_second_per_row"] == pytest.approx(5)
    with pytest.raises(ValueError, match="--decode plans generation, which has no use for --remat, --search"):
        cli.dispatch([*line, "--remat", "full", "--search"])
    with pytest.raises(ValueError, match="training has no cache, got --cache-dtype int8; add --decode"):
        cli.dispatch(["plan", "qwen2_5_0_5b", "--topology", "v5e:2x2", "--cache-dtype", "int8"])
    with pytest.raises(ValueError, match="rows come to 4096 tokens, the model has 1024 positions"):
        cli.dispatch(["plan", "gpt2", "--topology", "v5e:2x2", "--decode", "--length", "4096"])
    with pytest.raises(ValueError, match="rows and their tokens are at least 1, got batch=0"):
        Decoding(model=MODEL, batch=0)

"""Attention by cuDNN: what is lowered for a GPU, and on a GPU (`pytest -m gpu`) what comes out."""

import functools
import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_case import CASES, Case, assert_close, errs_no_more_than_twice, ours, outcomes, plain
from flaxzoo.layers.kernels.attention import attend, gpu
from flaxzoo.layers.kernels.attention.masks import Causal, Chunked, Documents, Full, Mask, Window
from flaxzoo.layers.kernels.attention.scores import SoftCap
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from jax.sharding import PartitionSpec as P

SHAPE = (34, 34, 4, 2, 64, 64)
WINDOWS = {
    "causal": (Causal(), ("CAUSAL", 0)),
    "full": (Full(), ("NO_MASK", 0)),
    "window": (Causal() & Window(9), ("CAUSAL", 9)),
    "window alone": (Window(9), ("CAUSAL", 9)),
    "the narrower window": (Window(12, 7) & Causal() & Window(9), ("CAUSAL", 9)),
    "window of everything": (Causal() & Window(34), ("CAUSAL", 0)),
    "full window": (Window(34, 34), ("NO_MASK", 0)),
}
"""Masks that cuDNN has, with what it calls them: the kind, and a window that ends at the query."""


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where cuDNN is installed: JAX asks for its version while tracing, and nothing of it before compiling."""
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_exclude_nondeterministic_ops=true")


def shapes(shape: tuple[int, ...] = SHAPE, dtype: Any = jnp.bfloat16, batch: int = 2) -> list[jax.ShapeDtypeStruct]:
    t, s, n, k, h, hv = shape
    return [jax.ShapeDtypeStruct((batch, *x), dtype) for x in ((t, n, h), (s, k, h), (s, k, hv))]


def lowered(mask: Mask, *arrays: Any, platform: str = "cuda", **options: Any) -> str:
    """The program of attention and its gradients, for a platform."""

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(attend(q, k, v, mask=mask, **options).astype(jnp.float32))

    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def calls(text: str) -> list[tuple[str, str, list[str], dict[str, Any]]]:
    """Result, name, operands and settings of each call of cuDNN."""
    found = []
    for result, name, operands, settings in re.findall(
        r'(%\d+):\d = stablehlo.custom_call @__cudnn\$(\w+)\(([^)]*)\) .*?backend_config = "(.*?[^\\])"', text
    ):
        settings = json.loads(settings.replace(r"\22", '"'))["cudnn_fmha_backend_config"]
        found.append((result, name, operands.split(", "), settings))
    return found


@pytest.mark.usefixtures("cudnn", "deterministic")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", WINDOWS)
def test_masks_that_cudnn_has(name: str, dtype: Any) -> None:
    mask, wanted = WINDOWS[name]
    for implementation in (None, "cuda"):
        text = lowered(mask, *shapes(dtype=dtype), scale=0.3, implementation=implementation)
        assert "dot_general" not in text
        _, (dead, *_), (_, _, operands, _) = found = calls(text)
        assert [call[1] for call in found] == ["fmhaSoftmax", "fmhaSoftmax", "fmhaSoftmaxBackward"]
        assert operands[:3] == ["%arg0", "%arg1", "%arg2"]
        # It reads the sums and the result of the first call. The compiler leaves out the second, which nothing reads.
        found_before = [operand.split("#") for operand in operands if "#" in operand]
        assert [place for _, place in found_before] == ["1", "0"]
        assert all(result != dead for result, _ in found_before)
        for *_, settings in found:
            assert (settings["mask_type"], settings["sliding_window_length"]) == wanted
            assert settings["fmha_scale"] == pytest.approx(0.3)


@pytest.mark.usefixtures("cudnn")
def test_gradients_that_are_not_the_same_each_time_are_left_to_portable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="flaxzoo.layers.kernels.attention.cudnn"):
        text = lowered(Causal(), *shapes(), implementation="cuda")
    assert [name for _, name, *_ in calls(text)] == ["fmhaSoftmax"]
    assert "dot_general" in text
    assert "XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true" in caplog.text
    for flag in ("--xla_gpu_deterministic_ops=true", "--xla_gpu_exclude_nondeterministic_ops --xla_a=b"):
        monkeypatch.setenv("XLA_FLAGS", flag)
        assert "fmhaSoftmaxBackward" in lowered(Causal(), *shapes())
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    assert "fmhaSoftmaxBackward" not in lowered(Causal(), *shapes())


MASKS = "cuDNN knows full masks, and causal ones with or without a window for as many queries as keys"
REFUSED: dict[str, tuple[Mask, tuple[int, ...], Any, dict[str, Any], str]] = {
    "float32": (Causal(), SHAPE, jnp.float32, {}, "cuDNN has no float32 attention"),
    "score": (Causal(), SHAPE, None, {"score": SoftCap(30.0)}, "scores and dropout are not in cuDNN"),
    "dropout": (Causal(), SHAPE, None, {"dropout_rate": 0.1, "dropout_seed": 0}, "scores and dropout are not in"),
    "sinks": (Causal(), SHAPE, None, {"sinks": jnp.zeros(4)}, "which sinks, return_lse and context_axis need"),
    "later keys": (Window(9, 5), SHAPE, None, {}, MASKS),
    "only later keys": (~Causal(), SHAPE, None, {}, MASKS),
    "documents": (Causal() & Documents(jnp.ones((2, 34), jnp.int32)), SHAPE, None, {}, MASKS),
    "chunks": (Chunked(9), SHAPE, None, {}, MASKS),
    "other lengths": (Causal(), (34, 64, 4, 2, 64, 64), None, {"query_offset": 30}, MASKS),
    "offset": (Causal(), SHAPE, None, {"query_offset": 3}, MASKS),
    "traced offset": (Causal(), SHAPE, None, {"query_offset": jnp.int32(0)}, MASKS),
    "two head dims": (Causal(), (34, 34, 4, 2, 64, 32), None, {}, "one head dim here, got H=64, Hv=32"),
    "large heads": (Causal(), (34, 34, 4, 2, 256, 256), None, {}, "got H=256 for a GPU of any from 8.0"),
    "odd heads": (Causal(), (34, 34, 4, 2, 60, 60), None, {}, "multiple of 8, but got 60"),
    "odd lengths": (Causal(), (33, 33, 4, 2, 64, 64), None, {}, "Unsupported sequence length Q 33, KV 33"),
}


@pytest.mark.usefixtures("cudnn", "deterministic")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cudnn_does_not_do(name: str, caplog: pytest.LogCaptureFixture) -> None:
    mask, shape, dtype, options, message = REFUSED[name]
    arrays = shapes(shape, dtype or jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=f"implementation='cuda': .*{re.escape(message)}.*'portable' can"):
        lowered(mask, *arrays, implementation="cuda", **options)
    with caplog.at_level("DEBUG", logger="flaxzoo.layers.kernels.attention.attend"):
        text = lowered(mask, *arrays, **options)
    assert "dot_general" in text
    assert "cudnn" not in text
    assert f"on cuda, attention is left to 'portable': {caplog.messages[-1].split(': ', 1)[1]}" in caplog.text
    assert message in caplog.text


@pytest.mark.parametrize(
    ("capabilities", "size", "refused"),
    [
        (["9.0"], 256, None),
        (["9.0", "8.0"], 256, "over 128 for compute capability 9.0, got H=256 for a GPU of compute capability 8.0"),
        (["10.0"], 256, "over 128 for compute capability 9.0, got H=256 for a GPU of compute capability 10.0"),
        (["10.0"], 128, None),
        (["7.5"], 64, "no flash attention for a GPU of compute capability 7.5"),
        ([], 128, None),
    ],
)
@pytest.mark.usefixtures("cudnn")
def test_what_depends_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[str], size: int, refused: str | None
) -> None:
    monkeypatch.setattr(gpu, "_here", lambda: dict(enumerate(capabilities)))
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda least: capabilities >= [least])
    arrays = shapes((34, 34, 4, 2, size, size))
    if refused is None:
        assert "cudnn" in lowered(Causal(), *arrays, implementation="cuda")
    else:
        with pytest.raises(NotImplementedError, match=refused):
            lowered(Causal(), *arrays, implementation="cuda")


def test_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_cudnn, "cuda_versions", None)
    with pytest.raises(NotImplementedError, match="'cuda': cuDNN: cuDNN is not detected; our .*; 'portable' can do it"):
        lowered(Causal(), *shapes(), implementation="cuda")
    assert "cudnn" not in lowered(Causal(), *shapes())


@pytest.mark.usefixtures("cudnn", "deterministic")
def test_each_platform_gets_its_own() -> None:
    marks = {"tpu": "tpu_custom_call", "cuda": "__cudnn$", "cpu": "dot_general"}
    for platform in marks:
        text = lowered(Causal(), *shapes(), platform=platform)
        assert [name for name, mark in marks.items() if mark in text] == [platform]
        passes = {"tpu": "attention_backward", "cuda": "fmhaSoftmaxBackward", "cpu": "dot_general"}
        assert passes[platform] in text


@pytest.mark.usefixtures("cudnn")
def test_cudnn_is_on_no_other_platform() -> None:
    with pytest.raises(NotImplementedError, match="cuda"):
        lowered(Causal(), *shapes(), platform="cpu", implementation="cuda")


@pytest.mark.usefixtures("cudnn", "deterministic")
def test_every_device_has_a_part() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, P("data", None, "tensor"))
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes()]
        found = calls(lowered(Causal(), *arrays))
    assert found[-1][1] == "fmhaSoftmaxBackward"
    for *_, settings in found:
        assert settings["intermediate_tensor_shape"]["dimensions"] == ["1", "2", "34", "34"]


@pytest.mark.usefixtures("cudnn", "deterministic")
def test_gradients_of_each_example_by_vmap() -> None:
    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(attend(q[None], k[None], v[None], mask=Causal()).astype(jnp.float32))

    traced = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)))).trace(*shapes(batch=3))
    found = calls(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert found[-1][1] == "fmhaSoftmaxBackward"
    assert found[-1][3]["intermediate_tensor_shape"]["dimensions"] == ["3", "4", "34", "34"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_every_case_on_a_gpu(name: str) -> None:
    case = CASES[name]
    functions = {variant: ours(case, variant) for variant in ("default", "portable", "portable in blocks")}
    with jax.default_matmul_precision("highest"):  # a GPU rounds float32 products to 10 bits otherwise
        found = outcomes(case.inputs(), plain=functools.partial(plain, case), **functions)
    for variant in functions:
        assert_close(found[variant], found["plain"])
    errs_no_more_than_twice(case, jnp.bfloat16, functions)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(256, 256, 8, 2, 64, 64), (130, 130, 4, 4, 128, 128)])
@pytest.mark.parametrize("name", WINDOWS)
def test_cudnn_on_a_gpu(name: str, shape: Any, dtype: Any) -> None:
    """With the gradients of cuDNN too where XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true."""
    case = Case(shape, WINDOWS[name][0])
    errs_no_more_than_twice(case, dtype, {"cuda": ours(case, "cuda")})

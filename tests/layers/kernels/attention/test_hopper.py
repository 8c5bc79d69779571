"""The kernels for Hopper GPUs: interpreted, lowered for a GPU that is not there, and (`pytest -m gpu`) on one."""

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_case import Case, errs_no_more_than_twice, ids, numbers, ours, random_table
from flaxzoo.layers.kernels.attention import attend, gpu
from flaxzoo.layers.kernels.attention.hopper import backward as hopper_backward
from flaxzoo.layers.kernels.attention.hopper import forward as hopper_forward
from flaxzoo.layers.kernels.attention.hopper import implementation as hopper
from flaxzoo.layers.kernels.attention.masks import (
    Causal,
    Chunked,
    Dense,
    Documents,
    Full,
    GlobalTokens,
    Lengths,
    Mask,
    PerHead,
    Prefix,
    Where,
    Window,
)
from flaxzoo.layers.kernels.attention.pair_function import trace
from flaxzoo.layers.kernels.attention.scores import SoftCap
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

attend_module: Any = importlib.import_module("flaxzoo.layers.kernels.attention.attend")
CASES = {
    "whole blocks": Case((128, 128, 2, 1, 64, 64), Causal() & Documents(jnp.ones((2, 128), jnp.int32))),
    "documents with padding": Case((150, 150, 2, 1, 64, 64), Causal() & Documents(ids(150, 40, 70, 140))),
    "window with an offset, other head dims": Case((70, 200, 2, 2, 40, 128), Window(50, 9), {"query_offset": 120}),
    "offset of each sequence": Case((64, 150, 3, 1, 72, 64), Causal(), {"query_offset": numbers(0, 86)}),
    "per head": Case((80, 80, 4, 2, 64, 64), PerHead((Causal(), Causal() & Window(5)), (0, 1, 1, 0))),
    "lengths, one of them 0": Case((64, 140, 1, 1, 128, 64), Lengths(numbers(64, 9), numbers(0, 130))),
    "marked tokens, prefix": Case(
        (130, 130, 1, 1, 64, 64), GlobalTokens(random_table(2, 130, share=0.1)) | Prefix(numbers(5, 131)) | Window(4, 4)
    ),
    "of a user's own, with batch and head": Case(
        (100, 100, 4, 2, 64, 64), Where(lambda b, h, q, k: (k <= q + 9 * h) & (k + 50 * b >= q)) & ~Window(3)
    ),
    "everything, of a user's own": Case((64, 64, 1, 1, 64, 64), Where(lambda b, h, q, k: jnp.bool_(True))),
    "full, then chunks": Case((129, 260, 1, 1, 64, 64), Causal() & Chunked(90), {"query_offset": 131, "scale": 0.3}),
}


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the GPU is an H100."""
    monkeypatch.setattr(gpu, "_here", lambda: {"NVIDIA H100 80GB HBM3": "9.0"})


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, on_hopper: None) -> None:
    """Kernels run by Pallas's interpreter for GPUs, which has no product with registers."""

    class Interpreted:
        forward = staticmethod(functools.partial(hopper.forward, interpret=plgpu.InterpretGPUParams()))
        backward = staticmethod(functools.partial(hopper.backward, interpret=plgpu.InterpretGPUParams()))

    def choose(_: Any, problem: Any, operands: Any) -> dict[str, Any]:
        assert hopper.refusal(problem, operands) is None
        return {"default": Interpreted}

    def take(functions: dict[str, Callable[..., Any]], arguments: Any, like: Any, **_: Any) -> Any:
        found = functions["default"](*arguments)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), like)
        return found

    def added(sums: jax.Array, pairs: jax.Array, b: Any) -> jax.Array:
        return sums + jax.lax.dot(pairs, b[...], preferred_element_type=jnp.float32)

    monkeypatch.setattr(attend_module, "_choose", choose)
    monkeypatch.setattr(attend_module, "by_platform", take)
    for module in (hopper_forward, hopper_backward):
        monkeypatch.setattr(module, "added", added)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str) -> None:
    dtype, function = jnp.float16 if name == "per head" else jnp.bfloat16, ours(CASES[name], "default")
    function.eager = True  # the interpreter calls back to Python in order, which no jitted derivative can do
    errs_no_more_than_twice(CASES[name], dtype, {"hopper": function}, calls=1)


@pytest.mark.usefixtures("interpreted")
def test_sums_and_their_gradients() -> None:
    """The logarithm of a row's sum of exponentials, which is -inf where it sees nothing, has gradients, too."""
    case = Case(
        (130, 130, 2, 1, 64, 64),
        Causal() & Documents(ids(130, 40, 120)) & ~Window(3) & Where(lambda b, h, q, k: (k != h) & (k + b != 7)),
    )
    q, k, v = (x.astype(jnp.bfloat16) for x in case.inputs().values())

    def found(implementation: Any) -> list[jax.Array]:
        def loss(q: Any, k: Any) -> Any:
            _, lse = attend(q, k, v, mask=case.mask, return_lse=True, implementation=implementation)
            return jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) ** 2), lse

        (_, lse), (q_grad, k_grad) = jax.value_and_grad(loss, (0, 1), has_aux=True)(q, k)
        return [lse, q_grad.astype(jnp.float32), k_grad.astype(jnp.float32)]

    ours, reference = found(None), found("reference")
    assert jnp.isneginf(ours[0]).any()
    for x, y in zip(ours, reference, strict=True):
        assert jnp.array_equal(jnp.isneginf(x), jnp.isneginf(y))
        x, y = (jnp.where(jnp.isneginf(z), 0.0, z) for z in (x, y))
        assert jnp.linalg.norm(x - y) < 5e-3 * jnp.linalg.norm(y)


def lowered(mask: Mask, *, batch: int = 2, shape: tuple[int, ...] = (128, 128, 4, 2, 64, 64), **options: Any) -> str:
    """The program of attention and its gradients, for a GPU."""
    t, s, n, k, h, hv = shape
    sharding = options.pop("sharding", None)
    dtype = options.pop("dtype", jnp.bfloat16)
    arrays = [jax.ShapeDtypeStruct((batch, *x), dtype, sharding=sharding) for x in ((t, n, h), (s, k, h), (s, k, hv))]

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(attend(q, k, v, mask=mask, **options).astype(jnp.float32))

    return (
        jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    )


def kernels(text: str) -> list[str]:
    """The kernels that a program calls."""
    return sorted(set(re.findall(r"attention_(?:forward|backward_queries|backward_keys)\b", text)))


ALL = ["attention_backward_keys", "attention_backward_queries", "attention_forward"]
DOCUMENT = Causal() & Documents(jnp.ones((1, 64), jnp.int32))
DOCUMENTS = Causal() & Documents(ids(128, 40, 90))


@pytest.mark.usefixtures("on_hopper")
def test_an_h100_gets_kernels() -> None:
    text = lowered(DOCUMENTS, implementation="cuda")
    assert kernels(text) == ALL
    assert text.count("@mosaic_gpu_v2") == 3
    assert kernels(lowered(DOCUMENTS)) == ALL


@pytest.mark.usefixtures("on_hopper")
def test_gradients_where_those_of_cudnn_are_not_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda least: float(least) <= 9.0)
    text = lowered(Causal())
    assert "__cudnn$fmhaSoftmax" in text
    assert kernels(text) == ALL[:2]
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=true")
    assert kernels(lowered(Causal())) == []


A, B = "(q - k)", "(q + k)"
BODIES = {
    "eq ne lt le gt ge": f"({A} == 1) | ({A} != 2) | ({A} < 3) | ({A} <= 4) | ({A} > 5) | ({A} >= 6)",
    "and or xor not": f"~(({A} & {B} | 3 ^ ~{A}) == 0) & ~({A} > 1) | ((q > k) ^ (k > 3))",
    "add sub mul neg abs max min": f"jnp.maximum(jnp.minimum({A} * 3 + {B}, 7), abs(-{A})) > 4",
    "div rem": f"jax.lax.rem({A}, 3) + jax.lax.div({B}, 5) > 2",
    "shift_left": f"jnp.left_shift({A}, 2) > 9",
    "shift_right_logical": f"jax.lax.shift_right_logical({A}, jnp.int32(2)) > 9",
    "shift_right_arithmetic": f"jax.lax.shift_right_arithmetic({A}, jnp.int32(2)) > 9",
    "select_n convert_element_type": f"jnp.where({A} > 3, {A}.astype(jnp.float32), {B}.astype(jnp.float32)) > 2.5",
    "of float32": f"jnp.maximum(abs({A}.astype(jnp.float32) * 0.5 - 1.0), -{B}.astype(jnp.float32)) >= 3.0",
    "of uint32": f"{B}.astype(jnp.uint32) // jnp.uint32(3) > jnp.uint32(4)",
}
"""What a mask of a user's own may compute for each pair."""


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("names", BODIES)
def test_what_masks_may_compute(names: str) -> None:
    """It is lowered, which Pallas refuses to do of what it does not have."""
    mask = Where(eval(f"lambda b, h, q, k: {BODIES[names]}", {"jnp": jnp, "jax": jax}))
    done = {operation.name for operation in trace(mask.visible).per_pair}
    assert names.startswith("of ") or done >= set(names.split())
    assert kernels(lowered(mask, implementation="cuda")) == ALL


def test_all_that_masks_may_compute_is_tried() -> None:
    assert set().union(*(names for names, _ in hopper.OPERATIONS)) == {
        name for names in BODIES if not names.startswith("of ") for name in names.split()
    }


@pytest.mark.usefixtures("on_hopper")
def test_gradients_of_each_example_by_vmap() -> None:
    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(attend(q[None], k[None], v[None], mask=DOCUMENT).astype(jnp.float32))

    arrays = [jax.ShapeDtypeStruct((3, 64, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    traced = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)))).trace(*arrays)
    assert kernels(traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)) == ALL


@pytest.mark.usefixtures("on_hopper")
def test_what_xla_would_have_to_divide() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="make the mesh's axes explicit"):
        lowered(DOCUMENTS, implementation="cuda")


@pytest.mark.usefixtures("on_hopper")
def test_no_other_platform_has_them() -> None:
    with pytest.raises(NotImplementedError, match="this call is implemented for cuda only"):
        attend(*(jnp.zeros((1, 64, 1, 64), jnp.bfloat16),) * 3, mask=DOCUMENT, implementation="cuda")


def test_other_gpus_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for here in (["9.0", "8.0"], ["9.0", "10.0"], ["10.0"], []):
        monkeypatch.setattr(gpu, "_here", lambda here=here: dict(zip("ab", here, strict=False)))
        assert kernels(lowered(DOCUMENTS)) == []
    with pytest.raises(NotImplementedError, match="our kernels are for Hopper GPUs, of compute capability 9.0; 'port"):
        lowered(DOCUMENTS, implementation="cuda")


def test_the_gpus_of_the_mesh_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may be for GPUs that are not there, or not the ones in the process."""

    def mesh(kind: str) -> Any:
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
        return jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)

    found = {}
    for here in ("", "NVIDIA A30", "NVIDIA L4"):
        monkeypatch.setattr(gpu, "_here", lambda here=here: {here: "8.9"} if here else {})
        for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"):
            with jax.sharding.use_abstract_mesh(mesh(kind)):
                found[kind[7:11].strip(), here] = gpu.capabilities()
    assert found == {
        **{("H100", here): {"9.0"} for here in ("", "NVIDIA A30", "NVIDIA L4")},
        **{("A100", here): {"8.0"} for here in ("", "NVIDIA A30", "NVIDIA L4")},
        ("L4", ""): set(),
        ("L4", "NVIDIA A30"): set(),
        ("L4", "NVIDIA L4"): {"8.9"},
    }


@pytest.mark.usefixtures("on_hopper")
def test_every_device_has_a_part() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        text = lowered(DOCUMENTS, sharding=jax.NamedSharding(mesh, P("data", None, "tensor")))
    assert kernels(text) == ALL
    assert "(tensor<1x128x2x64xbf16>, tensor<1x128x1x64xbf16>" in text


REFUSED: dict[str, tuple[Mask, dict[str, Any], str]] = {
    "float32": (DOCUMENTS, {"dtype": jnp.float32}, "the kernels for Hopper have no float32 attention"),
    "few queries": (
        Causal() & Full(),
        {"shape": (63, 128, 4, 2, 64, 64), "query_offset": 3},
        "64 queries or more, got T=63",
    ),
    "large heads": (DOCUMENTS, {"shape": (128, 128, 4, 2, 192, 128)}, "head dims up to 128, got H=192, Hv=128"),
    "score": (DOCUMENTS, {"score": SoftCap(3.0)}, "scores and dropout are not in the kernels for Hopper"),
    "dropout": (DOCUMENTS, {"dropout_rate": 0.1, "dropout_seed": 0}, "scores and dropout are not in the kernels"),
    "sinks": (DOCUMENTS, {"sinks": jnp.zeros(4)}, "round results to the type of q, and sinks and context_axis need"),
    "what is approximated": (
        Where(lambda b, h, q, k: jnp.sin((q - k).astype(jnp.float32)) > 0),
        {},
        "have no sin of float32 for each",
    ),
    "small numbers": (Where(lambda b, h, q, k: (q - k).astype(jnp.int8) < 3), {}, "of int32 and int8 for each pair"),
    "booleans that are compared": (
        Where(lambda b, h, q, k: jnp.maximum(q > k, q + k > 9)),
        {},
        "have no max of bool for each pair",
    ),
    "a table by query and key": (
        Dense(random_table(2, 1, 128, 128, share=0.5)),
        {},
        "have no lookup of bool and int32 for each pair",
    ),
}


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", REFUSED)
def test_what_kernels_do_not_do(name: str) -> None:
    mask, options, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"implementation='cuda': .*{re.escape(message)}.*'portable' can"):
        lowered(mask, implementation="cuda", **options)
    assert kernels(lowered(mask, **options)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, dtype: Any) -> None:
    errs_no_more_than_twice(CASES[name], dtype, {"hopper": ours(CASES[name], "default")})


@pytest.mark.gpu
def test_long_rows_on_a_gpu() -> None:
    mask = Causal() & Documents(ids(1500, 130, 700, 701, 1400))
    case = Case((1500, 1500, 6, 2, 128, 128), mask)
    errs_no_more_than_twice(case, jnp.bfloat16, {"hopper": ours(case, "default")})

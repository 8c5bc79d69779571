"""Attention as programs that can be compiled: ours, and the kernels it is compared with."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import WINDOW, Case, Pass
from flaxzoo.layers.kernels.attention import pair_function as pairs
from flaxzoo.layers.kernels.attention.masks import Causal, Documents, Window
from flaxzoo.layers.kernels.attention.problem import Operands, Problem
from flaxzoo.layers.kernels.attention.tpu import backward as tpu_backward
from flaxzoo.layers.kernels.attention.tpu import forward as tpu_forward
from flaxzoo.layers.kernels.attention.tpu import implementation as tpu
from flaxzoo.layers.kernels.attention.tpu import parts as tpu_parts
from jax.sharding import Mesh

Program = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments: shapes, and numbers where a kernel is steered by them."""
Settings = dict[str, Any]
PACKAGES = {
    "jax splash": "jax.experimental.pallas.ops.tpu.splash_attention",
    "tokamax splash": "tokamax._src.ops.experimental.tpu.splash_attention",
}
"""Their modules are alike. What tokamax offers publicly asks the host's devices which kernel to run."""


def shapes_of(case: Case) -> list[jax.ShapeDtypeStruct]:
    """Of q, k and v with heads first, which is how all these kernels read them."""
    sizes = ((case.heads, case.size), (case.kv_heads, case.size), (case.kv_heads, case.values))
    return [jax.ShapeDtypeStruct((heads, case.length, size), jnp.bfloat16) for heads, size in sizes]


def ours(device: Any, case: Case, which: Pass, settings: Settings) -> Program:
    """Our kernels, in blocks of `block_q`, `block_k` and `strip`, or in those that they take for the device."""
    mask = {"causal": Causal(), "window": Causal() & Window(WINDOW), "documents": Causal()}[case.mask]
    if case.mask == "documents":
        mask = mask & Documents(jnp.asarray(case.document_ids)[None])
    traced, counts = pairs.trace(mask.visible), pairs.Sizes(1, case.heads, case.length, case.length)
    hoisted = [np.asarray(x) for x in traced.hoisted_values(counts)]
    problem = Problem(traced, None, case.size**-0.5, jnp.bfloat16, causal=True, mask_hoisted=hoisted)
    shapes = [jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in shapes_of(case)]

    def operands(*arrays: Any) -> Operands:
        return Operands(*(jnp.swapaxes(x, 1, 2) for x in arrays), mask_hoisted=[], score_hoisted=[])

    given = jax.eval_shape(operands, *shapes)
    chosen = dataclasses.replace(sizes(device, given), **settings)
    backward = which == "backward"
    blocks = problem.blocks(given, chosen.block_q, chosen.block_k, transposed=backward)
    # What steers the kernels is an argument, which tpu_static.py knows the number of.
    steering = np.asarray(tpu_parts.schedule(blocks))

    def forward(steering: Any, q: Any, k: Any, v: Any) -> Any:
        setattr(tpu_forward, "schedule", lambda _: steering)  # noqa: B010
        out, lse = tpu.forward(problem, operands(q, k, v), chosen=chosen)
        return jnp.swapaxes(out, 1, 2), lse

    def gradients(steering: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, g: Any) -> Any:
        setattr(tpu_backward, "schedule", lambda _: steering)  # noqa: B010
        delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), axis=-1)
        found = tpu.backward(problem, operands(q, k, v), lse, delta, jnp.swapaxes(g, 1, 2), chosen=chosen)
        return [jnp.swapaxes(x, 1, 2) for x in found[:3]]

    if not backward:
        return forward, (steering, *shapes)
    out = jax.ShapeDtypeStruct((1, case.heads, case.length, case.values), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, case.heads, case.length), jnp.float32)
    return gradients, (steering, *shapes, out, lse, out)


def sizes(device: Any, operands: Operands, as_one: int = 1) -> tpu.BlockSizes:
    """The block sizes that ours take for a device; of operands only the shapes matter."""
    with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("x",)).abstract_mesh):
        return tpu.sizes(operands, as_one)


def shipped(device: Any, case: Case) -> Settings:
    """The settings that ours ship with."""
    q, k, v = (jax.ShapeDtypeStruct((1, x.shape[1], x.shape[0], x.shape[2]), x.dtype) for x in shapes_of(case))
    found: Any = Operands(q, k, v, [], [])  # pyright: ignore[reportArgumentType]
    chosen = sizes(device, found)
    return {"block_q": chosen.block_q, "block_k": chosen.block_k, "strip": chosen.strip}


def splash(package: str, device: Any, case: Case, which: Pass, settings: Settings) -> Program:
    """A splash kernel.

    The settings are `block_q`, `block_k`, keys to `compute` at a time (0: all of a block), whether it is `mapped` over
    key heads, and options of the package.
    """
    kernels = importlib.import_module(f"{PACKAGES[package]}.splash_attention_kernel")
    group = case.heads // case.kv_heads
    mapped = settings.get("mapped", True)
    heads = group if mapped else case.heads
    kernel = splash_kernel(package, case.mask == "window", case.length, heads, which, tuple(sorted(settings.items())))
    ids = {}
    if case.mask == "documents":
        ids = {"segment_ids": kernels.SegmentIds(*[jnp.asarray(case.document_ids)] * 2)}

    def forward(q: Any, k: Any, v: Any) -> Any:
        if not mapped:
            return kernel(q, k, v, **ids)
        grouped = q.reshape(case.kv_heads, group, *q.shape[1:])
        return jax.vmap(lambda q, k, v: kernel(q, k, v, **ids))(grouped, k, v).reshape(*q.shape[:2], v.shape[2])

    shapes = shapes_of(case)
    if which == "forward":
        return forward, tuple(shapes)

    def saved(*arrays: Any) -> Any:
        return jax.vjp(forward, *arrays)[1]

    # The backward pass alone, from what the forward pass leaves to it. What steers a kernel is among that, as integers,
    # and has to be known: it depends on no array, so that no kernel has to run for it.
    left, tree = jax.tree.flatten(jax.eval_shape(saved, *shapes))
    steering = [jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_ for x in left]

    def numbers(*arrays: Any) -> list[Any]:
        return [x for x, steers in zip(jax.tree.leaves(saved(*arrays)), steering, strict=True) if steers]

    known = iter(jax.jit(numbers)(*(jnp.zeros(x.shape, x.dtype) for x in shapes)))
    left = [np.asarray(next(known)) if steers else x for x, steers in zip(left, steering, strict=True)]
    out = jax.eval_shape(forward, *shapes)
    return lambda left, g: jax.tree.unflatten(tree, left)(g), (left, out)


@functools.lru_cache(maxsize=32)  # a mask of 128K tokens takes a minute
def splash_kernel(
    package: str, window: bool, length: int, heads: int, which: Pass, settings: tuple[tuple[str, Any], ...]
) -> Any:
    """A causal or windowed kernel, with the tables of its mask."""
    kernels, masks = (
        importlib.import_module(f"{PACKAGES[package]}.splash_attention_{name}") for name in ("kernel", "mask")
    )
    chosen = dict(settings)
    mapped = chosen.pop("mapped", True)
    blocks = {"block_q": chosen.pop("block_q"), "block_kv": chosen.pop("block_k")}
    blocks["block_kv_compute"] = min(chosen.pop("compute") or blocks["block_kv"], blocks["block_kv"])
    if which == "backward":
        q, kv, compute = blocks.values()
        blocks |= {"block_q_dkv": q, "block_kv_dkv": kv, "block_kv_dkv_compute": compute}
    shape = (length, length)
    mask = masks.LocalMask(shape, (WINDOW - 1, 0), 0) if window else masks.CausalMask(shape)
    make = kernels.make_splash_mqa_single_device if mapped else kernels.make_splash_mha_single_device
    if package == "tokamax splash":
        return make(mask, config=kernels.SplashConfig(**blocks, **chosen))
    options = {"use_fused_bwd_kernel": True} if which == "backward" else {}
    return make(masks.MultiHeadMask([mask] * heads), block_sizes=kernels.BlockSizes(**blocks, **options, **chosen))


PROGRAMS: dict[str, Callable[[Any, Case, Pass, Settings], Program]] = {
    "ours": ours,
    **{package: functools.partial(splash, package) for package in PACKAGES},
}

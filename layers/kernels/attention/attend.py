"""Attention as one function of queries, keys, values, a mask and a score."""

import contextlib
import dataclasses
import logging
import math
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import PartitionSpec, reshard
from jaxtyping import Array, Float, Int

from ...sharding.axes import spec_of
from ...spec import unknown
from ..by_platform import by_platform
from ..transposable import with_transpose
from . import cudnn, dropout, portable, reference
from . import pair_function as pairs
from .blocks import hides_everything
from .context import Method, plan
from .hopper import implementation as hopper
from .lookup import check_kind
from .masks import POSITIONS, Mask, check_mask
from .problem import Gradients, Operands, Problem, gradients_like, tangents_of
from .scores import Score
from .tpu import implementation as tpu
from .tpu import interpreted as tpu_interpreted

_log = logging.getLogger(__name__)

Implementation = Literal["reference", "portable", "tpu", "cuda"]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: Mask,
    score: Score | None = None,
    sinks: Float[Array, " N"] | None = None,
    scale: float | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] = 0,
    dropout_rate: float = 0.0,
    dropout_seed: int | Int[Array, ""] | None = None,
    return_lse: bool = False,
    context_axis: str | None = None,
    context: Method = "ring",
    implementation: Implementation | None = None,
) -> Any:
    """softmax(score(scale q k^T) + mask) v, over groups of N / K query heads that share a key/value head.

    Logits, softmax and sums are float32; the result has the dtype of q. A query that sees no key gives zeros, and has
    zero gradients. The same arguments give the same bits.

    Args:
        q: queries; float32, bfloat16 or float16, as k and v. Batch and heads may be split over an explicit-mode mesh,
            alike in q, k and v.
        k: keys; N must be a multiple of K (GQA, 2305.13245; MQA, 1911.02150).
        v: values, of any head dim.
        mask: which keys a query sees (layers/kernels/attention/masks.py).
        score: changes a logit: any traced function `(score, batch, head, query, key) -> score` of scalars, or one of
            layers/kernels/attention/scores.py. Arrays it closes over get gradients.
        sinks: a learned logit per head that takes part in the softmax and has no value (2309.17453; gpt-oss).
        scale: factor of the products q k; 1 / sqrt(H) by default.
        query_offset: the position of the first query, for all sequences or for each; mask, score and dropout depend on
            positions. Key s is at position s. Positions are from -2**30 to 2**30.
        dropout_rate: share of the weights that are set to zero; the others are scaled by 1 / (1 - rate).
        dropout_seed: an integer of 32 bits; required for dropout.
        return_lse: also return the logarithm of the sum of exponentials of each row, float32 B N T; -inf where a query
            sees no key.
        context_axis: the mesh axis that the length of q, k and v is split over, if any. The order of positions is kept.
        context: how the devices of that axis share keys and values. In a "ring" these are passed from device to device,
            and no device stores more than two parts of them; with "all_gather" every device stores all.
        implementation: "reference" is the plain definition, with all T x S logits; "portable" works block by block,
            with memory linear in the lengths; "tpu" runs Pallas kernels (interpreted on other platforms), "cuda" those
            of cuDNN or, on an H100 or H200, our own. By default the first implementation of the platform that supports
            the arguments; a debug log gives the reason if one does not.

    Raises:
        ValueError: if shapes do not fit, no query sees any key, or the implementation is unknown.
        NotImplementedError: if the requested implementation does not support the arguments.
    """
    check_mask(mask)
    _check(q, k, v, sinks, dropout_rate, dropout_seed)
    (batch, queries, heads, size), keys = q.shape, k.shape[1]
    _check_positions(query_offset, queries)
    if jnp.shape(query_offset) not in ((), (batch,)):
        raise ValueError(
            f"query_offset is a number or one for each of B={batch} sequences, got shape {jnp.shape(query_offset)}"
        )
    fixed = isinstance(query_offset, int | np.integer)
    offset: Any = int(query_offset) if fixed else jnp.asarray(query_offset, jnp.int32)
    query_positions = None if fixed else offset.reshape(-1, 1, 1) + jnp.arange(queries, dtype=jnp.int32)
    sizes = pairs.Sizes(batch, heads, queries, keys, offset if fixed else query_positions)
    traced_mask = pairs.trace(mask.visible)
    traced_score = None if score is None else pairs.trace(score, score=True)
    split = _Split(q, k, v, context_axis)
    shared = None
    if context_axis is not None:
        shared = plan(traced_mask, sizes, context_axis, split.context_devices, context)
        query_positions = pairs.positions(sizes)["query"]
    mask_hoisted = split.hoisted(traced_mask, sizes)
    traced_hoisted = any(isinstance(x, Tracer) for x in mask_hoisted)
    is_concrete = fixed and context_axis is None and not traced_hoisted and not split.cuts(mask_hoisted)
    rows = split.place(dropout.rows(_seed(dropout_seed), batch, heads)) if dropout_rate else None
    problem = Problem(
        mask=traced_mask,
        score=traced_score,
        scale=1 / math.sqrt(size) if scale is None else float(scale),
        out_dtype=q.dtype if sinks is None else jnp.float32,
        dropout_rate=dropout_rate,
        query_offset=offset if fixed else 0,
        mask_hoisted=[np.asarray(x) for x in mask_hoisted] if is_concrete else None,
        causal=mask.causal and fixed and offset <= 0 and context_axis is None,
        band=mask.band,
        wants_lse=sinks is not None or return_lse or shared is not None,
        context=shared,
    )
    operands = Operands(
        q=q,
        k=k,
        v=v,
        mask_hoisted=[] if is_concrete else [split.place(x) for x in mask_hoisted],
        score_hoisted=[] if traced_score is None else [split.place(x) for x in split.hoisted(traced_score, sizes)],
        dropout_rows=rows,
        query_positions=None if query_positions is None else split.place(query_positions),
        key_positions=None if shared is None else split.place(pairs.positions(sizes)["key"]),
    )
    hidden = context_axis is not None and shared is None
    if problem.mask_hoisted is not None:
        blocks = problem.blocks(operands, portable.BLOCK, portable.BLOCK)
        hidden = hides_everything(traced_mask, problem.mask_hoisted, sizes, blocks, portable.BLOCK)
    if hidden:
        raise ValueError(
            f"the mask hides every key from every query: {mask} for T={queries}, S={keys}, {query_offset=}"
        )
    out, lse = split.run(partial(_attention, implementation, problem), operands)
    if sinks is not None:
        # One more logit in the sum scales all weights by the same factor.
        total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[:, None])
        out = (out * jnp.swapaxes(jnp.exp(lse - total), 1, 2)[..., None]).astype(q.dtype)
        lse = total
    return (out, lse) if return_lse else out


def _check(q: Array, k: Array, v: Array, sinks: Any, dropout_rate: float, dropout_seed: Any) -> None:
    """Raises ValueError if the arguments do not fit each other."""
    arrays = {"q": q, "k": k, "v": v} | ({} if sinks is None else {"sinks": sinks})
    for name, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(f"{name} must be an array, got {type(array).__name__}")
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[::3] != q.shape[::3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q, k, v must be B T N H, B S K H, B S K Hv, got {q.shape}, {k.shape}, {v.shape}")
    if not math.prod(q.shape) * math.prod(v.shape):
        raise ValueError(f"no dimension may be empty, got {q.shape}, {k.shape}, {v.shape}")
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key/value heads, got N={heads}, K={kv_heads}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)):
        raise ValueError(
            f"q, k, v must all be float32, bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}; cast them"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks are a logit for each of N={heads} query heads, got shape {sinks.shape}")
    if not 0 <= dropout_rate < 1 or (dropout_rate and dropout_seed is None):
        raise ValueError(
            f"dropout_rate is at least 0 and below 1 and needs a dropout_seed, got {dropout_rate} and {dropout_seed}"
        )
    if dropout_seed is not None:
        check_kind(dropout_seed, "integer", "dropout_seed")
        if isinstance(dropout_seed, int | np.integer | np.ndarray) and not -(2**31) <= int(dropout_seed) < 2**32:
            raise ValueError(f"dropout_seed must fit 32 bits, from -2**31 to 2**32 - 1, got {dropout_seed}")


def _check_positions(query_offset: Any, queries: int) -> None:
    """Raises ValueError where positions of queries are not integers of which sums and differences fit int32."""
    check_kind(query_offset, "integer", "query_offset")
    if isinstance(query_offset, int | np.integer | np.ndarray):
        first, last = np.min(query_offset), np.max(query_offset) + queries - 1
        if first < -POSITIONS or last > POSITIONS:
            raise ValueError(
                f"positions must be from {-POSITIONS} to {POSITIONS}, got {query_offset=} for T={queries} queries"
            )


def _seed(seed: Any) -> Int[Array, ""]:
    """A dropout seed as an array; unsigned numbers have the bits of the int32."""
    if not isinstance(seed, int | np.integer | np.ndarray):
        return jnp.asarray(seed)
    return jnp.asarray(np.asarray(int(seed) % 2**32, np.uint32).view(np.int32))


def _choose(implementation: Implementation | None, problem: Problem, operands: Operands) -> dict[str, Any]:
    """The implementation for each platform that a program may be lowered for."""
    names = get_args(Implementation)
    if implementation is not None and implementation not in names:
        raise unknown("attention implementation", implementation, names)
    if implementation == "portable":
        return {"default": portable}
    kernels = {"tpu": [tpu], "cuda": [cudnn, hopper]}
    chosen, refused = {}, {}
    log = partial(_log.debug, "on %s, attention is left to '%s': %s")
    for platform, modules in kernels.items() if implementation is None else [(implementation, kernels[implementation])]:
        reasons: list[str] = []
        for module in modules:
            reason = module.refusal(problem, operands)
            if reason is None:
                chosen[platform] = module
                if reasons:
                    log(platform, module.__name__.rpartition(".")[2], "; ".join(reasons))
                break
            reasons.append(reason)
        else:
            refused[platform] = "; ".join(reasons)
    if implementation is None:
        for platform, reason in refused.items():
            log(platform, "portable", reason)
        return {"default": portable} | chosen
    if refused:
        raise NotImplementedError(f"attention by {implementation=}: {refused[implementation]}; 'portable' can do it")
    return chosen | ({"default": tpu_interpreted} if implementation == "tpu" else {})


def _attention(implementation: Implementation | None, problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """Attention and the logarithm of the sums of exponentials, by an implementation."""
    context = problem.context
    if context is not None:
        operands = context.balanced_order(problem, operands)
    if implementation == "reference":  # differentiated by JAX, to any order
        out, lse = reference.forward(problem, context.gathered(problem, operands) if context else operands)
    else:
        out, lse = _blockwise(tuple(_choose(implementation, problem, operands).items()), problem, operands)
    return (out, lse) if context is None else (context.original_order(out, 1), context.original_order(lse, 2))


def _early(chosen: Any) -> list[str]:
    """Platforms whose calls XLA may partition among devices."""
    return [name for name, module in chosen if module is cudnn]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _blockwise(chosen: Any, problem: Problem, operands: Operands) -> tuple[Array, Array]:
    """Attention with derivatives, forward and reverse, that are computed block by block too."""

    def attention(problem: Problem, operands: Operands) -> tuple[Array, Array]:
        (batch, length, heads, _), size = operands.q.shape, operands.v.shape[3]
        out = jax.ShapeDtypeStruct((batch, length, heads, size), problem.out_dtype)
        lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
        functions = {name: partial(module.forward, problem) for name, module in chosen}
        return by_platform(functions, (operands,), (out, lse), early=_early(chosen))

    context = problem.context
    return context.forward(attention, problem, operands) if context else attention(problem, operands)


@_blockwise.defjvp
def _blockwise_jvp(chosen: Any, problem: Problem, primals: tuple[Operands], tangents: tuple[Operands]) -> Any:
    (operands,), (moved,) = primals, tangents
    # Remat policies save both by this name: they do not see matmuls inside a loop.
    out, lse = (checkpoint_name(x, "attention") for x in _blockwise(chosen, problem, operands))

    def forward(saved: Any, moved: Gradients) -> Any:
        operands, out, lse = saved
        context = problem.context
        if context is not None:
            return context.tangent(portable.tangent, problem, operands, out, lse, moved)
        return portable.tangent(problem, operands, out, lse, moved)

    def transpose(saved: Any, cotangents: Any) -> Gradients:
        (operands, out, lse), (out_grad, lse_grad) = saved, cotangents
        weighted = jnp.sum(out.astype(jnp.float32) * out_grad.astype(jnp.float32), axis=-1)
        delta = jnp.swapaxes(weighted, 1, 2) - lse_grad

        def gradients(problem: Problem, *arguments: Any) -> Gradients:
            functions = {name: partial(module.backward, problem) for name, module in chosen}
            return by_platform(functions, arguments, gradients_like(problem, arguments[0]), early=_early(chosen))

        if problem.context:
            return problem.context.backward(gradients, problem, operands, lse, delta, out_grad)
        return gradients(problem, operands._replace(out=out), lse, delta, out_grad)

    return (out, lse), with_transpose(forward, transpose, (operands, out, lse), tangents_of(moved), like=(out, lse))


class _Split:
    """How queries, keys and values are split over the mesh: alike, along batch, length and heads."""

    def __init__(self, q: Array, k: Array, v: Array, context_axis: str | None):
        self.batch, _, self.heads, _ = spec_of(q)
        self.context = context_axis
        if any(spec_of(x) != (self.batch, context_axis, self.heads, None) for x in (q, k, v)):
            lengths = "not along their length" if context_axis is None else f"along their length over {context_axis}"
            raise ValueError(
                f"q, k, v may be split over the mesh along batch and heads, all alike, and with {context_axis=} must "
                f"be split {lengths}, got {spec_of(q)}, {spec_of(k)}, {spec_of(v)}"
            )

    @property
    def is_trivial(self) -> bool:
        """Whether nothing is split."""
        return self.batch is None and self.heads is None and self.context is None

    @property
    def context_devices(self) -> int:
        """The number of devices that the length is split over."""
        return jax.sharding.get_abstract_mesh().shape[self.context]

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """The partition of an array (B or 1, N or 1, length or 1, ...)."""
        names = (self.batch, self.heads, self.context)
        return PartitionSpec(*(None if size == 1 else name for size, name in zip(shape, names, strict=False)))

    def cuts(self, arrays: list[Array]) -> bool:
        """Whether any of the arrays is split."""
        return any(name is not None for array in arrays for name in self.spec(array.shape))

    def place(self, array: Array) -> Array:
        """An array (B or 1, N or 1, ...), resharded like q, k and v."""
        return array if self.is_trivial else reshard(array, self.spec(array.shape))

    def hoisted(self, function: pairs.PairFunction, sizes: pairs.Sizes) -> list[Array]:
        """The hoisted values of a function, split like q, k and v.

        They are computed as on one device: a function that indexes arrays has no shardings. Under a mesh they are
        always traced, since its devices may exist only to compile for.
        """
        fixed = isinstance(sizes.query, int)
        if jax.sharding.get_abstract_mesh().empty:
            with jax.ensure_compile_time_eval() if function.concrete and fixed else contextlib.nullcontext():
                return function.hoisted_values(sizes)

        def compute(arrays: list[Array], query_positions: list[Array]) -> list[Array]:
            with_positions = sizes if fixed else dataclasses.replace(sizes, query=query_positions[0])
            return function.hoisted_values(with_positions, arrays)

        specs = [self.spec(shape) for shape in function.hoisted_shapes(sizes)]
        # Jitted, because eager operations would follow the axis types of the surrounding mesh.
        # Manual axes, such as that of pipeline stages, stay manual.
        explicit = jax.sharding.get_abstract_mesh().explicit_axes
        sharded: Any = jax.jit(compute)
        sharded = jax.sharding.auto_axes(sharded, axes=explicit, out_sharding=specs) if explicit else sharded
        return sharded(function.arrays, [] if fixed else [sizes.query])

    def run(self, function: Any, operands: Operands) -> tuple[Array, Array]:
        """Calls a function of operands on each device, with its part of them."""
        if self.is_trivial:
            return function(operands)
        wide = PartitionSpec(self.batch, self.context, self.heads, None)
        narrow = PartitionSpec(self.batch, self.heads, self.context)
        specs = jax.tree.map(lambda x: self.spec(x.shape), operands)._replace(q=wide, k=wide, v=wide)
        return jax.shard_map(function, in_specs=(specs,), out_specs=(wide, narrow), check_vma=False)(operands)

"""Attention block by block in plain JAX (FlashAttention, 2205.14135, 2307.08691): memory linear in the length.

Each block of queries visits the blocks of keys that it sees, with a running maximum and sum. The backward pass
recomputes the weights from the logarithm of that sum. Empty blocks are skipped, and the mask is evaluated in partial
blocks only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from .blocks import EMPTY, FULL, PARTIAL, Blocks, block_size, padded
from .pair_function import Value, positions
from .problem import Gradients, Operands, Problem, differentiable, gradients_like

SCOPE = "blockwise_attention"
"""The name scope of its operations in a compiled program."""
BLOCK = 512
"""The number of queries, and of keys, of a block."""
TILE_BYTES = 2**26
"""Sequences are processed one at a time if the logits of a block of all of them would take more."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """The operands of one sequence and one key/value head; lengths are padded to whole blocks."""

    q: Float[Array, "G T H"]
    k: Float[Array, "S H"]
    v: Float[Array, "S Hv"]
    mask_hoisted: list[Array]
    """(G or 1, T or S or 1)."""
    score_hoisted: list[Array]
    dropout_rows: Array | None
    query_positions: Int[Array, " T"]
    key_positions: Int[Array, " S"]
    blocks: Blocks | None
    """None if there is a single block."""


@jax.named_scope(SCOPE)
def forward(problem: Problem, operands: Operands) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and the logarithm of the sum of exponentials of each row, -inf where a query sees no key."""
    work = _Work(problem, operands)

    out, lse = work.each(lambda part: work.rows(lambda row: work.forward(part, row)), work.part)
    return _ungrouped(out, operands.q.shape[1], problem.out_dtype), _rows_of(lse, operands.q.shape[1])


@jax.named_scope(SCOPE)
def backward(problem: Problem, operands: Operands, lse: Array, delta: Array, g_out: Array) -> Gradients:
    """Gradients; `delta` is the sum over Hv of out * g_out, less the cotangent of lse (B N T)."""
    work = _Work(problem, operands)
    rows = work.row_arrays(g_out, lse, delta)
    q, k, v, hoisted = work.each(lambda args: work.backward(*args), (work.part, rows))
    like_q, *like, like_hoisted = gradients_like(problem, operands)
    q = _ungrouped(q, like_q.shape[1], like_q.dtype)
    k, v = (jnp.swapaxes(x, 1, 2)[:, : y.shape[1]].astype(y.dtype) for x, y in zip((k, v), like, strict=True))
    return q, k, v, [_reduced(x, y) for x, y in zip(hoisted, like_hoisted, strict=True)]


def tangent(
    problem: Problem, operands: Operands, out: Array, lse: Array, tangents: Gradients
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """The directional derivative of `forward`."""
    work = _Work(problem, operands)
    t_q, t_k, t_v, t_hoisted = tangents
    hoisted = iter(t_hoisted)
    moved = operands._replace(
        q=t_q,
        k=t_k,
        v=t_v,
        score_hoisted=[next(hoisted) if differentiable(x) else jnp.zeros_like(x) for x in operands.score_hoisted],
    )
    rows = work.row_arrays(out, lse)
    t_out, t_lse = work.each(lambda args: work.tangent(*args), (work.part, work.parts_of(moved), rows))
    return _ungrouped(t_out, operands.q.shape[1], problem.out_dtype), _rows_of(t_lse, operands.q.shape[1])


class _Work:
    """A problem split into parts and blocks."""

    def __init__(self, problem: Problem, operands: Operands):
        self.problem = problem
        (self.batch, queries, heads, _), (self.keys, self.kv_heads) = operands.q.shape, operands.k.shape[1:3]
        self.group = heads // self.kv_heads
        self.block_q, self.block_k = (block_size(length, BLOCK, 8) for length in (queries, self.keys))
        self.row_count, self.column_count = -(-queries // self.block_q), -(-self.keys // self.block_k)
        single = self.row_count * self.column_count == 1
        self.blocks = None if single else problem.blocks(operands, self.block_q, self.block_k)
        self.kinds = [PARTIAL] if self.blocks is None else _kinds(self.blocks)
        self.part = self.parts_of(operands)

    # Parts ------------------------------------------------------------------------------------------------------------

    def parts_of(self, operands: Operands) -> Part:
        """All parts: arrays with leading dimensions (B or 1, K or 1)."""
        problem, rows = self.problem, operands.dropout_rows
        index = positions(problem.sizes(operands))
        grouped = padded(jnp.swapaxes(operands.q, 1, 2), -2, self.block_q)
        return Part(
            q=grouped.reshape(self.batch, self.kv_heads, self.group, *grouped.shape[2:]),
            k=padded(jnp.swapaxes(operands.k, 1, 2), -2, self.block_k),
            v=padded(jnp.swapaxes(operands.v, 1, 2), -2, self.block_k),
            mask_hoisted=self.hoisted_of(problem.mask.hoisted, problem.mask_values(operands)),
            score_hoisted=[]
            if problem.score is None
            else self.hoisted_of(problem.score.hoisted, operands.score_hoisted),
            dropout_rows=None if rows is None else self.headed(rows),
            query_positions=padded(index["query"], 2, self.block_q, None),
            key_positions=padded(index["key"], 2, self.block_k, None),
            blocks=jax.tree.map(jnp.asarray, self.blocks),
        )

    def hoisted_of(self, values: Any, hoisted: list[Any]) -> list[Array]:
        """Hoisted values as (B or 1, K or 1, G or 1, padded length, ...)."""
        blocks = {"query": self.block_q, "key": self.block_k, "neither": 1}
        # Padding repeats a real entry: a score may divide by it.
        return [
            self.headed(padded(jnp.asarray(array), 2, blocks[value.side], None))
            for value, array in zip(values, hoisted, strict=True)
        ]

    def headed(self, array: Array) -> Array:
        """(B, N or 1, ...) as (B, K or 1, G or 1, ...)."""
        heads = (1, 1) if array.shape[1] == 1 else (self.kv_heads, self.group)
        return array.reshape(array.shape[0], *heads, *array.shape[2:])

    def row_arrays(self, wide: Array, *narrow: Array) -> tuple[Array, ...]:
        """Arrays of queries, B T N V and B N T, as (B K G T ...); lse is inf for rows that see no key."""
        wide = self.headed(padded(jnp.swapaxes(wide, 1, 2), 2, self.block_q))
        lse, *rest = narrow
        lse = padded(jnp.where(lse == -jnp.inf, jnp.inf, lse), 2, self.block_q, jnp.inf)
        return wide, *(self.headed(x) for x in (lse, *(padded(x, 2, self.block_q) for x in rest)))

    def each(self, function: Callable[[Any], Any], parts: Any) -> Any:
        """Applies a function to every part; results have leading dimensions (B, K)."""
        tile = self.batch * self.kv_heads * self.group * self.block_q * self.block_k * 4
        of_batch, of_head = (self.blocks is not None and self.blocks.low.shape[axis] > 1 for axis in (0, 1))

        def heads(part: Any) -> Any:
            return _over(function, part, self.kv_heads, of_head)

        return _over(heads, parts, self.batch, of_batch or tile > TILE_BYTES)

    # Blocks -----------------------------------------------------------------------------------------------------------

    def rows(self, function: Callable[[Any], tuple[Array, Array]]) -> tuple[Array, Array]:
        """The results of all rows of blocks, (G block_q ...), concatenated."""
        if self.row_count == 1:
            return function(0)
        results = jax.lax.map(function, jnp.arange(self.row_count, dtype=jnp.int32))
        return _joined(results[0]), _joined(results[1])

    def columns(self, part: Part, row: Any, step: Callable[[Any, bool, Any], Any], start: Any) -> Any:
        """Carries `step(column, masked, carry)` through the blocks of a row that are not empty."""

        def visit(column: Any, carry: Any) -> Any:
            if len(self.kinds) == 1:
                return step(column, PARTIAL in self.kinds, carry) if EMPTY not in self.kinds else carry
            cases = {
                EMPTY: lambda carry: carry,
                PARTIAL: lambda carry: step(column, True, carry),
                FULL: lambda carry: step(column, False, carry),
            }
            branches = [cases[kind] for kind in self.kinds]
            assert part.blocks is not None
            kind = part.blocks.kind(row, column)
            index = sum((kind > other).astype(jnp.int32) for other in self.kinds[:-1])
            return jax.lax.switch(index, branches, carry)

        if part.blocks is None:
            return visit(0, start)
        return jax.lax.fori_loop(part.blocks.low[row], part.blocks.high[row], visit, start)

    def cut(self, array: Array, index: Any, block: int, axis: int) -> Array:
        """Block `index` of an array along an axis."""
        if array.shape[axis] == block:
            return array
        return jax.lax.dynamic_slice_in_dim(array, index * block, block, axis)

    def query_index(self, part: Part, row: Any) -> Array:
        """The positions of a block of queries, (block_q 1)."""
        return self.cut(part.query_positions, row, self.block_q, 0)[:, None]

    def key_index(self, part: Part, column: Any) -> Array:
        """The positions of a block of keys, (block_k)."""
        return self.cut(part.key_positions, column, self.block_k, 0)

    def read(self, part: Part, row: Any, column: Any, score: Array | None, hoisted: Any) -> Callable[[Value], Array]:
        """A function that returns leaves and hoisted values of a block, to broadcast to (G, block_q, block_k)."""

        def read(value: Value) -> Array:
            match value.leaf:
                case "score":
                    assert score is not None
                    return score
                case "query":
                    return self.query_index(part, row)
                case "key":
                    return self.key_index(part, column)
            array = hoisted[value]
            if value.shape:
                return array
            if value.side == "query":
                return self.cut(array, row, self.block_q, 1)[..., None]
            return (self.cut(array, column, self.block_k, 1) if value.side == "key" else array)[:, None]

        return read

    def visible(self, part: Part, row: Any, column: Any) -> Array:
        """Which pairs of a partial block are visible."""
        hoisted = dict(zip(self.problem.mask.hoisted, part.mask_hoisted, strict=True))
        (seen,) = self.problem.mask.evaluate(self.read(part, row, column, None, hoisted))
        if self.keys % self.block_k:
            seen = seen & (column * self.block_k + jnp.arange(self.block_k, dtype=jnp.int32) < self.keys)
        return seen

    def scored(self, part: Part, row: Any, column: Any, score: Array, hoisted: list[Array]) -> Array:
        """The score function on a block."""
        function = self.problem.score
        if function is None:
            return score
        values = dict(zip(function.hoisted, hoisted, strict=True))
        return function.evaluate(self.read(part, row, column, score, values))[0]

    def dropped(self, part: Part, row: Any, column: Any, weights: Array) -> Array:
        """The weights of a block after dropout."""
        if part.dropout_rows is None:
            return weights
        factor = self.problem.dropout_factor(
            part.dropout_rows[..., None], self.query_index(part, row), self.key_index(part, column)
        )
        return weights * factor

    def logits(self, part: Part, row: Any, column: Any, masked: bool) -> Array:
        """The logits of a block, -inf for pairs that are not visible."""
        q, k = self.cut(part.q, row, self.block_q, 1), self.cut(part.k, column, self.block_k, 0)
        score = _product("GTH,SH->GTS", q, k) * self.problem.scale
        score = self.scored(part, row, column, score, part.score_hoisted)
        return jnp.where(self.visible(part, row, column), score, -jnp.inf) if masked else score

    # The three passes -------------------------------------------------------------------------------------------------

    def forward(self, part: Part, row: Any) -> tuple[Array, Array]:
        """One block of queries: (G block_q Hv), (G block_q)."""

        def step(column: Any, masked: bool, carry: Any) -> Any:
            logits = self.logits(part, row, column, masked)
            highest = jnp.max(logits, axis=-1, keepdims=True)
            highest = highest if carry is None else jnp.maximum(carry[0], highest)
            base = jnp.where(highest == -jnp.inf, 0.0, highest) if masked else highest
            weights = jnp.exp(logits - base)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            v = self.cut(part.v, column, self.block_k, 0)
            mixed = _product("GTS,SV->GTV", self.dropped(part, row, column, weights).astype(v.dtype), v)
            if carry is None:
                return highest, total, mixed
            shrink = jnp.exp(carry[0] - base)
            return highest, carry[1] * shrink + total, carry[2] * shrink + mixed

        shape = (self.group, self.block_q)
        start = (jnp.full((*shape, 1), -jnp.inf), jnp.zeros((*shape, 1)), jnp.zeros((*shape, part.v.shape[-1])))
        highest, total, mixed = self.columns(part, row, step, None if part.blocks is None else start)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        return mixed / total, jnp.where(empty, -jnp.inf, highest + jnp.log(total))[..., 0]

    def backward(self, part: Part, rows: tuple[Array, Array, Array]) -> tuple[Array, Array, Array, list[Array]]:
        """Gradients of one part: q (G T H), k (S H), v (S Hv), and the differentiable hoisted values of the score."""
        trained = [differentiable(x) for x in part.score_hoisted]

        def row_step(row: Any, carry: Any) -> Any:
            g_out, lse, delta = (self.cut(x, row, self.block_q, 1) for x in rows)
            q = self.cut(part.q, row, self.block_q, 1)

            def step(column: Any, masked: bool, carry: Any) -> Any:
                q_grad, k_grad, v_grad, side_grads = carry
                k, v = (self.cut(x, column, self.block_k, 0) for x in (part.k, part.v))
                score = _product("GTH,SH->GTS", q, k) * self.problem.scale
                floats = [x for x, is_trained in zip(part.score_hoisted, trained, strict=True) if is_trained]

                def scored(score: Array, floats: list[Array]) -> Array:
                    rest = iter(floats)
                    arrays = zip(part.score_hoisted, trained, strict=True)
                    hoisted = [next(rest) if is_trained else x for x, is_trained in arrays]
                    return self.scored(part, row, column, score, hoisted)

                logits, pull = jax.vjp(scored, score, floats)
                logits = jnp.where(self.visible(part, row, column), logits, -jnp.inf) if masked else logits
                weights = jnp.exp(logits - lse[..., None])
                weights_grad = self.dropped(part, row, column, _product("GTV,SV->GTS", g_out, v))
                logits_grad = weights * (weights_grad - delta[..., None])
                score_grad, floats_grad = pull(logits_grad)
                score_grad = (score_grad * self.problem.scale).astype(q.dtype)
                q_grad = q_grad + _product("GTS,SH->GTH", score_grad, k)
                k_grad = self.added(k_grad, column, _transposed_product("GTH,GTS->HS", q, score_grad))
                weights = self.dropped(part, row, column, weights).astype(v.dtype)
                v_grad = self.added(v_grad, column, _transposed_product("GTV,GTS->VS", g_out, weights))
                return q_grad, k_grad, v_grad, jax.tree.map(jnp.add, side_grads, floats_grad)

            q_grads, *others = carry
            q_grad, *others = self.columns(part, row, step, (jnp.zeros(q.shape, jnp.float32), *others))
            return (self.replaced(q_grads, row, q_grad), *others)

        zeros = [jnp.zeros(x.shape, jnp.float32) for x in (part.q, part.k, part.v)]
        hoisted = [
            jnp.zeros(x.shape, x.dtype) for x, is_trained in zip(part.score_hoisted, trained, strict=True) if is_trained
        ]
        if self.row_count == 1:
            return row_step(0, (*zeros, hoisted))
        return jax.lax.fori_loop(0, self.row_count, row_step, (*zeros, hoisted))

    def replaced(self, rows: Array, row: Any, block: Array) -> Array:
        """`rows` with a block of queries (G block_q ...) written."""
        return block if self.row_count == 1 else jax.lax.dynamic_update_slice_in_dim(rows, block, row * self.block_q, 1)

    def added(self, columns: Array, column: Any, block: Array) -> Array:
        """`columns` with a block of keys (block_k ...) added."""
        if self.column_count == 1:
            return columns + block
        block = block + self.cut(columns, column, self.block_k, 0)
        return jax.lax.dynamic_update_slice_in_dim(columns, block, column * self.block_k, 0)

    def tangent(self, part: Part, moved: Part, rows: tuple[Array, Array]) -> tuple[Array, Array]:
        """Directional derivatives of one part: (G T Hv), (G T)."""

        def tangent_of_row(row: Any) -> tuple[Array, Array]:
            out, lse = (self.cut(x, row, self.block_q, 1) for x in rows)

            def step(column: Any, masked: bool, carry: Any) -> Any:
                def logits(q: Array, k: Array, hoisted: list[Array]) -> Array:
                    return self.logits(replace(part, q=q, k=k, score_hoisted=hoisted), row, column, False)

                arrays = [(part.q, part.k, part.score_hoisted), (moved.q, moved.k, moved.score_hoisted)]
                primals, tangents = (
                    (self.cut(q, row, self.block_q, 1), self.cut(k, column, self.block_k, 0), s) for q, k, s in arrays
                )
                tangents = jax.tree.map(_tangent_type, primals, tangents)
                score, t_score = jax.jvp(logits, primals, tangents)
                score = jnp.where(self.visible(part, row, column), score, -jnp.inf) if masked else score
                weights = jnp.exp(score - lse[..., None])
                t_weights = jnp.where(weights == 0.0, 0.0, weights * t_score)
                v, t_v = (self.cut(x, column, self.block_k, 0) for x in (part.v, moved.v))
                t_lse, t_out = carry
                t_lse = t_lse + jnp.sum(t_weights, axis=-1)
                for weight, value in ((t_weights, v), (weights, t_v)):
                    weight = self.dropped(part, row, column, weight).astype(v.dtype)
                    t_out = t_out + _product("GTS,SV->GTV", weight, value)
                return t_lse, t_out

            start = (jnp.zeros(lse.shape), jnp.zeros(out.shape, jnp.float32))
            t_lse, t_out = self.columns(part, row, step, start)
            return t_out - t_lse[..., None] * out.astype(jnp.float32), t_lse

        return self.rows(tangent_of_row)


def _over(function: Callable[[Any], Any], tree: Any, count: int, looped: bool) -> Any:
    """Applies a function to each entry of the leading dimension of all leaves; leaves of 1 entry are shared."""
    leaves, structure = jax.tree.flatten(tree)

    def call(entries: Any) -> Any:
        rest = iter(entries)
        return function(structure.unflatten([leaf[0] if leaf.shape[0] == 1 else next(rest) for leaf in leaves]))

    if count == 1:
        return jax.tree.map(lambda x: x[None], call([]))
    split = [leaf for leaf in leaves if leaf.shape[0] > 1]
    return jax.lax.map(call, split) if looped else jax.vmap(call)(split)


def _product(axes: str, x: Array, y: Array) -> Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _transposed_product(axes: str, x: Array, y: Array) -> Array:
    """The transposed product; XLA on CPU transposes the left factor of a product in memory, so it is the smaller one.

    The barrier keeps XLA from swapping the factors, which gives a product that its CPU runtime lacks for bfloat16.
    """
    return jax.lax.optimization_barrier(_product(axes, x, y)).T


def _tangent_type(x: Array, tangent: Array) -> Any:
    return tangent if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0)


def _kinds(blocks: Blocks) -> list[int]:
    """The kinds that blocks between the first and the last of a row may have."""
    if isinstance(blocks.low, Tracer):
        return [EMPTY, PARTIAL, FULL]
    column = np.arange(int(np.max(blocks.high, initial=0)))
    within = (column >= blocks.low[..., None]) & (column < blocks.high[..., None])
    return sorted(set(blocks.kinds(len(column))[within].tolist())) or [EMPTY]


def _joined(x: Array) -> Array:
    """(rows G block ...) as (G T ...)."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _ungrouped(x: Array, length: int, dtype: Any) -> Array:
    """B K G T V as B T N V."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)[:, :length].astype(dtype)


def _rows_of(x: Array, length: int) -> Array:
    """B K G T as B N T."""
    return x.reshape(x.shape[0], -1, x.shape[3])[:, :, :length]


def _reduced(x: Array, like: Any) -> Array:
    """The gradient of a hoisted value from those of all parts (B K G length ...): summed where it is shared."""
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    if like.shape[1] == 1 and x.shape[1] > 1:
        x = jnp.sum(x, axis=1, keepdims=True)
    if like.shape[0] == 1 and x.shape[0] > 1:
        x = jnp.sum(x, axis=0, keepdims=True)
    return x[:, :, : like.shape[2]].astype(like.dtype)

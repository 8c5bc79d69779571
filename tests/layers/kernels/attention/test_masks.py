"""Masks against their definition in plain Python, and their blocks against every pair, for random expressions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.kernels.attention import attend, blocks
from flaxzoo.layers.kernels.attention import pair_function as pairs
from flaxzoo.layers.kernels.attention.masks import (
    BlockSparse,
    Causal,
    Chunked,
    Dense,
    Documents,
    Full,
    Lengths,
    Mask,
    PerHead,
    Prefix,
    Where,
    Window,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_masks import Sees, array, masks

B, N, T, S = 2, 2, 7, 9
MASKS = masks(B, N, T, S)


def slowly(sees: Sees, offset: int = 0) -> np.ndarray:
    return np.array(
        [[[[bool(sees(b, h, q + offset, k)) for k in range(S)] for q in range(T)] for h in range(N)] for b in range(B)]
    )


def visible(mask: Mask) -> np.ndarray:
    batch, head = jnp.arange(B)[:, None, None, None], jnp.arange(N)[:, None, None]
    return np.broadcast_to(mask.visible(batch, head, jnp.arange(T)[:, None], jnp.arange(S)), (B, N, T, S))


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_expressions_are_as_defined(case):
    mask, sees = case
    np.testing.assert_array_equal(visible(mask), slowly(sees))


def kinds(found: blocks.Blocks, rows: int, columns: int) -> np.ndarray:
    """The kinds (B or 1, N or 1, rows, columns), as `Blocks.kind` reads them."""
    lead = found.words.shape[:2]
    flat = np.asarray(found.words).reshape(-1, *found.words.shape[2:])
    each = [blocks.Blocks(words, found.low, found.high) for words in flat]
    return np.array([[[one.kind(r, c) for c in range(columns)] for r in range(rows)] for one in each]).reshape(
        *lead, rows, columns
    )


@settings(max_examples=40, deadline=None)
@given(MASKS, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans())
def test_blocks_are_never_called_empty_or_full_that_are_not(case, block_q, block_k, traced, transposed):
    mask, sees = case
    function, sizes = pairs.trace(mask.visible), pairs.Sizes(B, N, T, S)

    def classify(hoisted: Any) -> blocks.Blocks:
        return blocks.classify(function, hoisted, sizes, block_q, block_k, kv_heads=N, transposed=transposed)

    hoisted = function.hoisted_values(sizes)
    found = jax.jit(classify)(hoisted) if traced else classify([np.asarray(side) for side in hoisted])
    assert traced or isinstance(found.words, np.ndarray)
    rows, columns = -(-T // block_q), -(-S // block_k)
    said = kinds(found, *((columns, rows) if transposed else (rows, columns)))
    low, high = (np.asarray(x)[..., None] for x in (found.low, found.high))
    place = np.arange(said.shape[-1])
    np.testing.assert_array_equal((said > 0) & ~((place >= low) & (place < high)), False)
    assert ((low == high) | (np.take_along_axis(said, low, -1) > 0)).all()
    said = np.broadcast_to(np.swapaxes(said, 2, 3) if transposed else said, (B, N, rows, columns))
    seen = slowly(sees)
    for row in range(rows):
        for column in range(columns):
            block = seen[:, :, row * block_q :, column * block_k :][:, :, :block_q, :block_k]
            kind = said[:, :, row, column]
            assert not (block.any((2, 3)) & (kind == blocks.EMPTY)).any()
            assert not (~block.all((2, 3)) & (kind == blocks.FULL)).any()


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Causal() & Window(5),
        ~Causal(),
        Chunked(3),
        Window(2, 3),
        Prefix(4),
        Documents(array([[1, 1, 1, 2, 2, 3, 3, 3, 3]] * B)),
        Dense(array(np.random.default_rng(0).random((B, N, S, S)) < 0.2, bool)),
        BlockSparse(array(np.random.default_rng(0).random((B, N, 3, 3)) < 0.5, bool), 3),
        Where(
            lambda b, h, q, k: jnp.sin(q.astype(jnp.float32)) + jnp.cos(k.astype(jnp.float32)) > h.astype(jnp.float32)
        ),
    ],
    ids=lambda mask: type(mask).__name__,
)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_blocks_are_called_what_they_are(mask, size):
    """For these masks intervals, tables or a look at every pair say exactly what a block is."""
    function, sizes = pairs.trace(mask.visible), pairs.Sizes(B, N, S, S)
    found = blocks.classify(function, function.hoisted_values(sizes), sizes, size, size, kv_heads=N)
    count = -(-S // size)
    said = np.broadcast_to(kinds(found, count, count), (B, N, count, count))
    index = np.broadcast_arrays(*np.ogrid[:B, :N, :S, :S])
    seen = np.asarray(jax.vmap(mask.visible)(*(x.reshape(-1).astype(np.int32) for x in index))).reshape(B, N, S, S)
    for row in range(count):
        for column in range(count):
            block = seen[:, :, row * size :, column * size :][:, :, :size, :size]
            whole = column * size + size <= S
            wanted = block.any((2, 3)) * 1 + (block.all((2, 3)) & whole)
            np.testing.assert_array_equal(said[:, :, row, column], wanted)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_a_million_tokens_are_classified_within_a_mebibyte(name, traced):
    length = 2**20
    ids = array(np.repeat(np.arange(1, 257), length // 256))[None]
    mask = {"causal": Causal(), "window": Causal() & Window(4096), "documents": Causal() & Documents(ids)}[name]
    function, sizes = pairs.trace(mask.visible), pairs.Sizes(1, 8, length, length)

    def classify(hoisted: Any) -> blocks.Blocks:
        return blocks.classify(function, hoisted, sizes, 1024, 1024, kv_heads=1)

    hoisted = function.hoisted_values(sizes)
    found = jax.jit(classify)(hoisted) if traced else classify([np.asarray(side) for side in hoisted])
    assert found.nbytes < 2**20
    rows = np.arange(1024)
    np.testing.assert_array_equal(found.high[0, 0], rows + 1)
    first = {"causal": rows * 0, "window": np.maximum(rows - 4, 0), "documents": rows // 4 * 4}[name]
    np.testing.assert_array_equal(found.low[0, 0], first)
    assert found.words.shape == (1, 1, 1024, 64)


@settings(deadline=None)
@given(MASKS)
def test_attend_gives_the_mean_of_visible_values(case):
    mask, sees = case
    seen = slowly(sees)
    assume(seen.any())
    values = np.random.default_rng(0).normal(size=(B, S, N, 3)).astype(np.float32)
    wanted = np.einsum("BNTS,BSNH->BTNH", seen, values) / np.maximum(np.moveaxis(seen.sum(-1), 1, 2), 1)[..., None]
    q, k = jnp.zeros((B, T, N, 4)), jnp.zeros((B, S, N, 4))
    found = jax.jit(lambda mask: attend(q, k, jnp.asarray(values), mask=mask))(mask)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0), "left and right must be 1 or more and at most 1073741824, got left=0, right=1"),
        (lambda: Chunked(0), "at least 1 position, got size=0"),
        (lambda: PerHead((Causal(),), (0, 1)), r"one of 1 masks for each head, got \(0, 1\)"),
    ],
)
def test_numbers_that_make_no_mask(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_chunk_has_no_positions_before_it():
    """Positions before the keys are in chunks of their own."""
    x = jnp.ones((1, 8, 1, 8))
    out = attend(x, x, x, mask=Chunked(4), query_offset=-4)
    np.testing.assert_array_equal(out[0, :, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1])


@settings(max_examples=100, deadline=None)
@given(MASKS | st.builds(lambda case: (case[0] & ~case[0], lambda *_: False), MASKS), st.sampled_from([1, 4, 16]))
def test_a_mask_is_said_to_hide_everything_only_if_it_does(case, block):
    mask, sees = case
    function, sizes = pairs.trace(mask.visible), pairs.Sizes(B, N, T, S)
    hoisted = [np.asarray(side) for side in function.hoisted_values(sizes)]
    found = blocks.classify(function, hoisted, sizes, block, block, kv_heads=N)
    hidden = blocks.hides_everything(function, hoisted, sizes, found, block)
    assert not (hidden and slowly(sees).any())


NOTHING = {
    "never": ~Full(),
    "a mask and its opposite": Causal() & ~Causal(),
    "a window in a larger one": Window(3, 2) & ~Window(4, 2),
    "one chunk and another": Chunked(7) & ~Chunked(7),
    "later keys, of which there are none": ~Causal() & Lengths(keys=1),
    "beyond the length": Causal() & ~Window(1000),
    "no document": Causal() & Documents(jnp.zeros((1, 1000), jnp.int32)),
    "an order against documents": Causal() & ~Causal() & Documents(jnp.ones((1, 1000), jnp.int32)),
}
SOMETHING = {
    "one pair": Causal() & ~Window(999),
    "own key": Window(1),
    "one query": Lengths(queries=1) & Causal(),
    "last document": Documents(jnp.zeros((1, 1000), jnp.int32).at[0, 999].set(1)),
}


@pytest.mark.parametrize("name", NOTHING | SOMETHING)
def test_a_mask_that_hides_everything_is_refused(name):
    x = jax.ShapeDtypeStruct((1, 1000, 1, 8), jnp.float32)

    def call(mask: Mask) -> Any:
        return jax.eval_shape(lambda x: attend(x, x, x, mask=mask), x)

    if name in SOMETHING:
        assert call(SOMETHING[name]).shape == x.shape
    else:
        with pytest.raises(ValueError, match="the mask hides every key from every query"):
            call(NOTHING[name])


@pytest.mark.parametrize("mask", [Causal() & Window(4096), Window(1), Causal() & ~Causal()], ids=str)
def test_no_time_is_lost_looking_for_a_visible_pair(mask, monkeypatch):
    """However long the sequence, so many blocks are looked at in all."""
    looked: list[int] = []
    visible = blocks._visible

    def count(*arguments: Any) -> Any:
        looked.append(arguments[6][0].size)
        return visible(*arguments)

    function, sizes = pairs.trace(mask.visible), pairs.Sizes(1, 1, 2**19, 2**19)
    found = blocks.classify(function, [], sizes, 512, 512, kv_heads=1)
    monkeypatch.setattr(blocks, "_visible", count)
    assert not blocks.hides_everything(function, [], sizes, found, 512)
    assert sum(looked) < 10 * 64 + 2 * blocks.SEARCHED

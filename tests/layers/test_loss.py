"""Chunked cross-entropy against the plain definition with all logits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.layers.loss import cross_entropy
from jax.sharding import PartitionSpec as P

pytestmark = pytest.mark.usefixtures("quick_compiler")
B, T, D, V = 2, 37, 12, 29
CASES = {
    "plain": {},
    "soft cap": {"soft_cap": 2.0},
    "z-loss": {"z_loss": 0.1},
    "all": {"soft_cap": 2.0, "z_loss": 0.1},
}


def inputs(batch=B, length=T, vocab=V, dim=D, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (batch, length, dim)).astype(dtype)
    head = jax.random.normal(keys[1], (vocab, dim)).astype(dtype)
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab, jnp.int32)
    return hidden, head, targets, jax.random.choice(keys[3], jnp.asarray([0.0, 1.0, 1.0, 0.5]), (batch, length))


def plain(hidden, head, targets, weights, *, soft_cap=None, z_loss=0.0):
    logits = jnp.einsum("BTD,VD->BTV", hidden, head).astype(jnp.float32)
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((nll + z_loss * log_z**2) * weights), jnp.sum(nll * weights)


def outcome(function, data, **options):
    """Loss, likelihood, and the gradients in hidden states and head (of 3 times the loss)."""

    def scaled(hidden, head):
        loss, nll = function(hidden, head, *data[2:], **options)
        return loss * 3, (loss, nll)

    gradients, (loss, nll) = jax.jit(jax.grad(scaled, (0, 1), has_aux=True))(*data[:2])
    return [np.asarray(x.astype(jnp.float32)) for x in (loss, nll, *gradients)]


@functools.cache
def wanted(name):
    return outcome(plain, inputs(), **CASES[name])


# 37 tokens a row: neither chunk divides them; 1000 takes all at once.
@pytest.mark.parametrize(
    ("name", "chunk"), [*((n, c) for n in CASES for c in (10, 1000)), *(("all", c) for c in (1, 74))]
)
def test_value_and_gradients(name, chunk):
    for found, expected in zip(outcome(cross_entropy, inputs(), chunk=chunk, **CASES[name]), wanted(name), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_value_without_gradient():
    found = cross_entropy(*inputs(), chunk=10, **CASES["all"])
    np.testing.assert_allclose(found, wanted("all")[:2], rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_weight_zero_leave_no_trace(name):
    hidden, head, targets, weights = inputs()
    masked = np.asarray(weights) == 0
    assert masked.any()
    other = outcome(
        cross_entropy,
        (jnp.where(masked[..., None], 7.0, hidden), head, jnp.where(masked, 0, targets), weights),
        chunk=10,
        **CASES[name],
    )
    for found, expected in zip(other, wanted(name), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not other[2][masked].any()


def test_all_weights_zero():
    data = (*inputs()[:3], jnp.zeros((B, T)))
    assert not any(np.any(x) for x in outcome(cross_entropy, data, chunk=10, **CASES["all"]))


def test_large_logits_overflow_nothing():
    hidden, *rest = inputs()
    found, expected = (outcome(f, (hidden * 1e4, *rest), **o) for f, o in ((cross_entropy, {"chunk": 10}), (plain, {})))
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4 * np.abs(other).max())


def test_bfloat16_errs_no_more_than_twice_the_plain_definition():
    data = inputs(dim=64, dtype=jnp.bfloat16)
    exact = outcome(plain, tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in data), **CASES["all"])
    same, found = outcome(plain, data, **CASES["all"]), outcome(cross_entropy, data, chunk=10, **CASES["all"])
    np.testing.assert_allclose(found[:2], exact[:2], rtol=1e-5)  # the logits themselves are float32
    for name, one, plainly, true in zip(("hidden", "head"), found[2:], same[2:], exact[2:], strict=True):
        error, allowed = (np.sqrt(np.mean((x - true) ** 2)) for x in (one, plainly))
        assert 0 < error <= 2 * allowed, name


def test_gradients_have_the_dtypes_of_hidden_and_head():
    hidden, head, targets, weights = inputs()
    call = jax.grad(lambda hidden, head: cross_entropy(hidden, head, targets, weights)[0], (0, 1))
    gradients = jax.eval_shape(call, hidden.astype(jnp.bfloat16), head)
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32]


def test_the_reported_likelihood_has_no_gradient():
    hidden, head, targets, weights = inputs()
    gradient = jax.grad(lambda hidden: cross_entropy(hidden, head, targets, weights, z_loss=0.1)[1])(hidden)
    assert not np.any(gradient)


def largest_array(function, *arguments) -> int:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|pred)\[([0-9,]+)\]", text)
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


def test_no_array_holds_the_logits_of_more_than_a_chunk():
    length, vocab, chunk = 60, 1009, 12
    data = inputs(length=length, vocab=vocab, dim=8)

    def gradient(function, **options):
        return jax.grad(lambda hidden, head: function(hidden, head, *data[2:], **options)[0], (0, 1))

    assert largest_array(gradient(cross_entropy, chunk=chunk), *data[:2]) == chunk * vocab
    assert largest_array(gradient(plain), *data[:2]) >= B * length * vocab  # the measure sees them where they are


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("chunk", [5, 1000])
def test_over_a_mesh(sizes, chunk):
    data = inputs(batch=8, length=11, vocab=24, dim=16)
    expected = outcome(plain, data, **CASES["all"])
    with jax.set_mesh(jax.make_mesh(tuple(sizes.values()), tuple(sizes))):
        rows = P(tuple(name for name in ("data", "fsdp") if name in sizes))
        head = P("tensor" if "tensor" in sizes else None, "fsdp")
        placed = [jax.device_put(x, head if i == 1 else rows) for i, x in enumerate(data)]
        found = outcome(cross_entropy, placed, chunk=chunk, **CASES["all"])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

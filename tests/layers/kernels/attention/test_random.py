"""Every implementation of attend against the plain definition, for random masks, shapes and types."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import VARIANTS, Case, assert_close, ours, outcomes, plain, visible
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_masks import masks

pytestmark = pytest.mark.usefixtures("quick_compiler")

IN_BLOCKS = [variant for variant in VARIANTS if variant != "portable"]
HEADS = [(1, 1), (3, 3), (2, 1), (3, 1), (4, 2), (8, 2), (4, 1)]
SIZES = [40, 64, 72, 80, 128, 192, 256]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Of up to three blocks of queries and of keys."""
    queries, keys, offset = (draw(st.integers(low, high)) for low, high in ((1, 40), (1, 40), (0, 9)))
    heads, kv_heads = draw(st.sampled_from(HEADS))
    size, value_size = draw(st.sampled_from(SIZES)), draw(st.sampled_from([None, *SIZES]))
    mask, _ = draw(masks(2, heads, offset + queries, keys))
    offsets = draw(st.sampled_from([offset, jnp.asarray([offset, 0], jnp.int32)]))
    case = Case((queries, keys, heads, kv_heads, size, value_size or size), mask, {"query_offset": offsets})
    assume(np.asarray(visible(case)).any())
    return case


def chosen(case: Case, variant: str, dtype: Any) -> dict[str, Any]:
    """`attend` by this implementation, or by `portable` where it refuses."""
    call = ours(case, variant)
    try:
        jax.eval_shape(lambda inputs: call(**inputs), case.inputs(dtype))
    except NotImplementedError:
        assert variant.startswith("tpu")
        call = ours(case, "portable in blocks")
    return {"found": call}


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(cases(), st.sampled_from(IN_BLOCKS))
def test_float32_equals_the_definition(case: Case, variant: str) -> None:
    found = outcomes(case.inputs(), plain=functools.partial(plain, case), **chosen(case, variant, jnp.float32))
    assert_close(found["found"], found["plain"])


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(cases(), st.sampled_from(IN_BLOCKS), st.sampled_from([jnp.bfloat16, jnp.float16]))
def test_low_precision_errs_no_more_than_twice_the_definition(case: Case, variant: str, dtype: Any) -> None:
    rounded, definition = case.inputs(dtype), functools.partial(plain, case)
    exact = outcomes({name: x.astype(jnp.float32) for name, x in rounded.items()}, plain=definition)["plain"]
    found = outcomes(rounded, plain=definition, **chosen(case, variant, dtype))
    for part, value in found["found"].items():
        error, allowed = (np.sqrt(np.mean((x - exact[part]) ** 2)) for x in (value, found["plain"][part]))
        assert error <= 2 * allowed, part

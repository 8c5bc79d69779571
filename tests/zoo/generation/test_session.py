"""Sessions that go back, and texts whose positions turn by how long they are."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flaxzoo.layers.mixers.caches import SLACK
from flaxzoo.layers.mixers.mixer import Cache
from flaxzoo.zoo import GREEDY, Speculation
from flaxzoo.zoo.generation.session import Session

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[2] / "truth"


def opened(model, **options) -> Session:
    return Session(model, batch=1, length=60, sampling=GREEDY, key=jax.random.key(0), **options)


@pytest.mark.parametrize(("guesses", "back", "reused"), [(0, 16, 24), (0, 17, 0), (8, 8, 32), (8, 9, 0)])
def test_a_ring_has_lost_what_refused_guesses_took(guesses, back, reused, models):
    """A pass over 8 guesses writes up to 8 tokens further than the row goes on."""
    one = opened(models["mixed"], speculation=Speculation(tokens=guesses) if guesses else None)
    one.ids = [[1] * 41]
    one.state = dataclasses.replace(one.state, lengths=one.state.lengths + 40)
    assert one.rewind([1] * (40 - back) + [2, 2]) == reused


def test_a_prompt_that_was_read_in_part_is_read_anew(models):
    one = opened(models["plain"])
    one.state = dataclasses.replace(one.state, lengths=one.state.lengths + 40)
    assert one.rewind([1] * 50) == 0


def test_tokens_outside_the_vocabulary_are_told(models):
    with pytest.raises(ValueError, match="has the token 48, and the model's vocabulary has 48 tokens"):
        opened(models["plain"]).read([[1, 48]], 1)


def test_every_mixer_has_a_cache_that_states_how_far_it_rewinds(decoders):
    for decoder in decoders.values():
        caches = jax.eval_shape(lambda decoder=decoder: decoder.cache(2, 40, jnp.float32))
        leaves = jax.tree.leaves(caches, is_leaf=lambda x: isinstance(x, Cache))
        assert all(isinstance(cache, Cache) and cache.max_rewind in (SLACK, 40) for cache in leaves)

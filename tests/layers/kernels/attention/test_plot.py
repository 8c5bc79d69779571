"""Pictures of masks."""

import numpy as np
import pytest
from flaxzoo.layers.kernels.attention.masks import Causal, Dense, Mask, PerHead, Window
from flaxzoo.layers.kernels.attention.plot import kinds_of
from matplotlib.backends.backend_agg import FigureCanvasAgg


def pixels(mask: Mask, **options) -> np.ndarray:
    canvas = FigureCanvasAgg(mask.plot(64, block=16, **options))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def legend(mask: Mask, **options) -> list[str]:
    return [text.get_text() for text in mask.plot(64, block=16, **options).axes[0].get_legend().get_texts()]


def test_a_picture_counts_what_attention_does():
    assert legend(Causal()) == ["empty 6", "partial 4", "full 6"]
    np.testing.assert_array_equal(kinds_of(Causal(), 64, 64, 16)[0, 0], np.tri(4, dtype=int) * 2 - np.eye(4, dtype=int))
    assert legend(Causal() & Window(16)) == ["empty 9", "partial 7", "full 0"]


def test_the_head_that_is_asked_for_is_drawn():
    mask = PerHead((Causal(), Causal() & Window(16)), (0, 1))
    assert legend(mask, heads=2, head=0) == legend(Causal())
    assert legend(mask, heads=2, head=1) == legend(Causal() & Window(16))
    assert (pixels(mask, heads=2, title="x") != pixels(mask, heads=2, head=1, title="x")).any()


def test_pairs_are_drawn_where_they_are():
    seen = np.zeros((1, 1, 64, 64), bool)
    seen[..., 40, 9] = True
    figure = Dense(seen).plot(64, block=16)  # pyright: ignore[reportArgumentType]
    dots = figure.axes[0].get_images()[1].get_array()
    assert np.argwhere(dots[..., 3]).tolist() == [[40, 9]]


@pytest.mark.parametrize(("queries", "keys"), [(32, 128), (128, 32), (1, 64)])
def test_lengths_may_differ(queries, keys):
    figure = Causal().plot(queries, keys, block=16)
    assert figure.axes[0].get_xlim() == (0, keys)
    assert figure.axes[0].get_ylim() == (queries, 0)

"""Scores against sums over full forward passes, and what a window starts with."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.zoo.evaluation.score import Score, Scorer
from flaxzoo.zoo.evaluation.windows import Window, prefix_token, split_into_windows
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

pytestmark = pytest.mark.usefixtures("quick_compiler")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRS é"
TEXT = "the quick brown fox jumps over the lazy dog and é"


def letters(*, bos: str = "") -> Tokenizer:
    """One token a letter; `bos` before each text."""
    tokenizer = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.add_special_tokens([bos])
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


@jax.jit
def forward(model, tokens):
    return jax.nn.log_softmax(model(tokens)[0], axis=-1)


def logs_of(model, ids):
    """The log-probability of every token but the first, each given all before it; and the most likely ones."""
    logs = np.asarray(forward(model, jnp.asarray([[*ids, *[0] * (64 - len(ids))]], jnp.int32)))[0]
    return logs[np.arange(len(ids) - 1), ids[1:]], logs.argmax(-1)[: len(ids) - 1]


def test_windows_of_any_length_together(models):
    random = np.random.default_rng(0)
    windows = [
        Window(tuple(random.integers(0, 48, n).tolist()), scored)
        for n, scored in ((9, 8), (30, 4), (2, 1), (17, 9), (30, 29))
    ]
    finished = []
    likelihoods = Scorer(models["mixed"], length=40, batch=2).likelihoods(windows, finished.append)
    for window, likelihood in zip(windows, likelihoods, strict=True):
        logs, best = logs_of(models["mixed"], window.ids)
        np.testing.assert_allclose(likelihood.log_prob, logs[-window.scored :].sum(), atol=1e-3)
        assert likelihood.greedy == (best[-window.scored :] == window.ids[-window.scored :]).all()
    assert sum(finished) == len(windows)


def test_greedy_continuations_are_told(models):
    ids = [3]
    for _ in range(4):
        ids.append(int(logs_of(models["plain"], [*ids, 0])[1][-1]))
    good, bad = Window(tuple(ids), 4), Window((*ids[:-1], (ids[-1] + 1) % 48), 4)
    assert [likelihood.greedy for likelihood in Scorer(models["plain"]).likelihoods([good, bad])] == [True, False]


@pytest.mark.parametrize("bos", ["", "R"])
@pytest.mark.parametrize(("length", "stride"), [(64, None), (16, 5), (16, 16), (10, 1)])
def test_windows_score_every_token_once(length, stride, bos, models):
    """With BOS every window starts with it; without, the first one alone starts with the token `start`."""
    tokenizer, start = letters(bos=bos), LETTERS.index(bos or "H")
    scorer, ids = Scorer(models["mixed"], length=length, batch=3), tokenizer.encode(TEXT, add_special_tokens=False).ids
    windows = list(
        split_into_windows(ids, prefix=start, length=length, stride=stride or length // 2, prefix_everywhere=bool(bos))
    )
    assert sum(window.scored for window in windows) == len(ids)
    assert [token for window in windows for token in window.ids[-window.scored :]] == ids
    assert windows[0].ids[0] == start
    assert all((window.ids[0] == start) == bool(bos) for window in windows[1:])
    assert all(len(window.ids) == length + 1 for window in windows[1:])
    assert all(window.scored == (stride or length // 2) for window in windows[1:-1])
    wanted = sum(logs_of(models["mixed"], list(window.ids))[0][-window.scored :].sum() for window in windows)
    score = scorer.text(tokenizer, [TEXT], start=start, stride=stride)
    np.testing.assert_allclose(score.nll, -wanted, rtol=1e-5)
    assert (score.tokens, score.bytes, score.documents, score.changed) == (len(TEXT), len(TEXT) + 1, 1, 0)
    np.testing.assert_allclose(score.bits_per_byte, score.nll / math.log(2) / score.bytes)
    np.testing.assert_allclose(score.perplexity, math.exp(score.nll / score.tokens))


def test_a_text_is_conditioned_on_bos_or_else_on_eos():
    assert prefix_token(letters(bos="R"), None, ["a"]) == LETTERS.index("R")
    assert prefix_token(letters(bos="R"), "B", ["a"]) == LETTERS.index("B")
    assert prefix_token(letters(), None, ["missing", "c"]) == LETTERS.index("c")
    assert prefix_token(letters(), None, []) is None


def test_documents_are_each_by_themselves(models, tokenizer):
    scorer, sizes = Scorer(models["plain"], length=20, batch=2), []
    parts = [scorer.text(tokenizer, [text], start=0) for text in ("abc", TEXT)]
    whole = scorer.text(tokenizer, ["abc", "", TEXT, "ü"], start=0, progress=sizes.append)
    other = scorer.text(tokenizer, ["ü"], start=0)
    total = sum(parts, other)
    assert (total.documents, total.tokens) == (3, 3 + len(TEXT) + 1)
    np.testing.assert_allclose(whole.nll, total.nll, rtol=1e-5)
    assert (whole.documents, whole.changed, whole.bytes) == (4, 1, total.bytes)
    assert sizes == [3, 0, len(TEXT) + 1, 2]
    assert Score().__add__(total).to_dict()["bits_per_byte"] == total.bits_per_byte


def test_a_scorer_on_a_mesh(decoders, models, tokenizer):
    from flaxzoo.zoo.parameters import describe, merge, shardings, split

    wanted = Scorer(models["mixed"], length=20).text(tokenizer, [TEXT], start=1)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        places = shardings(describe(decoders["mixed"].abstract()), mesh)
        placed = {n: jax.device_put(np.asarray(x), places[n]) for n, x in split(models["mixed"]).items()}
    model = merge(decoders["mixed"].abstract(), placed)
    np.testing.assert_allclose(Scorer(model, length=20).text(tokenizer, [TEXT], start=1).nll, wanted.nll, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, _: Scorer(model, length=65), "at most 64"),
        (lambda model, _: Scorer(model, length=0), "length=0"),
        (lambda model, _: Scorer(model, length=8).likelihoods([Window((1, 2), 2)]), "2 tokens of which 2"),
        (lambda model, _: Scorer(model, length=8).likelihoods([Window((1,) * 10, 2)]), "at most 9 in all"),
        (
            lambda model, _: Scorer(model, length=8).likelihoods([Window((1, 48), 1)]),
            "token 48, and .* vocabulary has 48 tokens",
        ),
        (lambda model, tokenizer: Scorer(model, length=8).text(tokenizer, ["a"], start=0, stride=9), "stride"),
        (lambda model, tokenizer: Scorer(model, length=8).text(tokenizer, [""], start=0), "no text"),
    ],
)
def test_what_cannot_be_is_refused(call, message, models, tokenizer):
    with pytest.raises(ValueError, match=message):
        call(models["learned"], tokenizer)

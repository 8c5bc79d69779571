"""Guessing ahead: greedily the same tokens, drawn the same distribution, whoever guesses."""

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo.zoo import GREEDY, Sampling, Speculation, complete
from flaxzoo.zoo.generation.sampling import row_keys
from flaxzoo.zoo.generation.speculative import _accept, advance
from flaxzoo.zoo.generation.state import State
from flaxzoo.zoo.parameters import FlatModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

pytestmark = pytest.mark.usefixtures("quick_compiler")
COUNT = 45
PROMPTS = [[1, 2, 3, 1, 2], [5], [7, 8, 9, 7, 8, 9, 7, 8]]
TOKENIZER = Tokenizer(WordLevel({str(i): i for i in range(48)}, unk_token="0"))


def ids(model, **options):
    options = {"max_tokens": COUNT, "sampling": GREEDY, "stop": ()} | options
    return [found.ids for found in complete(model, TOKENIZER, PROMPTS, **options)]


@pytest.fixture(scope="module")
def plain(models):
    return {name: ids(models[name]) for name in ("mixed", "learned")}


@pytest.mark.parametrize("name", ["mixed", "learned"])
@pytest.mark.parametrize("guesser", ["lookup", "bad draft", "itself"])
def test_greedy_is_the_same(name, guesser, models, decoders, plain):
    """Windows of 5 with 45 tokens: rings go round, and guesses are taken back."""
    draft = {
        "lookup": None,
        "bad draft": models["mixed"] if name == "learned" else models["plain"],
        "itself": models[name],
    }
    options = {"speculation": Speculation(tokens=5, ngram=2), "draft": draft[guesser]}
    assert ids(models[name], **options) == plain[name]
    assert ids(models[name], **options, max_tokens=7) == [row[:7] for row in plain[name]]


def test_a_stop_among_kept_guesses_ends_the_row(models, plain):
    stop = plain["mixed"][0][6]
    found = ids(models["mixed"], stop=(str(stop),), draft=models["mixed"])
    assert found == [row[: row.index(stop) + 1] if stop in row else row for row in plain["mixed"]]


def test_penalties_see_the_guesses(models):
    sampling = Sampling(temperature=0.0, repetition_penalty=1.5)
    wanted = ids(models["mixed"], sampling=sampling)
    for options in ({"draft": models["mixed"]}, {"speculation": Speculation(tokens=3)}):
        assert ids(models["mixed"], sampling=sampling, **options) == wanted


def test_log_probs(models):
    one, other = (
        complete(
            models["mixed"], TOKENIZER, PROMPTS, max_tokens=9, sampling=GREEDY, stop=(), log_probs=True, draft=draft
        )
        for draft in (None, models["mixed"])
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


def test_a_good_draft_saves_passes(models, monkeypatch):
    """Of itself, a model keeps every guess; and a loop is found by looking up."""
    from flaxzoo.zoo.generation import speculative

    kept = []
    original = speculative._accept

    def spied(*args):
        found = original(*args)
        jax.debug.callback(lambda x: kept.append(np.asarray(x)), found[0])
        return found

    monkeypatch.setattr(speculative, "_accept", spied)
    jax.clear_caches()
    ids(models["plain"], draft=models["plain"], max_tokens=22)
    jax.effects_barrier()
    assert np.concatenate(kept).max() == 4
    assert len(kept) <= 6  # 1 + 5 + 5 + 5 + 5 + 1
    jax.clear_caches()


def test_kept_and_replaced_tokens_follow_the_model():
    """Chi-square over all outcomes of a step: a draft that is far off, and one guess that is certain."""
    vocab, rows = 4, 40_000
    p = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32)  # at two places, after any token
    q = np.array([[0.05, 0.15, 0.3, 0.5]], np.float32)
    filters = Sampling(temperature=1.0).traced(vocab)
    zeros = jnp.zeros(rows, jnp.int32)
    keys = jax.random.split(jax.random.key(1), rows)
    state = State(lengths=zeros, token=zeros, sampled=zeros, left=zeros + 9, keys=keys, seen=None)
    weights = jnp.tile(p[None], (rows, 1, 1))
    for drawn in (True, False):
        if drawn:
            guesses = filters.sample(jnp.log(jnp.tile(q, (rows, 1))), row_keys(keys, zeros, 1))
            shares = jnp.tile(q[None], (rows, 1, 1))
        else:
            guesses, shares = zeros + 2, None
        kept, after = _accept(state, filters, guesses[:, None], shares, weights, zeros + 1)
        first = np.asarray(jnp.where(kept > 0, guesses, after))
        counts = np.bincount(first, minlength=vocab)
        assert chi_square(counts, p[0] * rows) < 16.3  # 0.999 of 3 degrees of freedom
        second = np.asarray(after)[np.asarray(kept) > 0]
        counts = np.bincount(second, minlength=vocab)
        assert chi_square(counts, p[1] * len(second)) < 16.3
        accepted = np.minimum(p[0], q[0]).sum() if drawn else p[0, 2]
        np.testing.assert_allclose(np.mean(np.asarray(kept)), accepted, atol=0.01)


@jax.tree_util.register_dataclass
@dataclass
class Bigrams:
    """A model whose next token depends on the latest one alone."""

    table: jax.Array

    def __call__(self, tokens, places, caches, dtype):
        return self.table[tokens], caches


@pytest.mark.parametrize("guesser", ["draft", "lookup"])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.7), Sampling(temperature=0.9, top_k=3, top_p=0.9, repetition_penalty=1.2)]
)
def test_texts_of_five_tokens_follow_the_model(sampling, guesser):
    """Through several steps, with filters, against the exact probabilities of all texts."""
    vocab, count, rows = 4, 5, 20_000
    random = np.random.default_rng(0)
    tables = [jnp.asarray(random.normal(0, 1.5, (vocab, vocab)), jnp.float32) for _ in range(2)]
    filters, zeros = sampling.traced(vocab), jnp.zeros(rows, jnp.int32)
    state = State(
        lengths=zeros + 1,
        token=zeros,
        sampled=zeros,
        left=zeros + count,
        keys=jax.random.split(jax.random.key(0), rows),
        seen=jnp.zeros((rows, vocab), bool).at[:, 0].set(True) if filters.penalised else None,
        history=jnp.zeros((rows, 16), jnp.int32) if guesser == "lookup" else None,
    )
    model, draft = (FlatModel(*jax.tree.flatten(Bigrams(table))) for table in tables)
    draft = draft if guesser == "draft" else None
    options: Any = {"speculation": Speculation(tokens=3), "dtype": jnp.float32}
    raw: Any = inspect.unwrap(advance("cpu"))  # whose annotations ask for caches
    ends, limit = jnp.asarray([-1]), jnp.int32(32)
    _, _, _, tokens, _, counts = raw(model, draft, zeros, zeros, state, filters, ends, limit, **options)
    assert np.all(np.asarray(counts) == count)
    texts = np.array(list(itertools.product(range(vocab), repeat=count)))
    wanted = np.ones(len(texts))
    for place in range(count):
        before = np.concatenate([np.zeros((len(texts), 1), int), texts[:, :place]], axis=1)
        seen = jnp.asarray(np.any(before[..., None] == np.arange(vocab), axis=1))
        weights = filters.filter(filters.penalise(tables[0][before[:, -1]], seen))
        wanted *= np.asarray(jax.nn.softmax(weights))[np.arange(len(texts)), texts[:, place]]
    codes = np.asarray(tokens)[:, :count] @ vocab ** np.arange(count)[::-1]
    found = np.bincount(codes, minlength=len(texts))
    assert not found[wanted == 0].any()
    often = wanted * rows >= 5
    counts, wanted = (np.append(x[often], x[~often].sum()) for x in (found, wanted * rows))
    free = len(counts) - 1
    assert chi_square(counts[wanted > 0], wanted[wanted > 0]) < free + 3.1 * np.sqrt(2 * free) + 5  # about 0.999


def chi_square(found, wanted):
    return float(np.sum((found - wanted) ** 2 / wanted))


@pytest.mark.slow
def test_sampled_text_follows_the_model(models, decoders):
    """Two tokens drawn with a draft model, of a vocabulary of 3, against the probabilities of the model itself."""
    tiny = decoders["plain"].replace(vocab=3)
    model, draft = (tiny.build(rngs=nnx.Rngs(seed)) for seed in (0, 1))
    sampling, rows = Sampling(temperature=0.5), 4000
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(3)}, unk_token="0"))
    guesses: list[dict[str, Any]] = [{"draft": draft}, {"speculation": Speculation(tokens=2)}]
    for options in guesses:
        found = complete(model, tokenizer, [[0, 1]] * rows, max_tokens=3, sampling=sampling, stop=(), seed=5, **options)
        counts = np.zeros((3, 3))
        for one in found:
            counts[one.ids[1], one.ids[2]] += 1
        wanted = np.zeros((3, 3))
        for texts in itertools.product(range(3), repeat=3):
            logits = model(jnp.asarray([[0, 1, *texts[:2]]], jnp.int32))[0][0]
            logs = jax.nn.log_softmax(logits / sampling.temperature)
            wanted[texts[1:]] += np.exp(sum(float(logs[1 + i, token]) for i, token in enumerate(texts)))
        assert chi_square(counts, wanted * rows) < 26.1  # 0.999 of 8 degrees of freedom


@pytest.mark.parametrize("change", [{"tokens": 0}, {"tokens": -1}, {"ngram": 0}], ids=str)
def test_what_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=f"must be at least 1, got {next(iter(change.values()))}"):
        Speculation(**change)


def test_more_tokens_than_the_caches_can_discard_are_refused(models):
    """A ring can discard 16, in the model or the draft model; caches with a slot for each token have no such limit."""
    many = Speculation(tokens=17)
    for name, draft in (("mixed", None), ("plain", "mixed")):
        with pytest.raises(ValueError, match=r"can discard 16, got Speculation\(tokens=17\)"):
            ids(models[name], speculation=many, draft=draft and models[draft])
    assert ids(models["plain"], speculation=many, max_tokens=20) == ids(models["plain"], max_tokens=20)


def test_a_draft_of_another_vocabulary_is_refused(models, decoders):
    draft = decoders["plain"].replace(vocab=50).build(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="vocabulary, got 50 and 48"):
        ids(models["plain"], draft=draft)

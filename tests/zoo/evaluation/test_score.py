"""Scores against sums over full forward passes; the harness's model, with the harness where it is installed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.zoo import GREEDY, generate
from flaxzoo.zoo.evaluation.harness import Candidate, harness_model
from flaxzoo.zoo.evaluation.score import Row, Score, Scorer
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

pytestmark = pytest.mark.usefixtures("quick_compiler")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRS é"
TEXT = "the quick brown fox jumps over the lazy dog and é"


def letters() -> Tokenizer:
    made = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))
    made.pre_tokenizer = Split("", "isolated")
    made.decoder = decoders.Fuse()
    return made


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


def test_rows_of_any_length_together(models):
    random = np.random.default_rng(0)
    rows = [
        Row(tuple(random.integers(0, 48, n).tolist()), scored)
        for n, scored in ((9, 8), (30, 4), (2, 1), (17, 9), (30, 29))
    ]
    done = []
    found = Scorer(models["mixed"], length=40, batch=2).rows(rows, done.append)
    for row, one in zip(rows, found, strict=True):
        logs, best = logs_of(models["mixed"], row.ids)
        np.testing.assert_allclose(one.log_prob, logs[-row.scored :].sum(), atol=1e-3)
        assert one.greedy == (best[-row.scored :] == row.ids[-row.scored :]).all()
    assert sum(done) == len(rows)


def test_greedy_continuations_are_told(models):
    ids = [3]
    for _ in range(4):
        ids.append(int(logs_of(models["plain"], [*ids, 0])[1][-1]))
    good, bad = Row(tuple(ids), 4), Row((*ids[:-1], (ids[-1] + 1) % 48), 4)
    assert [one.greedy for one in Scorer(models["plain"]).rows([good, bad])] == [True, False]


@pytest.mark.parametrize(("length", "stride"), [(64, None), (16, 5), (16, 15), (10, 1)])
def test_windows_score_every_token_once(length, stride, models, tokenizer):
    scorer, ids = Scorer(models["mixed"], length=length, batch=3), [7, *tokenizer.encode(TEXT).ids]
    rows = list(scorer.windows(ids, stride or length // 2))
    assert sum(row.scored for row in rows) == len(ids) - 1
    assert [token for row in rows for token in row.ids[-row.scored :]] == ids[1:]
    assert all(len(row.ids) - row.scored >= length - (stride or length // 2) for row in rows[1:])
    wanted = sum(logs_of(models["mixed"], list(row.ids))[0][-row.scored :].sum() for row in rows)
    score = scorer.text(tokenizer, [TEXT], start=7, stride=stride)
    np.testing.assert_allclose(score.nll, -wanted, rtol=1e-5)
    assert (score.tokens, score.bytes, score.documents, score.changed) == (len(TEXT), len(TEXT) + 1, 1, 0)
    np.testing.assert_allclose(score.bits_per_byte, score.nll / math.log(2) / score.bytes)
    np.testing.assert_allclose(score.perplexity, math.exp(score.nll / score.tokens))


def test_documents_are_each_by_themselves(models, tokenizer):
    scorer, told = Scorer(models["plain"], length=20, batch=2), []
    parts = [scorer.text(tokenizer, [text], start=0) for text in ("abc", TEXT)]
    whole = scorer.text(tokenizer, ["abc", "", TEXT, "ü"], start=0, progress=told.append)
    other = scorer.text(tokenizer, ["ü"], start=0)
    total = sum(parts, other)
    assert (total.documents, total.tokens) == (3, 3 + len(TEXT) + 1)
    np.testing.assert_allclose(whole.nll, total.nll, rtol=1e-5)
    assert (whole.documents, whole.changed, whole.bytes) == (4, 1, total.bytes)
    assert told == [3, 0, len(TEXT) + 1, 2]
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
        (lambda model, _: Scorer(model, length=1), "length=1"),
        (lambda model, _: Scorer(model, length=8).rows([Row((1, 2), 2)]), "2 of which 2"),
        (lambda model, _: Scorer(model, length=8).rows([Row((1,) * 9, 2)]), "8 in all at most"),
        (lambda model, _: Scorer(model, length=8).rows([Row((1, 48), 1)]), "token 48, and .* vocabulary has 48 tokens"),
        (lambda model, tokenizer: Scorer(model, length=8).text(tokenizer, ["a"], start=0, stride=8), "stride"),
        (lambda model, tokenizer: Scorer(model, length=8).text(tokenizer, [""], start=0), "no text"),
    ],
)
def test_what_cannot_be_is_refused(call, message, models, tokenizer):
    with pytest.raises(ValueError, match=message):
        call(models["learned"], tokenizer)


@pytest.fixture(scope="module")
def candidate(models, tokenizer):
    return Candidate(models["plain"], tokenizer, stop=(), start=0, length=32)


def test_the_harness_asks_for_likelihoods(candidate, models, tokenizer):
    pairs = [("the quick ", "brown"), ("the quick", " brown"), ("", "fox"), ("x" * 40, "dog")]
    found = candidate.loglikelihood(pairs)
    logs = logs_of(models["plain"], [0, *tokenizer.encode("the quick brown").ids])[0]
    np.testing.assert_allclose(found[0][0], logs[-6:].sum(), atol=1e-4)  # with the space
    assert found[0] == found[1]
    np.testing.assert_allclose(
        found[2][0], logs_of(models["plain"], [0, *tokenizer.encode("fox").ids])[0].sum(), atol=1e-4
    )
    cut = [*tokenizer.encode("x" * 29).ids, *tokenizer.encode("dog").ids]
    np.testing.assert_allclose(found[3][0], logs_of(models["plain"], cut)[0][-3:].sum(), atol=1e-4)
    whole = logs_of(models["plain"], [0, *tokenizer.encode("the lazy dog").ids])[0].sum()
    np.testing.assert_allclose(candidate.rolling(["the lazy dog", TEXT])[0], whole, atol=1e-4)
    for pair in (("a", ""), ("a", "b" * 32)):
        with pytest.raises(ValueError, match="at least 1 token and at most 31"):
            candidate.loglikelihood([pair])


def test_the_harness_asks_for_text(candidate, models, tokenizer):
    prompt = tokenizer.encode("the quick").ids
    text = generate(models["plain"], tokenizer, [prompt], max_tokens=9, sampling=GREEDY, stop=())[0]
    requests = [
        ("the quick", {"max_gen_toks": 9}),
        ("the quick", {"until": [text[3]], "max_gen_toks": 9, "do_sample": False}),
    ]
    assert candidate.generate_until(requests) == [text, text[: text.index(text[3])]]
    with pytest.raises(ValueError, match="num_beams"):
        candidate.generate_until([("a", {"num_beams": 4})])


def test_the_harness_begins_a_text_once(models):
    """With the token that the tokenizer puts there, unless a chat template has."""
    tokenizer, plain_tokenizer = letters(), letters()
    for one in (tokenizer, plain_tokenizer):
        one.add_special_tokens(["Z"])
    start: Any = tokenizer.token_to_id("Z")
    tokenizer.post_processor = TemplateProcessing(single="Z $A", pair="Z $A $B", special_tokens=[("Z", start)])
    asked = Candidate(models["plain"], tokenizer, stop=(), start=start, length=32)
    plain = Candidate(models["plain"], plain_tokenizer, stop=(), start=start, length=32)
    (found,) = asked.loglikelihood([("Zthe quick", " fox")])
    assert found == asked.loglikelihood([("the quick", " fox")])[0]
    wanted = plain.generate_until([("Zthe quick", {"max_gen_toks": 9})])
    assert asked.generate_until([("the quick", {"max_gen_toks": 9})]) == wanted
    assert asked.generate_until([("Zthe quick", {"max_gen_toks": 9})]) == wanted


def test_a_local_task_of_the_harness(candidate, tmp_path):
    """Multiple choice from a file, with lm-evaluation-harness itself (skipped where it is not installed)."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'flaxzoo[eval]'")
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    (tmp_path / "test.jsonl").write_text('{"q": "the quick", "a": 0}\n{"q": "brown fox", "a": 1}\n')
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/test.jsonl\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: a\ndoc_to_choice: ["dog", "cat"]\nmetric_list:\n  - metric: acc\n'
    )
    found = lm_eval.simple_evaluate(
        harness_model(candidate),
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    pairs = [(q, f" {choice}") for q in ("the quick", "brown fox") for choice in ("dog", "cat")]
    logs = np.array([log for log, _ in candidate.loglikelihood(pairs)]).reshape(2, 2)
    assert found["results"]["tiny"]["acc,none"] == np.mean(logs.argmax(1) == [0, 1])


def test_without_the_harness_it_is_named(candidate, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match="take the package lm-eval, which is not installed: .* -m pip install"):
        harness_model(candidate)

"""Requests of lm-evaluation-harness against its Hugging Face backend; the harness itself where it is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flaxzoo import zoo
from flaxzoo.zoo import ChatTemplate
from flaxzoo.zoo.evaluation.harness import HarnessBackend, harness_lm

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[2] / "truth"
LENGTH = 24
KINDS = sorted(folder.name for folder in (TRUTH / "harness").iterdir())


@pytest.fixture(scope="module", params=KINDS)
def case(request: Any, tmp_path_factory: Any) -> tuple[HarnessBackend, dict[str, list[dict[str, Any]]]]:
    """A backend opened as `zoo eval` opens it, and answers of the harness's own (tests/truth/make_harness.py)."""
    truth, folder = TRUTH / "harness" / request.param, tmp_path_factory.mktemp(request.param)
    for file in (
        TRUTH / "llama" / "model.safetensors",
        TRUTH / "llama" / "config.json",
        truth / "tokenizer.json",
        truth / "tokenizer_config.json",
    ):
        (folder / file.name).symlink_to(file)
    named = json.loads((truth / "tokenizer_config.json").read_text())
    vocabulary = json.loads((truth / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": vocabulary[named["eos_token"]]}))
    writer = zoo.open(folder, dtype="float32")
    assert writer.prefix is not None
    backend = HarnessBackend(writer.model, writer.tokenizer, prefix=writer.prefix, stop=writer.stop, length=LENGTH)
    return backend, json.loads((truth / "answers.json").read_text())


def answered(rows: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    rows = [row for row in rows if row["answer"] is not None]
    requests = [tuple(row["request"]) if isinstance(row["request"], list) else row["request"] for row in rows]
    return requests, [row["answer"] for row in rows]


def test_likelihoods_are_those_of_the_hugging_face_backend(case):
    backend, truth = case
    pairs, answers = answered(truth["loglikelihood"])
    likelihoods = backend.loglikelihood(pairs)
    np.testing.assert_allclose([log for log, _ in likelihoods], [log for log, _ in answers], rtol=1e-5, atol=1e-4)
    assert [greedy for _, greedy in likelihoods] == [greedy for _, greedy in answers]
    assert len(pairs) >= 13


def test_rolling_likelihoods_are_those_of_the_hugging_face_backend(case):
    backend, truth = case
    texts, answers = answered(truth["loglikelihood_rolling"])
    np.testing.assert_allclose(backend.loglikelihood_rolling(texts), answers, rtol=1e-5, atol=1e-4)
    assert len(texts) == 6


def test_texts_are_those_of_the_hugging_face_backend(case):
    backend, truth = case
    requests, answers = answered(truth["generate_until"])
    assert backend.generate_until(requests) == answers
    assert len(requests) >= 6


def test_what_the_hugging_face_backend_cannot_answer(case):
    backend, _ = case
    for pair in (("one token", ""), ("", ""), ("a", " dog" * 30)):
        with pytest.raises(ValueError, match="at least 1 token beyond its context and at most 24"):
            backend.loglikelihood([pair])
    with pytest.raises(ValueError, match="max_gen_toks must be below the length of 24"):
        backend.generate_until([("too long", {"max_gen_toks": 24})])
    with pytest.raises(ValueError, match="num_beams"):
        backend.generate_until([("a", {"num_beams": 4})])
    (log, _), (text,) = *backend.loglikelihood([(" ", "jumps over")]), backend.generate_until([("", {"max_tokens": 3})])
    assert np.isfinite(log)
    assert text


@pytest.fixture(scope="module")
def backend(models) -> HarnessBackend:
    from .test_score import letters

    return HarnessBackend(models["plain"], letters(), prefix=0, length=32)


@pytest.mark.parametrize(
    ("source", "end"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "[a][ b "),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", "[a][b"),
    ],
)
def test_a_chat_that_continues_its_last_message(source, end, backend):
    """As transformers' `continue_final_message`."""
    pytest.importorskip("jinja2")
    backend = HarnessBackend(backend.model, backend.tokenizer, prefix=0, length=32, template=ChatTemplate(source))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]
    assert backend.render_chat(messages, add_generation_prompt=False) == end
    with pytest.raises(ValueError, match="leaves out the last message"):
        HarnessBackend(
            backend.model, backend.tokenizer, prefix=0, length=32, template=ChatTemplate("{{ messages[0].content }}")
        ).render_chat(messages, add_generation_prompt=False)


def test_a_local_task_of_the_harness(backend, tmp_path):
    """Multiple choice from a file, with lm-evaluation-harness itself (skipped where it is not installed)."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'flaxzoo[eval]'")
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    (tmp_path / "test.jsonl").write_text('{"q": "the quick", "a": 0}\n{"q": "brown fox", "a": 1}\n')
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/test.jsonl\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: a\ndoc_to_choice: ["dog", "cat"]\nmetric_list:\n  - metric: acc\n'
    )
    results = lm_eval.simple_evaluate(
        harness_lm(backend),
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    pairs = [(q, f" {choice}") for q in ("the quick", "brown fox") for choice in ("dog", "cat")]
    logs = np.array([log for log, _ in backend.loglikelihood(pairs)]).reshape(2, 2)
    assert results["results"]["tiny"]["acc,none"] == np.mean(logs.argmax(1) == [0, 1])


def test_without_the_harness_it_is_named(backend, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match="take the package lm-eval, which is not installed: .* -m pip install"):
        harness_lm(backend)

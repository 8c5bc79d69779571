"""A pretrained model in conversation: SmolLM2-135M-Instruct, from `make test-real`."""

import os
from pathlib import Path

import jax.numpy as jnp
import pytest
from flaxzoo.train.evaluate import start_token
from flaxzoo.train.writer import open_writer
from flaxzoo.zoo import GREEDY, Conversation, Scorer, Speculation

pytestmark = pytest.mark.real
FOLDER = Path(os.environ.get("FLAXZOO_REAL", Path(__file__).parents[2] / ".real"))
FILE = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def writer():
    return open_writer(FILE, dtype="float32").for_decoding()


@pytest.mark.parametrize("options", [{}, {"speculation": Speculation(tokens=3)}], ids=str)
def test_it_answers(options, writer):
    assert writer.stop == ("<|im_end|>",)
    talk = Conversation(writer.model, writer.tokenizer, writer.template, stop=writer.stop, sampling=GREEDY, **options)
    assert "".join(talk.say("What is the capital of France?", max_tokens=40)) == "The capital of France is Paris."
    assert "".join(talk.say("And of Italy?", max_tokens=40)) == "The capital of Italy is Rome."
    assert talk.reused > 40  # the first turn was in the cache


def test_an_int8_cache_answers_the_same(writer):
    options = {"stop": writer.stop, "sampling": GREEDY, "cache_dtype": jnp.int8}
    talk = Conversation(writer.model, writer.tokenizer, writer.template, **options)
    assert "".join(talk.say("What is the capital of France?", max_tokens=40)) == "The capital of France is Paris."


def test_english_is_likelier_than_its_words_in_disorder(writer):
    text = "The old man walked slowly along the river, and the dog followed him all the way home."
    words = text.split()
    scorer = Scorer(writer.model, length=64)
    plain, mixed = (
        scorer.text(writer.tokenizer, [" ".join(order)], start=start_token(writer)) for order in (words, sorted(words))
    )
    assert plain.bits_per_byte < 1.2 < 1.8 < mixed.bits_per_byte

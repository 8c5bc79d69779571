"""Generation against repeated full forward passes, and its rules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.zoo import GREEDY, Sampling, complete, generate, stream
from flaxzoo.zoo.generation import session
from flaxzoo.zoo.parameters import describe, merge, shardings, split
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

pytestmark = pytest.mark.usefixtures("quick_compiler")
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU"
PROMPTS = ["hello", "ab", "theLongest"]
COUNT = 9


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter, ids 0 to 46, and <|endoftext|> with id 47."""
    made = Tokenizer(WordLevel({letter: i for i, letter in enumerate(ALPHABET)}, unk_token="a"))
    made.pre_tokenizer = Split("", "isolated")
    made.decoder = None
    made.add_special_tokens(["<|endoftext|>"])
    assert made.get_vocab_size() == 48
    return made


@jax.jit
def forward(model, tokens):
    return model(tokens)[0]


def greedy(model, ids):
    """The ids by the most likely next token of a full forward pass, over and over."""
    for _ in range(COUNT):
        logits = forward(model, jnp.asarray([ids + [0] * (20 - len(ids))], jnp.int32))
        ids = [*ids, int(jnp.argmax(logits[0, len(ids) - 1]))]
    return ids[-COUNT:]


def run(model, tokenizer, prompts=PROMPTS, **options):
    texts = generate(model, tokenizer, prompts, max_tokens=COUNT, stop=(), **options)
    return [tokenizer.encode(text.replace(" ", "")).ids for text in texts]


@pytest.fixture(scope="module")
def wanted(models, tokenizer):
    return {name: [greedy(models[name], tokenizer.encode(p).ids) for p in PROMPTS] for name in ("mixed", "learned")}


@pytest.mark.parametrize("name", ["mixed", "learned"])
def test_greedy_is_the_most_likely_token_by_a_full_pass(name, models, tokenizer, wanted):
    assert len({tuple(ids) for ids in wanted[name]}) == len(PROMPTS)
    assert run(models[name], tokenizer, sampling=GREEDY) == wanted[name]


def test_the_most_likely_of_one_is_greedy(models, tokenizer, wanted):
    assert run(models["mixed"], tokenizer, sampling=Sampling(temperature=5.0, top_k=1)) == wanted["mixed"]


def test_greedy_on_a_mesh(decoders, models, tokenizer, wanted):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        places = shardings(describe(decoders["mixed"].abstract()), mesh)
        placed = {n: jax.device_put(np.asarray(x), places[n]) for n, x in split(models["mixed"]).items()}
        found = run(merge(decoders["mixed"].abstract(), placed), tokenizer, sampling=GREEDY)
    assert found == wanted["mixed"]


def test_seeds_reproduce_and_differ(models, tokenizer):
    texts = [run(models["plain"], tokenizer, sampling=Sampling(temperature=2.0), seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert run(models["plain"], tokenizer, sampling=Sampling(temperature=2.0), key=jax.random.key(1)) == texts[2]


def test_equal_prompts_draw_apart(models, tokenizer):
    first, second, _ = run(models["plain"], tokenizer, ["hello"] * 3, sampling=Sampling(temperature=2.0))
    assert first != second


def test_text_ends_at_a_stop_token(models, tokenizer, wanted):
    letters = [ALPHABET[i] if i < 47 else "" for i in wanted["mixed"][0]]
    stop = letters[4]
    text = generate(models["mixed"], tokenizer, PROMPTS, max_tokens=COUNT, sampling=GREEDY, stop=(stop,))[0]
    assert text.replace(" ", "") == "".join(letters[: letters.index(stop)])


def test_an_empty_prompt_starts_with_the_stop_token(models, tokenizer):
    found = generate(models["plain"], tokenizer, ["", "a", "b"], max_tokens=COUNT, sampling=GREEDY)[0]
    ids = greedy(models["plain"], [47])
    ids = ids[: ids.index(47)] if 47 in ids else ids
    assert found.replace(" ", "") == "".join(ALPHABET[i] for i in ids)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "got 0 prompts"),
        (["a"], {"max_tokens": 0}, "max_tokens=0"),
        (["a"], {"stop": "<s>"}, "got '<s>'"),
        (["a"], {"stop": ("",)}, "strings that are not empty"),
        ("a", {}, r"write \['a'\]"),
        ([[1, 48]], {}, "below the vocabulary of 48"),
        ([""], {"stop": ()}, "names no token"),
        ([""], {"stop": ("a",)}, "names no token"),
        (["a"], {"stop": (48,)}, "token ids in stop"),
        (["hello"], {"max_tokens": 60}, r"64 positions"),
    ],
)
def test_what_cannot_be_is_refused(prompts, options, message, models, tokenizer):
    with pytest.raises(ValueError, match=message):
        generate(models["learned"], tokenizer, prompts, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2}, "unknown option 'samples'"),
        ({"log_prob": True}, "did you mean 'log_probs'"),
        ({"temperature": 0.0}, r"field of Sampling: pass sampling=Sampling\(temperature=0\.0\)"),
        ({"length": 3}, "unknown option 'length'"),
    ],
)
def test_options_that_there_are_not(options, message, models, tokenizer):
    calls: list[tuple[Any, Any]] = [(generate, ["a"]), (complete, ["a"]), (stream, "a")]
    for function, prompts in calls:
        with pytest.raises(TypeError, match=message):
            function(models["plain"], tokenizer, prompts, **options)


def test_a_batch_gives_what_each_prompt_alone_gives(models, tokenizer):
    sampling = Sampling(temperature=1.5, top_k=20, repetition_penalty=1.3)
    together = run(models["mixed"], tokenizer, sampling=sampling, seed=3)
    shifted = run(models["mixed"], tokenizer, [PROMPTS[0], "zyxwvutsrqponmlkjihgfedcba" * 2], sampling=sampling, seed=3)
    assert together[0] == shifted[0] == run(models["mixed"], tokenizer, PROMPTS[:1], sampling=sampling, seed=3)[0]


def long_greedy(model, ids, count):
    for _ in range(count):
        logits = forward(model, jnp.asarray([ids + [0] * (128 - len(ids))], jnp.int32))
        ids = [*ids, int(jnp.argmax(logits[0, len(ids) - 1]))]
    return ids[-count:]


def test_long_texts_go_round_the_ring_of_a_window(models, tokenizer):
    prompts = [ALPHABET[:40], ALPHABET[5:9]]
    found = complete(models["mixed"], tokenizer, prompts, max_tokens=50, sampling=GREEDY, stop=())
    for prompt, completion in zip(prompts, found, strict=True):
        assert completion.ids == long_greedy(models["mixed"], tokenizer.encode(prompt).ids, 50)


def test_prompts_are_read_in_chunks(models, tokenizer, wanted, monkeypatch):
    monkeypatch.setattr(session, "CHUNK", 4)
    assert run(models["mixed"], tokenizer, sampling=GREEDY) == wanted["mixed"]


def test_log_probs_are_of_the_model(models, tokenizer):
    found = complete(models["plain"], tokenizer, ["ab"], max_tokens=6, sampling=GREEDY, stop=(), log_probs=True)[0]
    ids = [*tokenizer.encode("ab").ids, *found.ids]
    logits = forward(models["plain"], jnp.asarray([ids + [0] * (20 - len(ids))], jnp.int32))[0]
    logs = jax.nn.log_softmax(logits)[jnp.arange(1, len(ids) - 1), jnp.asarray(ids[2:])]
    np.testing.assert_allclose(found.log_probs, logs, atol=1e-4)
    assert not found.stopped
    assert found.speed.tokens == 5


def test_greedy_with_a_penalty(models, tokenizer):
    sampling = Sampling(temperature=0.0, repetition_penalty=1e6)
    ids = run(models["plain"], tokenizer, ["abc"], sampling=sampling)[0]
    assert len({*ids, 0, 1, 2}) == len(ids) + 3


def test_an_int8_cache_generates(models, tokenizer, wanted):
    found = run(models["mixed"], tokenizer, sampling=GREEDY, cache_dtype=jnp.int8)
    same = sum(x == y for a, b in zip(found, wanted["mixed"], strict=True) for x, y in zip(a, b, strict=True))
    assert same >= 20  # of 27; random weights make near ties


def test_stop_strings_straddle_tokens(models, tokenizer):
    whole = complete(models["mixed"], tokenizer, PROMPTS, max_tokens=COUNT, sampling=GREEDY, stop=())
    stop = whole[0].text[4:9]  # "x y z": three tokens of this tokenizer, whose texts are joined by spaces
    assert tokenizer.token_to_id(stop) is None
    found = complete(models["mixed"], tokenizer, PROMPTS, max_tokens=COUNT, sampling=GREEDY, stop=(stop,))
    assert found[0].text == whole[0].text[: whole[0].text.index(stop)]
    assert found[0].stopped
    assert len(found[0].ids) < COUNT
    for one, other in zip(found[1:], whole[1:], strict=True):
        assert one.text == other.text.partition(stop)[0]


def test_a_stream_is_the_text_in_pieces(models, tokenizer):
    options = {"max_tokens": 40, "sampling": Sampling(temperature=1.0), "stop": (), "seed": 5}
    streamed = stream(models["mixed"], tokenizer, "hello", **options)
    pieces = list(streamed)
    assert len(pieces) > 2
    text = generate(models["mixed"], tokenizer, ["hello"], **options)[0]
    assert "".join(pieces) == text == streamed.completion.text
    assert streamed.completion.speed.tokens == 39
    assert "tokens/s" in str(streamed.completion.speed)
    with pytest.raises(ValueError, match="read once"):
        next(iter(streamed))


def test_a_stream_that_was_left_is_not_read_again(models, tokenizer):
    streamed = stream(models["mixed"], tokenizer, "hello", max_tokens=20, stop=())
    next(iter(streamed))
    with pytest.raises(ValueError, match="read once"):
        iter(streamed)


def test_similar_lengths_and_other_settings_share_programs(models, tokenizer):
    def made():
        programs: list[Any] = [session._prefill, session.advance("cpu"), session._first]
        return sum(program._cache_size() for program in programs)

    run(models["plain"], tokenizer, ["hello"], sampling=Sampling(temperature=1.0, top_k=30))
    before = made()
    for prompt, sampling in (
        ("helloHello", Sampling(temperature=0.5, top_k=20)),
        ("abc", Sampling(temperature=2.0, top_k=32, top_p=0.5, min_p=0.1)),
    ):
        run(models["plain"], tokenizer, [prompt], sampling=sampling)
    assert made() == before

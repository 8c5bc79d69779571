"""Generation against repeated full forward passes, and its rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo.zoo import generate
from flaxzoo.zoo.generate import _draw
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
    assert run(models[name], tokenizer, temperature=0.0) == wanted[name]


def test_the_most_likely_of_one_is_greedy(models, tokenizer, wanted):
    assert run(models["mixed"], tokenizer, temperature=5.0, top_k=1) == wanted["mixed"]


def test_greedy_on_a_mesh(decoders, models, tokenizer, wanted):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        places = shardings(describe(decoders["mixed"].abstract()), mesh)
        placed = {n: jax.device_put(np.asarray(x), places[n]) for n, x in split(models["mixed"]).items()}
        found = run(merge(decoders["mixed"].abstract(), placed), tokenizer, temperature=0.0)
    assert found == wanted["mixed"]


def test_seeds_reproduce_and_differ(models, tokenizer):
    texts = [run(models["plain"], tokenizer, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert run(models["plain"], tokenizer, temperature=2.0, key=jax.random.key(1)) == texts[2]


def test_equal_prompts_draw_apart(models, tokenizer):
    first, second, _ = run(models["plain"], tokenizer, ["hello"] * 3, temperature=2.0)
    assert first != second


def test_text_ends_at_a_stop_token(models, tokenizer, wanted):
    letters = [ALPHABET[i] if i < 47 else "" for i in wanted["mixed"][0]]
    stop = letters[4]
    text = generate(models["mixed"], tokenizer, PROMPTS, max_tokens=COUNT, temperature=0.0, stop=(stop,))[0]
    assert text.replace(" ", "") == "".join(letters[: letters.index(stop)])


def test_an_empty_prompt_starts_with_the_stop_token(models, tokenizer):
    found = generate(models["plain"], tokenizer, ["", "a", "b"], max_tokens=COUNT, temperature=0.0)[0]
    ids = greedy(models["plain"], [47])
    ids = ids[: ids.index(47)] if 47 in ids else ids
    assert found.replace(" ", "") == "".join(ALPHABET[i] for i in ids)


def test_draws_follow_the_softmax_of_the_top_k():
    logits = jnp.tile(jnp.asarray([2.0, 1.0, 0.0, -1.0]), (4000, 1))
    keys = jax.random.split(jax.random.key(0), 4000)
    for top_k, temperature in ((0, 1.0), (0, 0.5), (2, 1.0)):
        drawn = np.bincount(_draw(logits, keys, 0, jnp.asarray(temperature), top_k), minlength=4) / 4000
        weights = np.exp(np.array([2.0, 1.0, 0.0, -1.0]) / temperature) * (np.arange(4) < (top_k or 4))
        np.testing.assert_allclose(drawn, weights / weights.sum(), atol=0.03)
        assert not drawn[top_k or 4 :].any()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "got 0 prompts"),
        (["a"], {"temperature": -1.0}, "temperature=-1.0"),
        (["a"], {"max_tokens": 0}, "max_tokens=0"),
        (["a"], {"stop": ("<s>",)}, "it has no '<s>'"),
        ([""], {"stop": ()}, "a token to start from"),
        (["a"], {"top_k": -1}, "top_k"),
        (["hello"], {"max_tokens": 60}, r"64 positions"),
    ],
)
def test_what_cannot_be_is_refused(prompts, options, message, models, tokenizer):
    with pytest.raises(ValueError, match=message):
        generate(models["learned"], tokenizer, prompts, **options)

"""RoPE whose frequencies depend on the length of the text: rows are as alone, and caches are as the whole text.

The reference is a full pass over one row, and transformers for LongRoPE.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_scaling import SCALINGS
from flax import nnx
from flaxzoo import zoo
from flaxzoo.layers.block import Block
from flaxzoo.layers.positions.positions import Positions
from flaxzoo.layers.positions.rope import Rope
from flaxzoo.layers.positions.scaling import EVERY_LENGTH
from flaxzoo.zoo import GREEDY, MLA, Attention, Decoder, GatedMLP, Sampling, Speculation
from flaxzoo.zoo.evaluation.score import Scorer
from flaxzoo.zoo.evaluation.windows import Window
from flaxzoo.zoo.generation import session
from flaxzoo.zoo.generation.session import Session
from flaxzoo.zoo.generation.state import positions_from
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[2] / "truth"
ORIGINAL, COUNT = 12, 8
PROMPTS = [[5, 6, 7], [7, 3, 7, 3, 9, 1, 7, 3, 7, 3], [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1], [4, 8]]
"""Of 8 more tokens, the second takes the text past 12; the third starts past it; the others stay below."""
KINDS = [name for name, scaling in SCALINGS.items() if scaling.equal_lengths(1) != EVERY_LENGTH]
TOKENIZER = Tokenizer(WordLevel({str(i): i for i in range(48)}, unk_token="0"))


@functools.cache
def model(kind, seed=0):
    """Attention with a full cache, with a ring, and MLA."""
    rope = Rope(scaling=SCALINGS[kind].replace(original_length=ORIGINAL))
    plain = Attention(heads=2, kv_heads=1, head_dim=8, rope=rope)
    latent = MLA(heads=2, kv_rank=6, nope_dim=4, rope_dim=8, value_dim=6, rope=rope)
    blocks = [Block(mixer=mixer, ffn=GatedMLP(hidden=16)) for mixer in (plain, plain.replace(window=5), latent)]
    made = Decoder(vocab=48, dim=16, layers=3, block=(*blocks,)).build(rngs=nnx.Rngs(seed))
    return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, made)  # so that attention matters


@jax.jit
def logits_of(model, ids, count):
    return model(ids[None], positions_from(jnp.zeros(1, jnp.int32), count[None], ids.shape[0]))[0][0]


def full_pass(kind, ids):
    """Logits after each token of a text alone."""
    padded = jnp.asarray([*ids, *[0] * (32 - len(ids))], jnp.int32)
    return np.asarray(logits_of(model(kind), padded, jnp.int32(len(ids))))[: len(ids)]


def greedy(kind, ids):
    for _ in range(COUNT):
        ids = [*ids, int(full_pass(kind, ids)[-1].argmax())]
    return ids[-COUNT:]


@functools.cache
def wanted(kind):
    return [greedy(kind, ids) for ids in PROMPTS]


def complete(kind, prompts=PROMPTS, **options):
    options = {"max_tokens": COUNT, "sampling": GREEDY, "stop": ()} | options
    return [text.ids for text in zoo.complete(model(kind), TOKENIZER, prompts, **options)]


def test_two_scalings_depend_on_the_length():
    assert KINDS == ["dynamic", "longrope"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_matters_here(kind):
    """Without which the other tests could not fail."""
    ids = PROMPTS[2]
    changed = full_pass(kind, ids)[:10] - full_pass(kind, ids[:10])
    assert np.abs(changed).max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [512, 4])
def test_generation_is_repeated_full_passes(kind, chunk, monkeypatch):
    monkeypatch.setattr(session, "CHUNK", chunk)
    assert complete(kind) == wanted(kind)


@pytest.mark.parametrize(
    ("kind", "draft"),
    [*((kind, None) for kind in KINDS), ("longrope", ("longrope", 0)), ("dynamic", ("longrope", 1))],
    ids=str,
)
def test_speculative_decoding_is_the_same(kind, draft):
    """With lookup, with the model as its own draft model, and with another one, whose lengths are other ones."""
    options = {"speculation": Speculation(tokens=3, ngram=2), "draft": model(*draft) if draft else None}
    assert complete(kind, **options) == wanted(kind)


def test_sampled_rows_do_not_depend_on_other_rows():
    options = {"sampling": Sampling(temperature=1.5, top_k=20, repetition_penalty=1.3), "seed": 3}
    together = complete("longrope", **options)
    others = complete("longrope", [[9], PROMPTS[1], PROMPTS[2], [9] * 14], **options)
    assert others[1:3] == together[1:3]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_packed_documents_are_as_alone(kind):
    """As in a training step, whatever the micro-batches and the packing."""
    tokens, index, segments = np.zeros((3, 2, 32), np.int32)
    packing = [[PROMPTS[0], PROMPTS[2], PROMPTS[1]], [PROMPTS[3]]]
    for row, documents in enumerate(packing):
        sizes = [len(ids) for ids in documents]
        tokens[row, : sum(sizes)] = np.concatenate(documents)
        index[row, : sum(sizes)] = np.concatenate([np.arange(size) for size in sizes])
        segments[row, : sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    positions = Positions(index=jnp.asarray(index), segments=jnp.asarray(segments))
    logits = jax.jit(lambda model, *inputs: model(*inputs)[0])(model(kind), jnp.asarray(tokens), positions)
    for row, documents in enumerate(packing):
        for number, ids in enumerate(documents, 1):
            found = logits[row][segments[row] == number]
            np.testing.assert_allclose(found, full_pass(kind, ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scored_rows_are_as_alone(kind):
    rows = [Window((*ids,), len(ids) - 1) for ids in PROMPTS]
    for row, found in zip(rows, Scorer(model(kind), length=40, batch=4).likelihoods(rows), strict=True):
        logs = jax.nn.log_softmax(full_pass(kind, row.ids[:-1]))
        assert found.log_prob == pytest.approx(float(sum(logs[np.arange(row.scored), row.ids[1:]])), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_turns_of_a_conversation(kind):
    """Each starts with a part of the text before: shorter, across the original length and back."""
    talk = Session(model(kind), batch=1, length=40, sampling=GREEDY, key=jax.random.key(0))
    reused = []
    for ids in (PROMPTS[3], PROMPTS[1], [*PROMPTS[1], 5, 6, 1], PROMPTS[1][:4], [*PROMPTS[1][:4], 1]):
        reused.append(talk.rewind(ids))
        (new,) = talk.read([ids[reused[-1] :]], COUNT)
        found = [*new.ids]
        while any(talk.active):
            found += talk.advance()[0].ids
        assert found == greedy(kind, ids)
    assert reused == [0, 0, 10 if kind == "longrope" else 0, 0, 4]


def test_crossing_compiles_nothing():
    """What is read again is read by the program of prompts."""
    complete("longrope", PROMPTS[:1])
    programs: list[Any] = [session._prefill, session.advance("cpu"), session._first]
    before = [program._cache_size() for program in programs]
    complete("longrope", PROMPTS[1:2])
    assert [program._cache_size() for program in programs] == before


def test_longrope_is_as_in_transformers():
    """Its greedy text starts at 10 tokens and crosses the original length of 16, beside rows of other lengths."""
    phi3, _ = zoo.load(TRUTH / "phi3_longrope")
    truth = np.load(TRUTH / "phi3_longrope" / "truth.npz")
    text, short = truth["greedy_ids"][0].tolist(), truth["short12_input_ids"][0].tolist()
    prompts = [text[:10], short[:3], text]
    found = zoo.complete(phi3, TOKENIZER, prompts, max_tokens=16, sampling=GREEDY, stop=())
    assert found[0].ids == text[10:]
    rows = [Window((*short,), len(short) - 1), Window((*text,), 16)]
    logs = jax.nn.log_softmax(truth["short12_logits"][0][:-1].astype(np.float32))
    scored = Scorer(phi3, length=40, batch=2).likelihoods(rows)[0].log_prob
    assert scored == pytest.approx(float(sum(logs[np.arange(11), short[1:]])), abs=1e-3)

"""Chat templates in their sandbox, and conversations against the same prompts read anew."""

import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import pytest
from flaxzoo.zoo import GREEDY, ChatTemplate, Conversation, Sampling, generate
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

pytestmark = pytest.mark.usefixtures("quick_compiler")
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_template_as_on_the_hub():
    """The text that transformers makes of it."""
    text = ChatTemplate(CHATML).render(HELLO)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(CHATML).render(HELLO, prompt=False) == text.removesuffix("<|im_start|>assistant\n")
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') | int > 2000 }}"
    )
    assert ChatTemplate(template, {"bos_token": "<s>"}).render([{"role": "user", "content": "é"}] * 2) == (
        '<s>{"role": "user", "content": "é"}True'
    )
    assert ChatTemplate("{{ tools[0] }}").render(HELLO, tools=["a"]) == "a"
    marked = "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ messages[0].content }}{% endgeneration %}{{ a }}"
    assert ChatTemplate(marked).render(HELLO) == "Hello1"
    assert ChatTemplate("{{ ['é'] | tojson(ensure_ascii=True) }}").render(HELLO) == '["\\u00e9"]'
    assert ChatTemplate("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}").render(HELLO) == (
        '{"a":2,"b":1}'
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe"),
        ("{{ 'x' * 100000000 * 100 }}", "too large"),
        ("{{ 9 ** 99999 }}", "too large"),
        ("{% for i in range(1000000) %}{% endfor %}", "[Rr]ange too big"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ missing.field }}", "missing"),
        ("{{ 1 / 0 }}", "division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' | urlize }}", "urlize"),
    ],
)
def test_templates_are_not_trusted(template, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(template).render(HELLO)


HUNGRY = {
    "center": "{{ 'x' | center(1000000000) }}",
    "center by map": "{{ ['x'] | map('center', 1000000000) | list | length }}",
    "ljust": "{{ 'x'.ljust(1000000000) | length }}",
    "zfill by name": "{{ 'x'['zfill'](1000000000) }}",
    "attr": "{{ ('x' | attr('rjust'))(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ ('x\n' * 1000) | indent(1000000) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format nested text": "{{ '{0:{1}}'.format(1, '1000000000') }}",
    "format map": "{{ '{a:.1000000000f}'.format_map({'a': 1.0}) }}",
    "format filter": "{{ '%1000000000s' | format(1) }}",
    "percent": "{{ '%.*f' % (1000000000, 1.0) }}",
    "percent many": "{{ ('%(a)s' * 10000) % {'a': 'x' * 10000} }}",
    "replace": "{{ ('x' * 100000).replace('', 'y' * 1000) }}",
    "replace filter": "{{ ('x' * 100000) | replace('x', 'y' * 1000) }}",
    "join": "{{ ('x' * 100000).join(range(100000)) }}",
    "join filter": "{{ range(100000) | join('x' * 100000) }}",
    "repeat": "{{ 1000000000 * 'x' }}",
    "repeat list": "{{ ([1] * 1000000000) | length }}",
    "powers": "{% set n = namespace(x=10) %}{% for i in range(100) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by set": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "doubling by macro": "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ f('x', 60) }}",
    "nested lists": "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "nested json": "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
    "nested compared": "{% set n = namespace(x=[], y=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "nested keys": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
    "{{ {n.x: 1} | length }}",
    "nested test": "{% set n = namespace(x=[], y=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x is eq(n.y) }}",
    "nested namespaces": "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = namespace(a=n.x, b=n.x) %}"
    "{% endfor %}{{ n.x }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "output": "{% for a in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "json indent": "{{ {'a': [1]} | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "sum of lists": "{{ range(9999) | map('string') | map('list') | sum(start=[]) }}",
    "sum of strings": "{{ [[1]] | sum(start=[]) }}",
    "fromkeys": "{{ {}.fromkeys(range(99999)) }}",
    "bytes": "{{ (1).to_bytes(1000000000) }}",
    "translate": "{{ 'xx'.translate({120: 'y' * 1000000}) }}",
    "rfind": "{% set t = 'a' * 9000000 %}{{ t.rfind('b' ~ 'a' * 4000000) }}",
    "strip": "{% set t = 'a' * 9000000 %}{{ t.strip('b' * 4000000 ~ 'a') | length }}",
    "slices": "{% set t = 'a' * 9000000 %}{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set n.x = n.x + [t[1:]] %}{% endfor %}",
    "wordwrap": "{{ ('x' * 1000000) | wordwrap(1) }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "strftime": "{{ strftime_now('%c' * 100000) }}",
}


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", HUNGRY)
def test_time_and_memory_are_bounded(name):
    """Every construct, off the main thread too, where no signal could stop it."""
    refused = "the chat template was stopped: |lipsum|wordwrap|Range too big|nested too deeply|recursion"

    def render():
        before, started = peak_memory(), time.thread_time()
        with pytest.raises(ValueError, match=refused) as error:
            ChatTemplate(HUNGRY[name]).render(HELLO)
        return error, time.thread_time() - started, peak_memory() - before

    with ThreadPoolExecutor() as pool:
        error, seconds, memory = pool.submit(render).result()
    assert len(str(error.value)) < 300
    assert seconds < 20
    assert memory < 400e6


def test_long_conversations_are_rendered():
    """A thousand messages and a million characters take a small part of what there is."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(1000)]
    template = (
        "{% set n = namespace(seen=[], text='') %}{% for m in messages %}{% set n.seen = n.seen + [m] %}"
        "{% if m.role == 'user' and m['content'] is string and 'x' not in m.content %}"
        "{{ '[' ~ m.content | trim ~ ']' }}"
        "{% else %}{{ m.content.split(' ') | join(' ') }}{{ loop.length }}{% endif %}{% endfor %}"
        "{% for m in messages[::-1] %}{{ m | tojson(indent=2) | length }}{% endfor %}{{ n.seen | length }}"
    )
    text = ChatTemplate(template).render(messages)
    assert text.endswith("1000")
    assert len(text) > 1e6


def test_what_is_no_template_or_no_message_is_refused():
    with pytest.raises(ValueError, match="not valid, in line 2"):
        ChatTemplate("a\n{% if %}")
    for deep in ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% for a in b %}" * 25 + "{% endfor %}" * 25):
        with pytest.raises(ValueError, match="nested too deeply"):
            ChatTemplate(deep)
    with pytest.raises(ValueError, match="at least one message"):
        ChatTemplate("").render([])
    with pytest.raises(ValueError, match="role and content"):
        ChatTemplate("").render([{"role": "user"}])


def test_without_jinja(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="chat templates need the package jinja2, which is not installed"):
        ChatTemplate("")


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRST"
TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role[0] }}{{ m.content }}Z{% endfor %}a")


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))
    made.pre_tokenizer = Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["Z"])
    return made


@pytest.mark.parametrize(
    ("name", "sampling"), [("plain", GREEDY), ("mixed", Sampling(temperature=0.0, repetition_penalty=1.5))]
)
def test_turns_are_as_if_read_anew(name, sampling, models, tokenizer):
    """`mixed` has rings: what they forgot is read again. The last message takes more room than there is."""
    talk = Conversation(models[name], tokenizer, TEMPLATE, stop=("Z",), sampling=sampling)
    reused, lengths = [], []
    for text in ("hello" * 8, "how", "a longer message", "the longest" * 8):
        prompt = TEMPLATE.render([*talk.messages, {"role": "user", "content": text}])
        answer = "".join(talk.say(text, max_tokens=11))
        wanted = generate(
            models[name], tokenizer, [prompt], max_tokens=11, special_tokens=True, sampling=sampling, stop=("Z",)
        )[0]
        assert answer == wanted
        assert talk.messages[-1] == {"role": "assistant", "content": answer}
        reused.append(talk.reused)
        lengths.append(len(prompt))  # a letter is a token
    assert reused[0] == reused[3] == 0
    assert reused[1] >= lengths[0] > 40
    assert reused[2] >= lengths[1] > 45


def test_reset_and_an_answer_that_is_left(models, tokenizer):
    talk = Conversation(models["mixed"], tokenizer, TEMPLATE, stop=(), system="kind", sampling=GREEDY)
    pieces: Any = talk.say("hello", max_tokens=40)
    first = next(pieces)
    pieces.close()
    assert [m["content"] for m in talk.messages] == ["kind", "hello", first]
    prompt = TEMPLATE.render([*talk.messages, {"role": "user", "content": "go"}])
    wanted = generate(
        models["mixed"], tokenizer, [prompt], max_tokens=5, special_tokens=True, sampling=GREEDY, stop=()
    )[0]
    assert "".join(talk.say("go", max_tokens=5)) == wanted
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "kind"}]
    assert "".join(talk.say("hello", max_tokens=40)).startswith(first)


def test_a_message_that_does_not_fit_is_not_kept(models, tokenizer):
    talk = Conversation(models["learned"], tokenizer, TEMPLATE, stop=("Z",))
    with pytest.raises(ValueError, match="64 positions"):
        list(talk.say("hello", max_tokens=60))
    assert talk.messages == []
    assert len("".join(talk.say("hello", max_tokens=5))) <= 5


def test_draws_differ_from_turn_to_turn(models, tokenizer):
    options = {"stop": (), "sampling": Sampling(temperature=3.0), "dtype": jnp.float32, "seed": 1}
    talk = Conversation(models["plain"], tokenizer, TEMPLATE, **options)
    answers = []
    for _ in range(2):
        answers.append("".join(talk.say("hello", max_tokens=12)))
        talk.reset()
    again = "".join(Conversation(models["plain"], tokenizer, TEMPLATE, **options).say("hello", max_tokens=12))
    assert answers[0] == again != answers[1]

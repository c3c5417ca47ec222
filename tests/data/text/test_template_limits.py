"""Chat templates of strangers: rendered as the library renders them, and at an end within seconds whatever they do."""

import json
import os
import random
import threading
import time

import pytest
from layout_cases import byte_tokenizer
from test_growing_chat_templates import SPECIAL, TEMPLATES
from test_rewriting_chat_templates import SOURCES

from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.text.template_process import (
    MAX_SOURCE,
    TemplateFailedError,
    TemplateLimitError,
    TemplateSaysError,
    render_template,
)
from vlm_distill_cache.data.text.templates import PromptTemplate, get_template

TALK = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
ALL = [(2, False)]
# What published templates use of the environment beside loops and conditions.
FEATURES = (
    "{%- set ns = namespace(n=0, self=1) -%}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% break %}{% endfor %}{{ ns.n }}{{ dict(a=1) | tojson }}{{ 'é<&' | tojson }}",
    "{{ messages | tojson(indent=2, sort_keys=true) }}{{ strftime_now('%Y') }}{{ bos_token }}{{ eos_token }}{{ no_token }}",
    "   {% if tools is none and documents is none %}\n  x\n   {%- endif %}\n{% generation %}{{ messages[0].content }}"
    "{% endgeneration %}\n{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}{{ range(3) | list }}{{ messages is mapping }}",
    "{{ dict.fromkeys('ab') }}{{ '<b>' | e }}{{ '%s' % 3 }}{{ messages[-1]['content'].upper() }}{# none #}\n",
)
HOSTILE = {
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'A' * 10**10 }}",
    "a long text at once": "{{ 'A' * 500000000 }}",
    "padding": "{{ 'x' | center(10**10) }}",
    "a wide number": "{{ '%10000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    "a power": "{{ (10 ** (10**9)) % 3 }}",
    "a recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "much JSON": "{{ (range(100000) | list * 1000) | tojson(indent=9) }}",
    "many words": "{{ lipsum(100000, min=1000, max=1001) }}",
    "much output": "{% for a in range(100000) %}{{ 'A' * 1000 }}{% endfor %}",
}
FAILING = {
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 900 + "]" * 900 + " }}",
    "deep conditions": "{% if x %}" * 5000 + "{% endif %}" * 5000,
    "its own class": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a filter that is none": "{{ 1 | no_such }}",
    "a hidden name": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
}


def tokenizer_of(source=""):
    tokenizer = byte_tokenizer(SPECIAL, eos_token="</s>", pad_token="</s>", bos_token="<bos>")
    tokenizer.chat_template = source
    return tokenizer


def test_every_known_template_is_rendered_as_the_library_renders_it():
    tokenizer, rng = tokenizer_of(), random.Random(0)
    variables = json.dumps(tokenizer.special_tokens_map)
    words = ["é中🙂", "<b>", "{{ x }}", "\n", " a ", "<think>x</think>", "\ud800", "'\"\\"]
    for name, source in {**TEMPLATES, **SOURCES, **dict(enumerate(FEATURES))}.items():
        for asks in (True, False):
            texts = ["".join(rng.choices(words, k=3)) for _ in range(4)]
            talk = [
                {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)
            ]
            if "image" in source or name == "system":
                talk = [{**m, "content": [{"type": "image"}, {"type": "text", "text": m["content"]}]} for m in talk]
            expected = tokenizer.apply_chat_template(
                talk, chat_template=source, tokenize=False, add_generation_prompt=asks
            )
            assert next(render_template(source, variables, talk, [(len(talk), asks)])) == expected, name


QUICK = ("nested loops", "a long text", "doubling", "much output")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HOSTILE])
def test_a_template_may_take_two_seconds_and_a_gigabyte_and_no_more(name):
    begun = time.monotonic()
    with pytest.raises(TemplateLimitError, match=r"^(takes|writes) more than"):
        list(render_template(HOSTILE[name], "{}", TALK, ALL))
    assert time.monotonic() - begun < 20
    assert list(render_template("{{ messages[0].content }}", "{}", TALK, ALL)) == ["what?"]


def test_what_the_sandbox_or_the_parser_refuses_is_the_templates_fault():
    for source in FAILING.values():
        with pytest.raises(TemplateFailedError):
            list(render_template(source, "{}", TALK, ALL))
    with pytest.raises(TemplateSaysError, match=r"^no\.$"):
        list(render_template("{{ raise_exception('no.') }}", "{}", TALK, ALL))


def test_the_error_names_whose_template_it_is_and_another_one():
    stored = {**PromptTemplate(name="chat", chat_template="{{ 'A' * 10**10 }}").to_dict()}
    template = PromptTemplate.from_dict(stored, origin="some/cache")
    assert template.to_dict() == stored
    turns = (Turn(question="a", answer="b"),)
    with pytest.raises(TemplateLimitError, match=r"of some/cache takes more than 1024 MiB.*template=vicuna_v1"):
        template.render(turns, tokenizer_of(), has_image=False)
    with pytest.raises(ConfigError, match=rf"chat_template has \d+ characters, expected at most {MAX_SOURCE}"):
        get_template("chat", tokenizer_of("a" * (MAX_SOURCE + 1)))
    for field, value in [
        ("system", 3),
        ("drops_question", "no"),
        ("answer_end", []),
        ("chat_template", None),
        ("x", 1),
    ]:
        with pytest.raises(ConfigError, match="some/cache"):
            PromptTemplate.from_dict({**stored, field: value}, origin="some/cache")
    many = (Turn(question="a" * 1000, answer="b" * 1000),) * 1000
    with pytest.raises(SampleError, match="1000 turns with 2000000 characters"):
        get_template("chat", tokenizer_of("x")).render(many, tokenizer_of(), has_image=False)


def test_threads_and_forked_processes_get_the_answers_to_their_own_questions():
    found = []

    def ask(number):
        for turn in range(20):
            text = f"{number}-{turn}" * 1000
            found.append(
                [text] == list(render_template("{{ messages[0].content }}", "{}", [{"content": text}], [(1, True)]))
            )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    children = []
    for number in range(3):
        if not (child := os.fork()):
            try:
                found.clear()
                ask(number)
            finally:
                os._exit(found != [True] * 20)
        children.append(child)
    for thread in threads:
        thread.join()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert found == [True] * 60

"""Chat templates: what authors of templates rely on, and what a hostile one can do."""

import datetime

import pytest

from lora_jax.core.errors import ChatTemplateError
from lora_jax.models.text import chat_template

MESSAGES = [{"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}\n    {% if loop.first %}\n{{ m.role }}\n{% endif %}"
         "\n{% endfor %}",
         "user\n"),  # no lines and no indentation left of blocks
        ("{{ messages[0]['content'] }}", "hi <b>"),  # text, not HTML
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hi <b>"}'),
        ("{{ {'a': [1]} | tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{{ {'b': [1, 2], 'a': 'é'} | tojson(separators=(',', ':'), sort_keys=True) }}",
         '{"a":"é","b":[1,2]}'),
        ("{{ 'é' | tojson(ensure_ascii=True) }}", '"\\u00e9"'),
        ("{% for m in messages %}{% if not loop.first %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}"
         "{{ n.x }}", "2"),
        ("{{ strftime_now('%%') }}{{ tools }}{{ bos_token }}", "%<s>"),
    ],
)  # fmt: skip
def test_what_templates_use(template, text):
    assert chat_template.render(template, MESSAGES, bos_token="<s>") == text


@pytest.mark.parametrize(
    ("template", "spoken"),
    [
        ("{% for m in messages %}<{% generation %}{{ m.content }}|{% endgeneration %}{% endfor %}",
         ["hi <b>|", "ho|"]),
        ("{%- generation -%}  x {%- endgeneration -%}y", ["x"]),
        ("{% macro say(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}"
         "{{ say(messages[1]) }}", ["ho"]),
        ("{% set said %}{% generation %}a{% endgeneration %}{% endset %}{{ said }}{{ said }}",
         ["a", "a"]),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", [""]),
        ("nothing", []),
    ],
)  # fmt: skip
def test_what_the_assistant_says(template, spoken):
    text, spans = chat_template.render_spans(template, MESSAGES)
    assert [text[start:end] for start, end in spans] == spoken
    assert text == chat_template.render(template, MESSAGES) and text.isprintable()


def test_the_day_can_be_given():
    template = "{{ strftime_now('%d %b %Y') }}"
    day = datetime.datetime(2025, 7, 9, 23, 59)
    assert chat_template.render(template, MESSAGES, day) == "09 Jul 2025"
    today = datetime.datetime.now().year
    assert int(chat_template.render("{{ strftime_now('%Y') }}", MESSAGES)) in (today, today + 1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "failed"),
        ("{% generation %}x", "endgeneration"),
        ("{{ lipsum.__globals__['os'] }}", "unsafe"),
        ("{{ raise_exception('roles must\nalternate') }}", "failed: roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ messages[0].update({'role': 'x'}) }}", "unsafe|not safely callable"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ strftime_now.__globals__['__builtins__'] }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 10000000"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'passwd' %}", "no loader"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute"),
    ],
)
def test_broken_and_hostile_templates(template, message):
    with pytest.raises(ChatTemplateError, match=message) as caught:
        chat_template.render(template, MESSAGES)
    assert "\n" not in str(caught.value)

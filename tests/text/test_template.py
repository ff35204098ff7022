"""Chat templates: bounds, no access beyond what they are given, dates."""

from __future__ import annotations

from datetime import datetime

import pytest

from omni.text.template import ChatTemplate

TEMPLATES = [
    ("{{ 'a' * 10 ** 9 }}", "too large"),
    ("{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "too large"),
    ("{{ '%999999999d' % 1 }}", "too large"),
    ("{% for i in range(99999) %}{% for j in range(99) %}{{ 'a' * 1000 }}{% endfor %}{% endfor %}", "writes more than"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "MAX_RANGE"),
    ("{{ messages.append(1) }}", "refuses"),
    ("{{ ().__class__.__base__.__subclasses__() }}", "refuses"),
    ("{{ namespace(__class__=1) }}", "underscore"),
    ("{% include 'x' %}", "(refuses|fails)"),
    ("{% if %}", "no valid Jinja"),
    ("{{ messages[0].content + 1 }}", "fails for these messages"),
]


LONG = "{% set x = 'ab' * 20000000 %}"  # characters: 40 million; the limit is 67
GROWING = [
    LONG + "{{ x ~ x }}",
    "{{ 'x'.center(70000000) }}",
    "{{ 'x'|center(70000000) }}",
    "{{ 'x'.zfill(70000000) }}",
    "{{ '{:70000000}'.format(1) }}",
    "{{ '%70000000d'|format(1) }}",
    LONG + "{{ x.replace('a', 'cc') ~ 1 }}{{ x.replace('b', 'ccc') }}",
    LONG + "{{ x|replace('b', 'ccc') }}",
    LONG + "{{ [x, x]|join }}",
    LONG + "{{ x.join(['', '', '']) }}",
    "{{ '\\n\\n\\n'|indent(30000000) }}",
    "{{ messages|tojson(indent=70000000) }}",
]


@pytest.mark.parametrize("source", GROWING)
def test_strings_on_the_way_are_bounded(source: str) -> None:
    with pytest.raises(ValueError, match="refuses the conversation: a result of '.*' is too large"):
        ChatTemplate(source + "{{ 1 }}").render([{"role": "user", "content": "x"}])


def test_bounded_filters_and_methods_are_those_of_jinja() -> None:
    source = (
        "{{ 'a' ~ 1 ~ none ~ nothing }},{{ 'x'|center(3) }},{{ ['a', 1]|join('-') }},{{ 'abc'|join('.') }},"
        "{{ 'aXbX'|replace('X', 'yy', 1) }},{{ '%s!'|format('b') }},{{ 'a\\nb'|indent(2) }},{{ '{}'.format(3) }},"
        "{{ 'q'.replace('', '-') }},{{ ','.join(['a', 'b']) }},{{ {'a': 1}|tojson }},{{ [{'t': 2}]|join(',', 't') }}"
    )
    rendered = ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert rendered == 'a1None, x ,a-1,a.b.c,ayybX,b!,a\n  b,3,-q-,a,b,{"a": 1},2'


@pytest.mark.parametrize(("source", "message"), TEMPLATES)
def test_templates_are_bounded_and_have_no_access(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_the_date_of_a_template_can_be_given() -> None:
    text = "{{ strftime_now('%d %b %Y') }} {{ {'a': '<é>'} | tojson }}{% break %}"
    source = "{% for m in messages %}" + text + "{% endfor %}"
    template = ChatTemplate(source, now=lambda: datetime(2024, 7, 26))
    assert template.render([{"role": "user", "content": "x"}]) == '26 Jul 2024 {"a": "<é>"}'
    with pytest.raises(ValueError, match="more than 1,048,576"):
        ChatTemplate("x" * (1 << 20) + "x")

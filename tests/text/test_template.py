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

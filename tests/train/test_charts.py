"""Charts: pictures of the size asked for, SVG without addresses, awkward values and names, and a missing matplotlib."""

from __future__ import annotations

import math
import sys
from xml.etree import ElementTree

import pytest

from eval.report import _curve
from eval.task import Curve
from train.charts import charts, new_figure, require_matplotlib, to_picture, to_svg


def test_a_picture_has_the_size_of_its_panels_and_legend() -> None:
    line = [(1.0, 0.5), (2.0, math.inf), (4.0, -1.0), (8.0, 0.25)]
    picture = to_picture(charts({"a": {"one": line, "none": []}, "b": {"two": line}}, "x", "y", (300, 200), log=True))
    assert picture.height == 200 and picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 16) or []) > 4
    assert to_picture(new_figure(90, 26)).size == (90, 26)


def test_an_svg_keeps_its_text_and_names_no_address() -> None:
    element = to_svg(charts({"a < b & $x_": {"_hidden": [(0.0, 1.0), (1.0, 2.0)]}}, "steps", "%", (300, 200)))
    assert element.startswith("<svg") and element.endswith("</svg>") and "http" not in element
    found = ElementTree.fromstring(element.replace("xlink:href", "href"))
    texts = {"".join(each.itertext()).strip() for each in found.iter("text")}
    assert {"a < b & $x_", "_hidden", "steps", "%"} <= texts


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"omni-flow\[plots\]"):
        require_matplotlib()
    assert "omni-flow[plots]" in _curve(Curve("t", "x", "y", {"a": [(0.0, 1.0)]})) and not _curve(
        Curve("t", "", "", {})
    )

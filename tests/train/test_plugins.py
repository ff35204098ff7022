"""A recipe names the data source of an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugins import install

from omni.data.source import SOURCES
from train.__main__ import main
from train.metrics import read_metrics

COUNTING = """
from pydantic import Field

from omni.config import Frozen
from omni.data.source import SOURCES, Source
from omni.document import Document, Role, Text


class CountingOptions(Frozen):
    highest: int = Field(default=9, ge=1)


@SOURCES.register("counting")
class Counting(Source):
    Options = CountingOptions

    def document(self, index):
        number = self.key.fold(index).python().randint(0, self.options.highest)
        return Document((Text(f"after {number}?"), Text(str(number + 1), Role.ASSISTANT, supervise=True)))
"""


def test_a_recipe_names_the_source_of_an_installed_package(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "omni-counting", {"omni.sources": {"counting": "counting"}}, {"counting": COUNTING})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(SOURCES, "_items", dict(SOURCES._items))
    out = tmp_path / "out"
    words = [str(recipe_file), 'objectives=[{name="next_token"}]', "max_steps=2", "--out", str(out)]
    assert main([*words, 'data=[{name="counting", options={higest=3}}]']) == 2
    assert "unknown key 'higest'; did you mean 'highest'" in capsys.readouterr().err
    assert main([*words, 'data=[{name="counting", options={highest=3}}]']) == 0
    assert len(read_metrics(out / "metrics.jsonl")) == 2
    assert (out / "model/manifest.json").is_file()

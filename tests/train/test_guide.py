"""train/README.md is true: its paths and names exist, its tables are those of the registries."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from omni.data.source import SOURCES
from omni.objectives import OBJECTIVES
from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "train/README.md").read_text(encoding="utf-8")
PATHS = re.findall(
    r"\b((?:omni|train|tokenizers_cfg)/[\w./]*\w(?:\.toml|\.py|\.md|\.jsonl)|(?:omni|train)/[\w/]+/)", GUIDE
)


def section(name: str) -> str:
    return GUIDE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def names(text: str) -> list[str]:
    """The names in the first column of a table, below its head."""
    return [
        name
        for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
        if name != "name"
    ]


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_file_has_its_place() -> None:
    parts = [path.relative_to(ROOT) for path in (ROOT / "train").rglob("*.py") if path.name != "__init__.py"]
    place = section("Where is what")
    missing = [str(path) for path in parts if f"`{path}`" not in place and f"`{path.name}`" not in place]
    recipes = [path.relative_to(ROOT) for path in (ROOT / "train/recipes").rglob("*.toml")]
    assert not missing + [str(path) for path in recipes if f"`{path}`" not in GUIDE]


def test_names_are_defined_where_the_table_has_them() -> None:
    rows = re.findall(r"`(train/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", section("Where is what"))
    assert len(rows) > 20
    for path, listed in rows:
        nodes = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        assert set(re.findall(r"`(\w+)`", listed)) <= defined, path


def test_tables_are_those_of_the_registries() -> None:
    assert sorted(names(section("Data"))) == SOURCES.names()
    assert sorted(names(section("Objectives"))) == OBJECTIVES.names()
    for source, options in re.findall(r"^\| `(\w+)` \| .* \| (`.*`) \|$", section("Data"), re.MULTILINE):
        assert set(re.findall(r"`(\w+)`", options)) <= SOURCES.get(source).Options.model_fields.keys()
    listed = re.findall(r"^\| `\[\[?(\w+)\]?\]` \|", GUIDE, re.MULTILINE)
    assert len(listed) > 8 and set(listed) <= Recipe.model_fields.keys()


def test_it_is_short_and_names_no_machine() -> None:
    for name in ("README.md", "LOG.md"):
        text = (ROOT / "train" / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 250 and not re.search(r"/(work|home|root|opt)/", text)

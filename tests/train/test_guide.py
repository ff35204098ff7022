"""train/README.md lists every file and the registries. tests/test_readmes.py checks its paths and names."""

from __future__ import annotations

import re
from pathlib import Path

from omni.data.source import SOURCES
from omni.objectives import OBJECTIVES
from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "train/README.md").read_text(encoding="utf-8")


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


def test_every_file_is_listed() -> None:
    parts = [path.relative_to(ROOT) for path in (ROOT / "train").rglob("*.py") if path.name != "__init__.py"]
    place = section("Where is what")
    missing = [str(path) for path in parts if f"`{path}`" not in place and f"`{path.name}`" not in place]
    recipes = [path.relative_to(ROOT) for path in (ROOT / "train/recipes").rglob("*.toml")]
    unlisted = [path for path in recipes if f"`{path}`" not in GUIDE and f"`{path.parent}/`" not in GUIDE]
    assert not missing + list(map(str, unlisted))


def test_tables_are_those_of_the_registries() -> None:
    """A new file needs no line in them."""
    for title, registry in (("Data", SOURCES), ("Objectives", OBJECTIVES)):
        assert len(names(section(title))) > 5 and set(names(section(title))) <= set(registry.names())
    for source, options in re.findall(r"^\| `(\w+)` \| .* \| (`.*`) \|$", section("Data"), re.MULTILINE):
        assert set(re.findall(r"`(\w+)`", options)) <= SOURCES.get(source).Options.model_fields.keys()
    listed = re.findall(r"^\| `\[\[?(\w+)\]?\]` \|", GUIDE, re.MULTILINE)
    assert len(listed) > 8 and set(listed) <= Recipe.model_fields.keys()


def test_they_are_short() -> None:
    for name in ("README.md", "LOG.md"):
        assert len((ROOT / "train" / name).read_text(encoding="utf-8").splitlines()) <= 250

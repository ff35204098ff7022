"""Wordings of people, the templates of phrases/*.toml by file and key: "ask.draw", "second.background".

{a} stands for a thing with its article, {x} without, {many} for its plural; {b}, {d} for further things with articles,
{c} for a colour, {n} for a number.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from omni.data.emoji_world.words import with_article

FOLDER = Path(__file__).with_name("phrases")
REPLIES_FILE = Path(__file__).with_name("replies.json")


@cache
def wordings() -> Mapping[str, tuple[str, ...]]:
    """Templates by "file.key"."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        things = table.pop("things", {})
        for key, lines in {**table, **things}.items():
            found[f"{path.stem}.{key}"] = tuple(lines)
    return found


@cache
def unknown_things() -> tuple[tuple[str, str], ...]:
    """Things that no emoji shows: (with article, without). Lists whose key ends in _bare have no article."""
    found = []
    for key, things in wordings().items():
        file, _, name = key.partition(".")
        if file == "unknown" and name != "decline":
            found += [(x if name.endswith("_bare") else with_article(x), x) for x in things]
    return tuple(dict.fromkeys(found))


@cache
def replies() -> tuple[tuple[str, str], ...]:
    """Requests for text alone, each with the reply of the frozen language model (train/tools/replies.py)."""
    return tuple((request, reply) for request, reply in json.loads(REPLIES_FILE.read_text(encoding="utf-8")))

"""The names that people give to emoji: Unicode's short name, names written for it, aliases and keywords, and which are
held out."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from omni.rng import Key

NAMES_FILE = Path(__file__).with_name("names.json")
HELD_OUT = 0.08  # share of the other names that no training document contains


@cache
def other_names() -> dict[str, list[str]]:
    """Short name -> its other names, those written for it first. Each belongs to one emoji."""
    table = json.loads(NAMES_FILE.read_text(encoding="utf-8"))
    return {name: [*table["written"][name], *table["listed"][name]] for name in table["written"]}


@cache
def is_held_out(name: str) -> bool:
    """Whether no training document asks for an emoji by this other name. Short names never are held out. Independent of
    any seed; keyed by these strings: another key moves test names into training."""
    if name in other_names():
        return False
    return Key(0).fold("everyday", "names", name).integer() / 2**63 < HELD_OUT


@cache
def names_of(name: str, split: str) -> tuple[str, ...]:
    """The names of an emoji in a split, by its short name, which is the first in "train"."""
    wanted = split == "heldout"
    own = () if wanted else (name,)
    return (*own, *(other for other in other_names()[name] if is_held_out(other) == wanted))


@cache
def emoji_of(name: str) -> str | None:
    """The short name of the emoji that a name belongs to, in any split; None for no emoji's name."""
    return _owners().get(name)


@cache
def _owners() -> dict[str, str]:
    return {other: name for name, others in other_names().items() for other in (*others, name)}

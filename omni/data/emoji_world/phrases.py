"""User texts: the templates of phrases.toml by kind.

Every list has a multiple of five templates; each fifth one is held out from training (`is_heldout`).
A phrasing is named "kind/number". The last word of a kind after a dot is a variant of the same request.
Templates are known by number: never insert or reorder, or held-out ones move into training.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("phrases.toml")
TEMPLATES: dict[str, tuple[str, ...]] = {
    kind: tuple(block.strip().splitlines()) for kind, block in tomllib.loads(FILE.read_text("utf-8")).items()
}

HELDOUT_EVERY = 5  # the last of every five templates


def is_heldout(number: int) -> bool:
    """Whether the template of this number, in any list, belongs to the heldout split."""
    return number % HELDOUT_EVERY == HELDOUT_EVERY - 1


@cache
def template_numbers(kind: str, split: str) -> tuple[int, ...]:
    """The numbers of the templates of a kind in a split."""
    return tuple(i for i in range(len(TEMPLATES[kind])) if is_heldout(i) == (split == "heldout"))

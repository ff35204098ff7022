"""What users say: the templates of phrases.toml by kind.

Every list has a multiple of five templates; each fifth one is held out (`is_heldout`): training never uses it.
A phrasing is named "kind/number". The last word of a kind after a dot is a variant of the same request.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("phrases.toml")
TEMPLATES: dict[str, tuple[str, ...]] = {
    kind: tuple(block.strip().splitlines()) for kind, block in tomllib.loads(FILE.read_text("utf-8")).items()
}

HELDOUT_EACH = 5


def is_heldout(number: int) -> bool:
    """Whether the template of this number, in any list, is kept for the heldout split."""
    return number % HELDOUT_EACH == HELDOUT_EACH - 1


@cache
def numbers(kind: str, split: str) -> tuple[int, ...]:
    """The numbers of the templates of a kind that a split may use."""
    return tuple(i for i in range(len(TEMPLATES[kind])) if is_heldout(i) == (split == "heldout"))

"""Foreign words: the request does not change; without the option documents do not change."""

from __future__ import annotations

import random
import re

from omni.data.emoji_world import Atlas, EmojiWorld
from omni.data.emoji_world.foreign import FILLERS, MIN_WORDS, NEVER_REPLACED, foreign_word, with_foreign_words
from omni.data.emoji_world.phrases import TEMPLATES

SLOT = re.compile(r"\{\w+\}")


def test_foreign_words_keep_slots_and_the_end() -> None:
    draw = random.Random(0)
    replaced = set()
    for kind, templates in TEMPLATES.items():
        for template in templates:
            for _ in range(20):
                made = with_foreign_words(template, kind, draw)
                assert SLOT.findall(made) == SLOT.findall(template)
                assert made != template
                assert (made[-1] == "?") == (template[-1] == "?")
                if len(made.split()) == len(template.split()):
                    replaced.add(kind)
                    assert sum(word.isalpha() for word in template.split()) >= MIN_WORDS
    assert {"draw", "name", "story"} <= replaced
    assert not any(kind.startswith(NEVER_REPLACED) for kind in replaced)


def test_made_up_words_are_plain_and_varied() -> None:
    draw = random.Random(1)
    words = {foreign_word(draw) for _ in range(3000)}
    assert len(words) > 1200 and all(word.isalpha() and word.islower() for word in words)
    assert words > set(FILLERS)


def test_the_share_and_the_default() -> None:
    atlas = Atlas()
    plain, foreign, none = (EmojiWorld(atlas, 4, foreign=share) for share in (0.0, 1.0, 0.0))
    for index in range(30):
        one, other = plain.document(index), foreign.document(index)
        assert one.meta == none.document(index).meta
        assert one.meta["task"] == other.meta["task"]
    words = [
        [s.text for s in world.document(i).segments if hasattr(s, "text")][0]
        for world in (plain, foreign)
        for i in range(30)
    ]
    assert len(set(words[30:]) & set(words[:30])) == 0

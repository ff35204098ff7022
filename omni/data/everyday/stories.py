"""Picture stories in sentences of the language model itself: `stories.json`, and the task whose replies they are.

A line of the file is a story: [hero, [[sentence, [names in the picture], layout], ...]]. The layout has the words of a
Beat. train/tools/stories.py writes the file; the model omni/smol was trained on the committed one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omni.data.emoji_world.scene import BACKGROUNDS, PAIR_SLOTS, Scene, single, small_objects
from omni.data.emoji_world.words import NUMBERS, with_article
from omni.data.everyday.builder import Builder
from omni.data.everyday.names import names_of

STORIES_FILE = Path(__file__).with_name("stories.json")
MAX_WORDS = 16  # of a sentence
MOST_PICTURES = 4
SENTENCE = re.compile(r"[A-Z][A-Za-z' -]*(?:, [A-Za-z' -]+)*\.")
# Words of a sentence that give its picture a background; the first one in the sentence counts.
COLOURS = {
    "green": ("grass", "forest", "garden", "field", "fields", "park", "meadow", "woods"),
    "blue": ("sea", "lake", "ocean", "river", "water", "pond"),
    "pink": ("evening", "sunset", "pink"),
    "purple": ("night", "midnight"),
    "yellow": ("sunny", "sunshine"),
}


@dataclass(frozen=True)
class Beat:
    """A sentence and its picture. names: one, or the hero and what stands with it. layout: words "beside" (hero on the
    left) or "under" (hero below) of a pair, then a background, white where none is named."""

    sentence: str
    names: tuple[str, ...]
    layout: str

    def scene(self) -> Scene:
        """The picture. ValueError for an unknown layout."""
        *place, background = self.layout.split() if self.layout.split()[-1] in BACKGROUNDS else [self.layout, "white"]
        if len(self.names) == 1 and not place:
            return single(self.names[0], background)
        if len(self.names) == 2 and place == ["beside"]:
            return small_objects(self.names, PAIR_SLOTS[0], background)
        if len(self.names) == 2 and place == ["under"]:
            return small_objects(self.names[::-1], PAIR_SLOTS[1], background)
        raise ValueError(f"layout {self.layout!r} of {self.names}: use a background, or 'beside' or 'under' for two")


@dataclass(frozen=True)
class Story:
    """hero: its short name."""

    hero: str
    beats: tuple[Beat, ...]

    def cut(self, number: int) -> Story:
        """The first beats and the last one."""
        return Story(self.hero, (*self.beats[: number - 1], self.beats[-1]))


def words_of(text: str) -> list[str]:
    """In lower case, without marks."""
    return re.findall(r"[a-z0-9'-]+", text.lower())


def background_of(sentence: str) -> str:
    """The background of a sentence's picture, by its words."""
    colours = {word: colour for colour, words in COLOURS.items() for word in words}
    return next((colours[word] for word in words_of(sentence) if word in colours), "white")


def layout_of(sentence: str, place: str) -> str:
    """The layout of a sentence's picture. place: "" of one thing, else that of a pair."""
    background = background_of(sentence)
    return background if not place else f"{place} {background}".removesuffix(" white")


def is_sentence(text: str) -> bool:
    """Whether a text is one short plain sentence with a full stop."""
    return SENTENCE.fullmatch(text) is not None and len(text.split()) <= MAX_WORDS


@cache
def stories(path: Path = STORIES_FILE) -> tuple[Story, ...]:
    """All of a file, in its order."""
    lines = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Story(hero, tuple(Beat(text, tuple(names), at) for text, names, at in beats)) for hero, beats in lines)


@cache
def _of_split(split: str) -> tuple[Story, ...]:
    """Those whose hero has a name in a split."""
    return tuple(story for story in stories() if names_of(story.hero, split))


def story(builder: Builder) -> dict[str, Any]:
    """A request for a story in so many pictures; each sentence is followed by its picture."""
    rng = builder.rng
    found = rng.choice(_of_split(builder.split))
    number = rng.choice(range(2, len(found.beats) + 1))
    found = found.cut(number)
    count = str(number) if rng.random() < 0.5 else NUMBERS[number]
    called = builder.called(found.hero)
    builder.ask(builder.phrase("story.ask", n=count, a=with_article(called)))
    for beat in found.beats:
        builder.answer(beat.sentence)
        builder.show(beat.scene())
    return {"hero": found.hero, "called": called, "num_pictures": number, "sentences": list(builder.answers)}

"""Plans of picture stories (stories.toml): who does what with what, the request for each sentence, and which sentences
are taken.

Names are pairs (short name, word that sentences have for it). Everything is keyed.
"""

from __future__ import annotations

import random
import re
import tomllib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from omni.data.emoji_world.objects import listed
from omni.data.emoji_world.scene import pair_is_heldout
from omni.data.emoji_world.words import article_for, is_countable, plural, with_article
from omni.data.everyday.stories import is_sentence, words_of
from omni.document import Document, Role, Text
from omni.rng import Key

PLANS_FILE = Path(__file__).with_name("stories.toml")
LENGTHS = (2, 3, 4), (2, 4, 5)  # beats of a story, and their weights
GOODBYES = 0.4  # share of the endings after a friend was met
LEAST_WORDS = 4  # of a sentence
ARTICLES = re.compile(r"\b(an?) ([a-z-]+)", re.IGNORECASE)

Name = tuple[str, str]


@dataclass(frozen=True)
class Step:
    """One beat of a plan. beat: its number in the file. other: what stands with the hero, if any."""

    beat: int
    hero: Name
    other: Name | None
    ask: str

    @property
    def words(self) -> tuple[str, ...]:
        """Those that sentences have for hero and other."""
        return (self.hero[1],) if self.other is None else (self.hero[1], self.other[1])


def names_in(text: str) -> tuple[Name, ...]:
    """The names of a list: "ewe=sheep" -> ("ewe", "sheep")."""
    pairs = [one.partition("=") for one in listed(text)]
    return tuple((name, word or name) for name, _, word in pairs)


class Plans:
    """A file of heroes, things and beats."""

    def __init__(self, path: Path = PLANS_FILE) -> None:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        self.heroes = {kind: names_in(text) for kind, text in table["heroes"].items()}
        self.things = {kind: names_in(text) for kind, text in table["things"].items()}
        self.beats: list[dict[str, Any]] = table["beats"]
        self._words = {kind: set(listed(text)) for kind, text in table["words"].items()}

    @cached_property
    def everyone(self) -> list[tuple[str, Name]]:
        """All heroes with their kinds."""
        return [(kind, hero) for kind, heroes in self.heroes.items() for hero in heroes]

    @cached_property
    def elsewhere(self) -> set[str]:
        """Words that would change a picture: names of heroes and things, one and many, and further words."""
        names = [hero for _, hero in self.everyone] + [thing for things in self.things.values() for thing in things]
        singular = {name for pair in names for name in pair}
        return singular | {plural(name) for name in singular} | self._words["others"]

    def plan(self, number: int, key: Key) -> list[Step]:
        """The steps of a story: an opening, distinct middles, an ending. Heroes take turns."""
        kind, hero = self.everyone[number % len(self.everyone)]
        rng = key.fold("plan", number).python()
        length = rng.choices(*LENGTHS)[0]
        places: dict[str, list[int]] = {place: [] for place in ("opening", "middle", "late", "ending", "goodbye")}
        for index, beat in enumerate(self.beats):
            if kind in beat["heroes"] and (not beat.get("things") or self._things(index, hero)):
                places[beat["place"]].append(index)
        has_opening = length > 2 or rng.random() < 0.3
        chosen = [rng.choice(places["opening"])] if has_opening else []
        middles = rng.sample(places["middle"] + places["late"], length - 1 - len(chosen))
        chosen += sorted(middles, key=places["late"].__contains__)  # what is late comes behind the others
        steps: list[Step] = []
        for index in chosen:
            steps.append(self._step(index, hero, rng, [step.other for step in steps]))
        friend = next((step.other for step in steps if self.beats[step.beat]["name"] == "meets"), None)
        if friend is not None and rng.random() < GOODBYES:
            steps.append(self._asked(places["goodbye"][0], hero, friend, rng))
        else:
            steps.append(self._step(rng.choice(places["ending"]), hero, rng, [step.other for step in steps]))
        return steps

    def _step(self, index: int, hero: Name, rng: random.Random, used: list[Name | None]) -> Step:
        """A beat about a hero, with something that is new in the story."""
        things = self._things(index, hero)
        free = [thing for thing in things if thing not in used]
        return self._asked(index, hero, rng.choice(free or things) if things else None, rng)

    def _things(self, index: int, hero: Name) -> list[Name]:
        """What may stand with a hero in a beat."""
        things = [thing for kind in self.beats[index].get("things", ()) for thing in self.things[kind]]
        return [thing for thing in things if self._fits(hero, thing)]

    @staticmethod
    def _fits(hero: Name, thing: Name) -> bool:
        """Whether both may stand in one training picture, and in one sentence."""
        is_other = hero[0] != thing[0] and not set(words_of(hero[1])) & set(words_of(thing[1]))
        return is_other and not pair_is_heldout(hero[0], thing[0])

    def _asked(self, index: int, hero: Name, other: Name | None, rng: random.Random) -> Step:
        b, y = ("", "") if other is None else (with_article(other[1]), other[1])
        ask = rng.choice(self.beats[index]["asks"]).format(a=with_article(hero[1]), x=hero[1], b=b, y=y)
        return Step(index, hero, other, re.sub(r"\b(a) (?=[aeiou])", "an ", ask[:1].upper() + ask[1:]))

    def prompt(self, step: Step) -> Document:
        """A chat with examples of the beat, and the step's request."""
        segments: list[Text] = []
        for ask, sentence in self.beats[step.beat]["examples"]:
            segments += [Text(ask), Text(sentence, Role.ASSISTANT)]
        return Document((*segments, Text(step.ask)))

    def problem(self, sentence: str, step: Step) -> str | None:
        """Why a sentence is not taken; None if it is."""
        if not is_sentence(sentence) or len(sentence.split()) < LEAST_WORDS:
            return "not one short plain sentence"
        return misnamed(sentence, step) or wrong_article(sentence, step) or self._wrong_words(sentence, step)

    def _wrong_words(self, sentence: str, step: Step) -> str | None:
        """The same for the words beside the step's names."""
        rest = sentence.lower()
        for word in step.words:
            rest = pattern(word).sub(" ", rest)
        words = set(words_of(rest))
        if not words & set(self.beats[step.beat]["words"]):
            return "without a word of the beat"
        if twice := [word for word in words if len(word) > 3 and words_of(rest).count(word) > 1]:
            return f"has {min(twice)!r} twice"
        if refused := words & self._words["refused"]:
            return f"has {min(refused)!r}"
        others = [name for name in self.elsewhere if pattern(name).search(rest)]
        return f"has {min(others)!r}" if others else None


@cache
def pattern(name: str) -> re.Pattern[str]:
    """A name as whole words."""
    return re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")


def misnamed(sentence: str, step: Step) -> str | None:
    """A name that a sentence does not have just once, or before the hero's; None if all is well."""
    found = [pattern(word).findall(sentence.lower()) for word in step.words]
    if wrong := [word for word, times in zip(step.words, found, strict=True) if len(times) != 1]:
        return f"{wrong[0]!r} not just once"
    starts = [next(pattern(word).finditer(sentence.lower())).start() for word in step.words]
    return f"{step.words[1]!r} before the hero" if starts != sorted(starts) else None


def wrong_article(sentence: str, step: Step) -> str | None:
    """ "a owl" or "a honey"; None if there is neither."""
    if step.other is not None and not is_countable(step.other[1]) and f" a {step.other[1]}" in sentence:
        return f"a {step.other[1]}"
    for article, word in ARTICLES.findall(sentence):
        right = article_for(word).split()[0]
        if article.lower() != right:
            return f"{article} {word}"
    return None

"""Illustrated stories: short sentences, each followed by its picture.

A sentence and the story's hero determine the picture: `story_scene` returns its scene, so evaluation can check a
generated story against its own text. This file renders nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from omni.data.emoji_world.document_builder import DocumentBuilder
from omni.data.emoji_world.objects import listed
from omni.data.emoji_world.scene import PAIR_SLOTS, Scene, counted, pair_is_heldout, single, small_objects
from omni.data.emoji_world.words import NUMBERS, plural, sentence, with_article

# Names and events are sampled by index: any change of a list changes the corpus.
HEROES = listed(
    "cat|dog|pig|rabbit|tiger|horse|elephant|mouse|bear|panda|koala|fox|lion|frog|monkey|zebra|penguin|owl|duck|robot"
    "|ghost|alien"
)
THINGS = listed(
    "red apple|banana|pear|strawberry|pizza|doughnut|cookie|carrot|birthday cake|soccer ball|balloon|wrapped gift|key"
    "|guitar|drum|crown|umbrella|trophy|gem stone|bell"
)
OVERHEAD = ("sun", "cloud", "rainbow", "star", "palm tree", "evergreen tree")
VEHICLES = ("bus", "taxi", "bicycle", "airplane", "helicopter", "rocket", "sailboat", "locomotive")


@dataclass(frozen=True)
class Event:
    """A sentence about the hero, and the layout of its picture ("big", "left", "below", "three"). others: what {b} may
    be; ("",): nothing."""

    text: str
    layout: str = "big"
    others: tuple[str, ...] = ("",)
    background: str = "white"

    def words(self, hero: str, other: str) -> str:
        """The sentence about this hero and this other object."""
        return sentence(
            self.text.format(a=with_article(hero), many=plural(hero), b=with_article(other) if other else "")
        )

    def scene(self, hero: str, other: str) -> Scene:
        """The picture of the sentence."""
        match self.layout:
            case "big":
                return single(hero, self.background)
            case "left":
                return small_objects((hero, other), PAIR_SLOTS[0], self.background)
            case "below":
                return small_objects((other, hero), PAIR_SLOTS[1], self.background)
            case _:
                return counted(hero, 3, self.background)


OPENINGS = (
    Event("{a} woke up.", background="yellow"),
    Event("{a} went for a walk.", background="green"),
    Event("once there was {a}."),
    Event("{a} was sad.", background="blue"),
)
MIDDLES = (
    Event("it found {b}.", "left", THINGS),
    Event("it wanted {b}.", "left", THINGS, "blue"),
    Event("it met {b}.", "left", HEROES, "green"),
    Event("it took {b}.", "left", VEHICLES),
    Event("it stood under {b}.", "below", OVERHEAD),
    Event("two more {many} came.", "three"),
)
ENDINGS = (
    Event("it went home.", "left", ("house",)),
    Event("it fell asleep.", "left", ("bed",), "purple"),
    Event("it was happy.", background="pink"),
    Event("in the end it had {b}.", "left", THINGS, "yellow"),
)


def story_scene(hero: str, text: str) -> Scene | None:
    """The scene of a story's sentence, or None if no story has that sentence."""
    for event in (*OPENINGS, *MIDDLES, *ENDINGS):
        for other in event.others:
            if other != hero and event.words(hero, other) == text.strip():
                return event.scene(hero, other)
    return None


def _allowed_objects(event: Event, hero: str, split: str) -> list[str]:
    """The objects that the event may place beside the hero: in training without held-out pairs."""
    allowed = [o for o in event.others if o != hero]
    return [o for o in allowed if not o or split == "heldout" or not pair_is_heldout(hero, o)]


def write_story(builder: DocumentBuilder) -> dict[str, object]:
    """Add a story of 2-5 pictures: an opening, distinct events, an ending."""
    rng = builder.rng
    hero, number = rng.choice(HEROES), rng.choice((2, 3, 3, 4, 5))
    count = str(number) if rng.random() < 0.5 else NUMBERS[number]
    builder.ask(builder.phrase("story", n=count, a=with_article(hero)))
    can = {event: others for event in (*MIDDLES, *ENDINGS) if (others := _allowed_objects(event, hero, builder.split))}
    middles = rng.sample([e for e in MIDDLES if e in can], number - 2)
    events = [rng.choice(OPENINGS), *middles, rng.choice([e for e in ENDINGS if e in can])]
    for event in events:
        other = rng.choice(can.get(event, [""]))
        builder.answer(event.words(hero, other))
        builder.show(event.scene(hero, other))
    return {"hero": hero, "num_pictures": number, "sentences": list(builder.answers)}

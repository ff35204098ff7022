"""Builder: the segments of one document of everyday requests, for a task function (tasks.py).

A document is the sequence of random calls to `rng`: another order or one more call changes the whole corpus. Only
assistant segments are supervised. An empty supervised text is a turn that ends at once: the frozen language model
answers there (`Builder.hand_over`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from omni.data.emoji_world.atlas import Atlas
from omni.data.emoji_world.scene import BACKGROUNDS, Scene, render
from omni.data.emoji_world.words import article_for, plural, with_article
from omni.data.everyday.names import names_of
from omni.data.everyday.phrases import wordings
from omni.document import Document, Image, Role, Segment, Text

SHORT_NAME = 0.35  # share of requests with Unicode's own name
# They change no picture.
ADJECTIVES = ("cute", "nice", "pretty", "lovely", "cool", "simple", "funny", "beautiful", "little", "big", "great")


@dataclass
class Builder:
    """A document under construction. rng: of all its random choices."""

    rng: random.Random
    atlas: Atlas
    split: str
    segments: list[Segment] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)  # the assistant's pictures
    given: list[Scene] = field(default_factory=list)  # the user's
    answers: list[str] = field(default_factory=list)

    def called(self, name: str) -> str:
        """One of an emoji's names in this split, its short name given. An emoji without a held-out name has its short
        one."""
        own = names_of(name, self.split) or (name,)
        if len(own) == 1 or (self.split == "train" and self.rng.random() < SHORT_NAME):
            return own[0]
        return self.rng.choice(own[1:] if self.split == "train" else own)

    def words(self, called: str, adjectives: bool = True) -> dict[str, str]:
        """What templates have for a thing: a, x, many."""
        adjective = self.rng.choice(ADJECTIVES) if adjectives and self.rng.random() < 0.1 else ""
        x = f"{adjective} {called}".strip()
        return {"a": with_article(called, adjective), "x": x, "many": plural(x)}

    def phrase(self, kind: str, **words: str) -> str:
        """A random template with its words filled in."""
        return self.rng.choice(wordings()[kind]).format(**words).replace("a orange", "an orange")

    def ask(self, text: str) -> None:
        """A user's text: sometimes all in lower case, or without its last mark."""
        chance = self.rng.random()
        if chance < 0.15:
            text = text.lower()
        if chance < 0.08 and text[-1] in ".!":
            text = text[:-1]
        self.segments.append(Text(text, Role.USER))

    def give(self, scene: Scene) -> None:
        """A user's picture."""
        self.given.append(scene)
        self.segments.append(Image(render(scene, self.atlas), Role.USER))

    def answer(self, text: str) -> None:
        """A text of the assistant."""
        self.answers.append(text)
        self.segments.append(Text(text, Role.ASSISTANT, supervise=True))

    def hand_over(self) -> None:
        """The turn ends at once: the frozen language model answers."""
        self.answer("")

    def recall(self, text: str) -> None:
        """A reply of the frozen language model, as it stands before a later turn: not supervised."""
        self.segments.append(Text(text, Role.ASSISTANT))

    def show(self, scene: Scene) -> None:
        """A picture of the assistant."""
        self.scenes.append(scene)
        self.segments.append(Image(render(scene, self.atlas), Role.ASSISTANT, supervise=True))

    def colour(self) -> str:
        """A background but white."""
        return self.rng.choice(list(BACKGROUNDS)[1:])

    def on_colour(self, request: str, colour: str) -> str:
        """A request with words for the background behind it."""
        mark = request[-1] if request[-1] in "?.!" else ""
        words = ("on {on} background", "with {on} background", "in front of {on} background", "on {c}")
        ending = self.rng.choice(words).format(on=article_for(colour), c=colour)
        return f"{request.removesuffix(mark)} {ending}{mark}"

    def finish(self, task: str, extra: dict[str, Any]) -> Document:
        """The document, with JSON values for evaluation in `meta`."""
        meta = {
            "task": task,
            "split": self.split,
            "given": [scene.to_json() for scene in self.given],
            "scenes": [scene.to_json() for scene in self.scenes],
            "answer": " ".join(self.answers),
            **extra,
        }
        return Document(tuple(self.segments), meta)

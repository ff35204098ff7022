"""Author: collects one document's segments, phrasings and scenes while a task function writes it.

A task is a free function over an Author: it chooses names with `author.draw`, asks with a template of the author's
split, and shows rendered scenes. Only assistant segments are supervised. Renders through the atlas; holds no corpus.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from omni.data.emoji_world.atlas import Atlas
from omni.data.emoji_world.foreign import with_foreign_words
from omni.data.emoji_world.phrases import TEMPLATES, numbers
from omni.data.emoji_world.scene import Scene, render, scene_is_heldout
from omni.data.emoji_world.words import sentence
from omni.document import Document, Image, Role, Segment, Text


@dataclass
class Author:
    """State of one document under construction. foreign: the share of phrasings that get a foreign word."""

    draw: random.Random
    atlas: Atlas
    split: str
    foreign: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    phrasings: list[str] = field(default_factory=list)
    given: list[Scene] = field(default_factory=list)  # the user's pictures
    scenes: list[Scene] = field(default_factory=list)  # the assistant's pictures
    answers: list[str] = field(default_factory=list)

    def phrase(self, kind: str, **words: str) -> str:
        """A template of the kind, allowed in this split, with its words filled in."""
        number = self.draw.choice(numbers(kind, self.split))
        self.phrasings.append(f"{kind}/{number}")
        template = TEMPLATES[kind][number]
        if self.foreign and self.draw.random() < self.foreign:
            template = with_foreign_words(template, kind, self.draw)
        return template.format(**words)

    def ask(self, text: str) -> None:
        """The user says it: sometimes with a capital, a full stop or an exclamation mark."""
        if self.draw.random() < 0.35:
            text = sentence(text)
        if text[-1].isalnum() and self.draw.random() < 0.2:
            text += self.draw.choice(".!")
        self.segments.append(Text(text, Role.USER))

    def give(self, scene: Scene) -> None:
        """The user shows a picture."""
        self._check(scene)
        self.given.append(scene)
        self.segments.append(Image(render(scene, self.atlas), Role.USER))

    def say(self, text: str) -> None:
        """The assistant says it."""
        self.answers.append(text)
        self.segments.append(Text(text, Role.ASSISTANT, supervise=True))

    def show(self, scene: Scene) -> None:
        """The assistant draws it."""
        self._check(scene)
        self.scenes.append(scene)
        self.segments.append(Image(render(scene, self.atlas), Role.ASSISTANT, supervise=True))

    def finish(self, task: str, extra: dict[str, Any]) -> Document:
        """The document, with what a judge needs in `meta` (all of it JSON)."""
        meta: dict[str, Any] = {
            "task": task,
            "split": self.split,
            "phrasing": self.phrasings,
            "given": [scene.to_json() for scene in self.given],
            "scenes": [scene.to_json() for scene in self.scenes],
            "answer": " ".join(self.answers),
            **extra,
        }
        return Document(tuple(self.segments), meta)

    def _check(self, scene: Scene) -> None:
        assert self.split != "train" or not scene_is_heldout(scene), f"a held-out pair in training: {scene}"

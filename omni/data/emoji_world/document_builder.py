"""DocumentBuilder: collects the segments, phrasings and scenes of one document for a task function.

A task is a free function over a DocumentBuilder: it chooses names with `builder.rng`, adds a user text from a template
of the split, and adds rendered scenes. Only assistant segments are supervised.
A document is the sequence of random calls to `rng`: another order or one more call changes the whole corpus.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from omni.data.emoji_world.atlas import Atlas
from omni.data.emoji_world.foreign import with_foreign_words
from omni.data.emoji_world.phrases import TEMPLATES, template_numbers
from omni.data.emoji_world.scene import Scene, render, scene_is_heldout
from omni.data.emoji_world.words import sentence
from omni.document import Document, Image, Role, Segment, Text


@dataclass
class DocumentBuilder:
    """A document under construction. rng: of all its random choices. foreign: the share of phrasings with a foreign
    word."""

    rng: random.Random
    atlas: Atlas
    split: str
    foreign: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    phrasings: list[str] = field(default_factory=list)
    given: list[Scene] = field(default_factory=list)  # the user's pictures
    scenes: list[Scene] = field(default_factory=list)  # the assistant's pictures
    answers: list[str] = field(default_factory=list)

    def phrase(self, kind: str, **words: str) -> str:
        """A random template of the kind and the split, with its words filled in."""
        number = self.rng.choice(template_numbers(kind, self.split))
        self.phrasings.append(f"{kind}/{number}")
        template = TEMPLATES[kind][number]
        if self.foreign and self.rng.random() < self.foreign:
            template = with_foreign_words(template, kind, self.rng)
        return template.format(**words)

    def ask(self, text: str) -> None:
        """Add a user text: sometimes with a capital, a full stop or an exclamation mark."""
        if self.rng.random() < 0.35:
            text = sentence(text)
        if text[-1].isalnum() and self.rng.random() < 0.2:
            text += self.rng.choice(".!")
        self.segments.append(Text(text, Role.USER))

    def give(self, scene: Scene) -> None:
        """Add a user picture."""
        self._check(scene)
        self.given.append(scene)
        self.segments.append(Image(render(scene, self.atlas), Role.USER))

    def answer(self, text: str) -> None:
        """Add an assistant text."""
        self.answers.append(text)
        self.segments.append(Text(text, Role.ASSISTANT, supervise=True))

    def show(self, scene: Scene) -> None:
        """Add an assistant picture."""
        self._check(scene)
        self.scenes.append(scene)
        self.segments.append(Image(render(scene, self.atlas), Role.ASSISTANT, supervise=True))

    def finish(self, task: str, extra: dict[str, Any]) -> Document:
        """The document, with JSON values for evaluation in `meta`."""
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
        """AssertionError for a held-out pair in a training document."""
        assert self.split != "train" or not scene_is_heldout(scene), f"a held-out pair in training: {scene}"

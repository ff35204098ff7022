"""Chats in everyday English about pictures of emoji: see omni.data.everyday."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from omni.config import Frozen, nearest
from omni.data.digests import file_fingerprint
from omni.data.source import SOURCES, Source
from omni.document import Document, Text
from omni.rng import Key

NUM_FINGERPRINTED = 256  # documents in the fingerprint


class EverydayOptions(Frozen):
    """mixture: task -> weight (omni.data.everyday.tasks.TASKS). documents: so many different ones, again and again, so
    that what is computed of their prompts can be kept; None: endless. split: heldout has names that no training
    document contains. font: None finds the installed one."""

    mixture: dict[str, float] = {"draw": 1.0}
    documents: int | None = Field(None, ge=1, le=1 << 24)
    split: Literal["train", "heldout"] = "train"
    font: Path | None = None


@SOURCES.register("everyday_requests")
class EverydayRequests(Source):
    """The documents of omni.data.everyday. With `documents`, each epoch has another keyed order."""

    Options = EverydayOptions

    def __init__(self, options: EverydayOptions, key: Key) -> None:
        from omni.data.emoji_world import Atlas
        from omni.data.everyday.tasks import TASKS

        super().__init__(options, key)
        for task, weight in options.mixture.items():
            if task not in TASKS:
                hint = nearest(task, TASKS) or f"; known: {', '.join(TASKS)}"
                raise ValueError(f"unknown task {task!r} in the mixture of everyday_requests{hint}")
            if weight < 0:
                raise ValueError(f"the weight of task {task!r} is {weight}; use zero or more")
        if not sum(options.mixture.values()) > 0:
            raise ValueError(f"the mixture {options.mixture} has no positive weight; give some task one")
        self.atlas = Atlas(options.font)
        self._order = lru_cache(2)(self._order)

    def document(self, index: int) -> Document:
        from omni.data.everyday.builder import Builder
        from omni.data.everyday.tasks import TASKS

        if self.options.documents is not None:
            epoch, offset = divmod(index, self.options.documents)
            index = self._order(epoch)[offset]
        rng = self.key.fold("everyday", self.options.split, index).python()
        mixture = self.options.mixture
        task = rng.choices(list(mixture), list(mixture.values()))[0]
        builder = Builder(rng, self.atlas, self.options.split)
        return builder.finish(task, TASKS[task](builder))

    def _order(self, epoch: int) -> list[int]:
        """The numbers of an epoch's documents, in keyed order."""
        order = list(range(self.options.documents or 0))
        self.key.fold("order", epoch).python().shuffle(order)
        return order

    def fingerprint(self) -> str:
        """Over the font and the texts of the first documents, which change with the code and the word lists."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(NUM_FINGERPRINTED):
            document = self.document(index)
            words: list[Any] = [segment.text for segment in document.segments if isinstance(segment, Text)]
            digest.update(json.dumps([words, dict(document.meta)], sort_keys=True).encode())
        return f"{file_fingerprint(self.atlas.font_path)}:{digest.hexdigest()}"

"""Chats in everyday English about pictures of emoji: see omni.data.everyday."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from omni.config import Frozen
from omni.data.digests import generated_fingerprint
from omni.data.mixtures import check_mixture
from omni.data.source import SOURCES, Source
from omni.document import Document
from omni.rng import Key


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
        check_mixture(options.mixture, TASKS, "everyday_requests")
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
        return generated_fingerprint(self.document, self.atlas.font_path)

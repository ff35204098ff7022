"""A row of the engine: one reply in the making. Plain state; what moves it is in the engine.

Legend: N latents of a block, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from omni.document import Segment
from omni.layout import Span
from omni.reply import GenerationOptions, Part, StopReason
from omni.rng import Key
from omni.text.tokenizer import TextStream

Phase = Literal["text", "chunks", "rows", "columns", "block", "done"]


@dataclass
class Media:
    """The picture or clip that a row is drawing."""

    kind: Literal["image", "video"]
    index: int
    chunks: int = 1
    rows: int = 0
    columns: int = 0
    finished: list[Tensor] = field(default_factory=list)  # latents (N, C) of the finished blocks
    evaluations: int = 0


@dataclass
class Row:
    number: int
    options: GenerationOptions
    segments: list[Segment]  # prompt and finished segments of the reply
    stream: TextStream
    phase: Phase = "text"
    text: str = ""  # the open text segment
    emitted: int = 0  # characters of it already sent
    num_tokens: int = 0
    num_media: int = 0
    forced: list[int] = field(default_factory=list)  # ids that come next whatever the logits say
    pending: list[Span] = field(default_factory=list)  # what comes next in the cache
    media: Media | None = None
    parts: list[Part] = field(default_factory=list)
    drafts: list[tuple[int, int]] = field(default_factory=list)  # (tokens drafted, tokens kept) of each round
    room: int | None = None  # tokens of the next draft, where that is adapted
    reason: StopReason = "end"

    @property
    def key(self) -> Key:
        return Key(self.options.seed)

    @property
    def drafting(self) -> tuple[str | None, int]:
        """Rows that agree in this can share a round of drafting."""
        return self.options.verify, self.options.sweeps

    @property
    def draft_length(self) -> int:
        """Tokens of the next draft, at most."""
        budget = self.options.tokens_per_pass or 1
        return budget if self.room is None else min(self.room, budget)

    def drafted(self, drafted: int, kept: int) -> None:
        """Note a round; with `adaptive`, the next draft is twice as long if all was kept, else two past what was."""
        self.drafts.append((drafted, kept))
        if self.options.adaptive:
            self.room = max(2 * drafted, 2) if kept == drafted else kept + 2

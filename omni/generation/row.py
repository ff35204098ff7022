"""A row of the engine: one reply in the making. Plain state; what moves it is in the engine.

Legend: N latents of a block, C channels, W width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from omni.document import Document, Image, Segment, Video
from omni.generation.events import Drafted, Part, StopReason
from omni.generation.options import GenerationOptions
from omni.rng import Key
from omni.sequence.layout import Span
from omni.text.tokenizer import TextStream

Phase = Literal["text", "chunks", "rate", "rows", "columns", "block", "done"]


@dataclass
class Media:
    """The picture or clip that a row is drawing."""

    kind: Literal["image", "video"]
    index: int
    chunks: int = 1
    rate: int = 0  # frames per second of a clip, as its header names them
    rows: int = 0
    columns: int = 0
    finished: list[Tensor] = field(default_factory=list)  # latents (N, C) of the finished blocks
    evaluations: int = 0


@dataclass
class Row:
    number: int
    options: GenerationOptions
    given: tuple[Segment, ...]  # the prompt
    stream: TextStream
    segments: list[Segment] = field(default_factory=list)  # the prompt, prepared, and finished segments of the reply
    latents: dict[Image | Video, list[Tensor]] = field(default_factory=dict)  # of the media among them: (t, h, w, C)
    capacity: int = sys.maxsize  # positions that its context may have
    length: int = 0  # positions that it has, those that are pending included
    warned: bool = False  # that it is nearly full
    phase: Phase = "text"
    text: str = ""  # the open text segment
    emitted: int = 0  # characters of it already sent
    num_tokens: int = 0
    num_media: int = 0
    forced: list[int] = field(default_factory=list)  # ids that come next whatever the logits say
    pending: list[Span] = field(default_factory=list)  # what comes next in the cache
    media: Media | None = None
    parts: list[Part] = field(default_factory=list)
    drafts: list[Drafted] = field(default_factory=list)  # of each round of text in blocks
    leftover: list[int] = field(default_factory=list)  # the next draft, if the last one fell
    state: Tensor | None = None  # (W,): the hidden state before its last id, where the head can go on from there
    room: int | None = None  # tokens of the next draft, where that is adapted
    reason: StopReason = "end"

    @property
    def document(self) -> Document:
        """The prompt as it was given, and the reply."""
        return Document((*self.given, *self.segments[len(self.given) :]))

    def encoded(self, media: Sequence[Image | Video]) -> list[list[Tensor]]:
        """What stands in the cache for media of `segments`."""
        return [self.latents[one] for one in media]

    @property
    def key(self) -> Key:
        assert self.options.seed is not None  # the options are resolved
        return Key(self.options.seed)

    @property
    def drafting(self) -> tuple[str | None, int, bool, bool]:
        """Rows that agree in this can share a round of drafting."""
        o = self.options.speculative
        return o.verify, o.sweeps, bool(self.leftover), self.state is not None

    @property
    def recycles(self) -> bool:
        """Whether the rest of a draft that fell may be the next one: only common noise can judge it."""
        o = self.options.speculative
        return o.recycle and not o.sweeps and o.verify in ("coupled", "greedy")

    @property
    def draft_length(self) -> int:
        """Tokens of the next draft, at most."""
        budget = min(self.options.speculative.tokens_per_pass or 1, self.capacity - self.length)
        return budget if self.room is None else min(self.room, budget)

    def has_room(self, num: int) -> bool:
        """Whether `num` more positions leave one for the end of the turn."""
        return self.length + num < self.capacity

    def note(self, drafted: Drafted) -> None:
        """A round has been. With `adaptive`, the next draft of the head is twice as long if all of its last one was
        kept, else two past what was."""
        self.drafts.append(drafted)
        if self.options.speculative.adaptive and not drafted.again:
            whole = drafted.kept == drafted.drafted
            self.room = max(2 * drafted.drafted, 2) if whole else drafted.kept + 2

"""A request of the engine: the state of one reply. Its turn and the grammar change it.

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
from omni.nn.cache import History
from omni.rng import Key
from omni.sequence.features import Blocks
from omni.sequence.guidance import Drop
from omni.sequence.layout import Span, TokenSpan
from omni.text.tokenizer import TextStream

Phase = Literal["text", "chunks", "rate", "rows", "columns", "block", "done"]


@dataclass
class Media:
    """The picture or clip that a request refines."""

    kind: Literal["image", "video"]
    index: int
    chunks: int = 1
    rate: int = 0  # frames per second in a clip's header
    rows: int = 0
    columns: int = 0
    finished: list[Tensor] = field(default_factory=list)  # latents (N, C) of the finished blocks
    evaluations: int = 0


@dataclass
class Request:
    number: int  # its id in the engine
    history: History
    options: GenerationOptions
    given: tuple[Segment, ...]  # the prompt
    stream: TextStream
    segments: list[Segment] = field(default_factory=list)  # the prompt, prepared, and finished segments of the reply
    latents: dict[Image | Video, Blocks] = field(default_factory=dict)  # of the media in `segments`, features too
    capacity: int = sys.maxsize  # largest number of context positions
    length: int = 0  # context positions, pending ones included
    prompt_length: int = 0
    warned: bool = False  # a warning of a nearly full context was given
    phase: Phase = "text"
    text: str = ""  # the open text segment
    emitted: int = 0  # emitted characters of `text`
    num_tokens: int = 0
    num_media: int = 0
    forced: list[int] = field(default_factory=list)  # the next ids, whatever the logits are
    pending: list[Span] = field(default_factory=list)  # emitted, not yet in the history
    branches: dict[Drop, History] = field(default_factory=dict)  # reduced histories for guidance
    media: Media | None = None
    parts: list[Part] = field(default_factory=list)
    drafts: list[Drafted] = field(default_factory=list)  # one for each round of speculative decoding
    leftover: list[int] = field(default_factory=list)  # the next draft, after a rejected token
    state: Tensor | None = None  # (W,): the hidden state before the last id, for recurrent drafting
    room: int | None = None  # tokens of the next draft with `adaptive`
    reason: StopReason = "end"
    like: Request | None = None  # a request with the same prompt, which reads it
    epoch: int = 0  # which weights the history is of, see prefixes.Prefixes
    continues: tuple[Part, ...] = ()  # the beginning of the reply, which is given
    adapted: bool = False  # whether the reply is that of an invoked LoRA

    @property
    def has_read_prompt(self) -> bool:
        """Whether the history holds the prompt, but for its last position."""
        return self.history.length + 1 >= self.prompt_length

    @property
    def document(self) -> Document:
        """The prompt as given, then the reply."""
        return Document((*self.given, *self.segments[len(self.given) :]))

    def encoded(self, media: Sequence[Image | Video]) -> list[Blocks]:
        """The latents, and features, that the cache holds for media of `segments`."""
        return [self.latents[one] for one in media]

    def ids(self, ids: Sequence[int]) -> TokenSpan:
        """Ids of the reply, as a span."""
        return TokenSpan(list(ids), [False] * len(ids), self.adapted)

    def take_pending(self) -> list[Span]:
        """The pending spans, which are no longer pending; neighbouring ids share one TokenSpan."""
        spans, self.pending = self.pending, []
        if len(spans) < 2:
            return spans
        out: list[Span] = []
        for span in spans:
            before = out[-1] if out else None
            if isinstance(span, TokenSpan) and isinstance(before, TokenSpan) and span.adapted == before.adapted:
                out[-1] = TokenSpan([*before.ids, *span.ids], [*before.supervise, *span.supervise], span.adapted)
            else:
                out.append(span)
        return out

    def release(self) -> None:
        """Give back all pages."""
        for history in (self.history, *self.branches.values()):
            history.release()

    @property
    def key(self) -> Key:
        assert self.options.seed is not None  # resolved options have a seed
        return Key(self.options.seed)

    @property
    def recycles(self) -> bool:
        """Whether the tokens after a rejected one may be the next draft: only common noise can verify them."""
        o = self.options.speculative
        return o.recycle and not o.sweeps and o.verify in ("coupled", "greedy")

    @property
    def draft_length(self) -> int:
        """Tokens of the next draft, at most."""
        budget = min(self.options.speculative.tokens_per_pass or 1, self.capacity - self.length)
        return budget if self.room is None else min(self.room, budget)

    def has_room(self, num: int) -> bool:
        """Whether one position remains for the end of the turn after `num` more."""
        return self.length + num < self.capacity

    def note(self, drafted: Drafted) -> None:
        """Record a round. With `adaptive`, the head's next draft is twice as long after a fully accepted draft, else
        the number of accepted tokens plus 2."""
        self.drafts.append(drafted)
        if self.options.speculative.adaptive and not drafted.again:
            whole = drafted.accepted == drafted.drafted
            self.room = max(2 * drafted.drafted, 2) if whole else drafted.accepted + 2

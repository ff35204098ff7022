"""Loader: an endless source becomes packed batches. Its whole state is one integer, the cursor.

A batch holds documents cursor, cursor + 1, ... until one fits in no row (omni.layout.pack); that one starts the next
batch. So the batch at a cursor is a pure function of the cursor, whatever was read, encoded or remembered before.
A corrupt or oversized document is passed over, counted and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from pydantic import Field

from omni.config import Frozen
from omni.coupling import Coupling
from omni.document import Document, Image, Segment, Video
from omni.guidance import drop, null_documents
from omni.layout import Batch, LatentSpan, Shape, Span, context_length, lay_rows, pack
from omni.rng import Key
from train.data.coupled import with_answers
from train.data.source import CorruptRecord

LOOKAHEAD = 48
MAX_CORRUPT_SHARE = 0.05

EncodeMedia = Callable[[Sequence[Image | Video]], list[list[torch.Tensor]]]
Compose = Callable[[Document, EncodeMedia], list[Span]]


class Encoder(Protocol):
    """A LatentMemo, or what stands for one."""

    def encode(self, segments: Sequence[Image | Video]) -> list[list[torch.Tensor]]: ...


class TooManyCorrupt(RuntimeError):
    """More than MAX_CORRUPT_SHARE of the documents could not be read."""


class ShapeConfig(Frozen):
    """`rows` rows of `budget` context and `refine_budget` refine positions."""

    rows: int = Field(ge=1)
    budget: int = Field(ge=8)
    refine_budget: int = Field(ge=0)


class BatchConfig(Frozen):
    """What one step holds: rows of one or more shapes (short rows first: attention costs least there).

    copies: noisy copies of every supervised block. trim: share of the documents whose last picture is left out of the
    context stream, where nothing but the closing ids would read it (cheaper; the rest teach how a turn closes).
    fixed: tensors always have the full shape; else they shrink to what is used.
    """

    shapes: tuple[ShapeConfig, ...] = Field(min_length=1)
    copies: int = Field(1, ge=1)
    trim: float = Field(0.0, ge=0, le=1)
    fixed: bool = False

    @property
    def num_context(self) -> int:
        return sum(shape.rows * shape.budget for shape in self.shapes)


class DropConfig(Frozen):
    """How often training hides conditions, for guidance: probabilities per document with a supervised picture."""

    text: float = Field(0.0, ge=0, le=1)
    images: float = Field(0.0, ge=0, le=1)
    all: float = Field(0.0, ge=0, le=1)


@dataclass(frozen=True)
class Composed:
    """One document as spans; for objectives with guidance also one null document per supervised picture or clip."""

    spans: list[Span]
    nulls: tuple[list[Span], ...] = ()
    dropped: bool = False


@dataclass(frozen=True)
class Packed:
    """What one step trains on: a batch per shape, the global indices of its documents, and the cursor after it (of a
    lane, see train.data.lanes)."""

    batches: list[Batch]
    documents: list[int]
    cursor: int
    skipped: list[tuple[int, str]] = field(default_factory=list)
    lane: int | None = None


class Loader:
    """`next(cursor)` gives the batch that starts there.

    Args:
        document: index -> Document; pure. May raise CorruptRecord.
        prepare: a segment -> the segment in a size that the codec can encode (Omni.prepare).
        compose: (document, encode_media) -> spans, with the tokenizer bound.
        memo: the codec behind its memo, or what stands for it in a lane.
        channels, pad_id: of the codec's latents; of the tokenizer.
        key: of everything drawn per document here (drop, trim).
        null_contexts: whether batches carry null contexts (`Batch.null`), for objectives with guidance.
        coupling: of the noise of pictures with choices, where training couples them.
        stride: from one document to the next, for a loader that is one of several (see train.data.lanes).
    """

    def __init__(
        self,
        document: Callable[[int], Document],
        prepare: Callable[[Segment], Segment],
        compose: Compose,
        memo: Encoder,
        shape: BatchConfig,
        *,
        channels: int,
        pad_id: int,
        key: Key,
        drop: DropConfig | None = None,
        null_contexts: bool = False,
        coupling: Coupling | None = None,
        stride: int = 1,
    ) -> None:
        self.stride = stride
        self.document, self.prepare, self.compose, self.memo, self.shape = document, prepare, compose, memo, shape
        self.channels, self.pad_id, self.key = channels, pad_id, key
        self.drop, self.null_contexts, self.coupling = drop or DropConfig(), null_contexts, coupling
        self.counts: Counter[str] = Counter(documents=0, skipped=0)
        self._window: dict[int, Composed | str] = {}

    def next(self, cursor: int) -> Packed:
        """The batch whose first document is `cursor` or the first good one after it."""
        shape = self.shape
        composed: dict[int, Composed] = {}
        skipped: dict[int, str] = {}
        trim: list[bool] = []
        index, num_context = cursor, 0
        while num_context <= shape.num_context:
            item = self._composed(index)
            if isinstance(item, str):
                skipped[index] = item
                self._check_corrupt((index - cursor) // self.stride + 1, len(skipped), item)
            else:
                composed[index] = item
                trim.append(self.key.fold("trim", index).python().random() < shape.trim)
                num_context += context_length(item.spans, trim[-1])
            index += self.stride
        uids = list(composed)
        batches, num_used = pack(
            [one.spans for one in composed.values()],
            [Shape(s.rows, s.budget, s.refine_budget) for s in shape.shapes],
            channels=self.channels,
            pad_id=self.pad_id,
            copies=shape.copies,
            uids=uids,
            trim=trim,
            fixed_shape=shape.fixed,
        )
        after = uids[num_used] if num_used < len(uids) else index
        passed = [(i, why) for i, why in skipped.items() if i < after]
        self._window = {i: s for i, s in self._window.items() if i >= after}
        self.counts.update(documents=num_used, skipped=len(passed))
        return Packed([self._with_nulls(batch, composed) for batch in batches], uids[:num_used], after, passed)

    def _with_nulls(self, batch: Batch, composed: dict[int, Composed]) -> Batch:
        """The batch, told which of its documents were dropped, and with a null context for each of its items."""
        batch = replace(batch, dropped=frozenset(uid for uid in batch.documents if composed[uid].dropped))
        if not self.null_contexts or not batch.num_items:
            return batch
        rows = [(uid, spans) for uid in batch.documents for spans in composed[uid].nulls]
        null = lay_rows(
            [spans for _, spans in rows], channels=self.channels, pad_id=self.pad_id, copies=self.shape.copies,
            uids=[uid for uid, _ in rows],
        )  # fmt: skip
        assert [(u, c) for u, _, c in null.item_names] == [(u, c) for u, _, c in batch.item_names]
        return replace(batch, null=null)

    def _composed(self, index: int) -> Composed | str:
        if index not in self._window:
            self._fill(index)
        return self._window[index]

    def _fill(self, start: int) -> None:
        """Read, prepare and compose LOOKAHEAD documents, with all their media through the codec together."""
        read: dict[int, Document] = {}
        for index in range(start, start + LOOKAHEAD * self.stride, self.stride):
            try:
                document = self._with_drop(index, self.document(index))
            except CorruptRecord as error:
                self._window[index] = str(error)
                continue
            try:
                read[index] = replace(document, segments=tuple(map(self.prepare, document.segments)))
            except ValueError as error:
                self._window[index] = _unusable(error)
        media = {index: [s for s in d.segments if isinstance(s, Image | Video)] for index, d in read.items()}
        media = {index: [*found, *(o for s in found for o in self._others(s))] for index, found in media.items()}
        encoded = iter(self.memo.encode([segment for found in media.values() for segment in found]))
        for index, document in read.items():
            latents = [next(encoded) for _ in media[index]]
            try:
                self._window[index] = self._made(document, latents)
            except ValueError as error:
                self._window[index] = _unusable(error)

    def _others(self, segment: Image | Video) -> tuple[Image, ...]:
        """Right answers that copies after the first may be of."""
        return segment.others[: self.shape.copies - 1] if isinstance(segment, Image) else ()

    def _made(self, document: Document, latents: list[list[torch.Tensor]]) -> Composed | str:
        """latents: of its media, in order, and then of their others."""
        media = [s for s in document.segments if isinstance(s, Image | Video)]
        latents, others = latents[: len(media)], iter(latents[len(media) :])
        spans = self.compose(document, _hand_out(latents))
        answers = [[(one, next(others)[0]) for one in self._others(segment)] for segment in media]
        spans = with_answers(spans, media, answers, self.coupling)
        return self._too_long(spans) or Composed(spans, self._nulls(document, latents), "dropped" in document.meta)

    def _nulls(self, document: Document, latents: list[list[torch.Tensor]]) -> tuple[list[Span], ...]:
        """One null document per supervised picture or clip; `latents` are those of all its media, in order."""
        if not self.null_contexts:
            return ()
        media = [s for s in document.segments if isinstance(s, Image | Video)]
        kept = [one for one, segment in zip(latents, media, strict=True) if segment.supervise]
        documents = null_documents(document)
        return tuple(self.compose(null, _hand_out([one])) for null, one in zip(documents, kept, strict=True))

    def _too_long(self, spans: Sequence[Span]) -> str:
        length = context_length(spans)
        blocks = [len(s.latents) for s in spans if isinstance(s, LatentSpan) and s.supervise]
        refine = self.shape.copies * sum(blocks)
        shapes = self.shape.shapes
        if any(length <= shape.budget and refine <= shape.refine_budget for shape in shapes):
            return ""
        longest = max(shape.budget for shape in shapes), max(shape.refine_budget for shape in shapes)
        return f"too long: {length} context and {refine} refine positions, the longest row holds {longest}"

    def _with_drop(self, index: int, document: Document) -> Document:
        if not any(isinstance(s, Image | Video) and s.supervise for s in document.segments):
            return document
        draw = self.key.fold("drop", index).python().random()
        for what, share in self.drop.model_dump().items():
            if draw < share:
                return drop(document, what) or document  # type: ignore[arg-type]
            draw -= share
        return document

    def _check_corrupt(self, num_seen: int, num_skipped: int, last: str) -> None:
        skipped = self.counts["skipped"] + num_skipped
        seen = self.counts["documents"] + self.counts["skipped"] + num_seen
        if skipped >= 20 and skipped > MAX_CORRUPT_SHARE * seen:
            raise TooManyCorrupt(f"{skipped} of {seen} documents could not be used; the last: {last}")


def _unusable(error: ValueError) -> str:
    """Such as a clip with too many chunks, or a block's size that a header cannot take."""
    return f"unusable: {error}"


def _hand_out(latents: list[list[torch.Tensor]]) -> EncodeMedia:
    """An encode_media for `compose`: the next latents for each media segment, in the document's order."""
    waiting = iter(latents)
    return lambda segments: [next(waiting) for _ in segments]

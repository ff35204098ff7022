"""Loader: packs an endless source into batches. The state is one integer, the cursor.

A batch holds documents cursor, cursor + 1, ... until one fits in no batch row (sequence.layout); that one starts the
next batch. The batch depends on the cursor alone, not on cached latents.

A document that is too long for every row is split into pieces (train.data.pieces) or dropped. Piece p of document i has
the uid i + p PIECES, which names it in batches and keys its noise; the uid of the next piece is the cursor. A corrupt
document is skipped, counted and reported; so is a dropped one, which is counted separately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from omni.data.source import CorruptRecord, HeldOutRecord
from omni.document import Document, Image, Segment, Text, Video
from omni.rng import Key
from omni.sequence.features import Blocks
from omni.sequence.guidance import drop, null_documents
from omni.sequence.layout import Batch, LatentSpan, Shape, Span, TokenSpan, context_length, lay_rows, pack
from train.data.batch import PIECES, BatchConfig, Composed, DropConfig, Packed, Read, TooManyCorrupt
from train.data.pieces import BEGIN, TURN, Piece, Size, Splitter

LOOKAHEAD = 48  # documents that are encoded together; batches do not depend on it
MAX_UNUSABLE_IN_ROW = 1000  # unusable documents in a row

EncodeMedia = Callable[[Sequence[Image | Video]], list[Blocks]]
Compose = Callable[[Document, EncodeMedia], list[Span]]


class Encoder(Protocol):
    """A LatentMemo, or a replacement for one."""

    def encode(self, segments: Sequence[Image | Video]) -> list[Blocks]: ...


class Loader:
    """`next(cursor)` returns the batch that starts there.

    Args:
        document: index -> Document; pure. May raise CorruptRecord.
        prepare: segment -> the segment in a size that the codec can encode (Omni.prepare).
        compose: (document, encode_media) -> spans, with the tokenizer bound.
        memo: the cached codec, or its replacement in a data-loading worker.
        channels, pad_id: of the codec's latents; of the tokenizer.
        key: of everything sampled per document here (drop, trim).
        null_contexts: whether batches carry null contexts (`Batch.null`), for objectives with guidance.
        stride: from one document to the next, in a data-loading worker (see train.data.workers).
        end: number of documents; None: endless.
        ends: ids that end a turn; none: the last id of a document.
        is_additive: whether the size of a document is the sum over its segments and turns, as with our own turns.
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
        stride: int = 1,
        end: int | None = None,
        ends: Sequence[int] = (),
        is_additive: bool = True,
    ) -> None:
        self.stride, self.end = stride, end
        self.document, self.prepare, self.compose, self.memo, self.shape = document, prepare, compose, memo, shape
        self.channels, self.pad_id, self.key = channels, pad_id, key
        self.drop, self.null_contexts = drop or DropConfig(), null_contexts
        self.ends, self.is_additive = ends, is_additive
        self.counts: Counter[str] = Counter(documents=0, skipped=0)
        self._window: dict[int, Read] = {}

    def next(self, cursor: int) -> Packed:
        """The batch whose first document, or piece, is `cursor` or the first good one after it. At the end, a batch
        without documents whose cursor is the end."""
        shape = self.shape
        composed: dict[int, Composed] = {}
        passed: dict[int, Read] = {}
        trim: list[bool] = []
        num_context = num_seen = 0
        for uid, one in self._pieces_from(cursor):
            num_seen += uid < PIECES
            if isinstance(one, Read):
                passed[uid] = one
                self._check_passed(num_seen, passed, bool(composed))
                continue
            composed[uid] = one
            trim.append(self.key.fold("trim", uid).python().random() < shape.trim)
            num_context += context_length(one.spans, trim[-1])
            if num_context > shape.num_context:
                break
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
        after = uids[num_used] if num_used < len(uids) else self.end
        assert after is not None, "more context than the rows have room for, and all of it was packed"
        batches = [self._with_nulls(batch, composed) for batch in batches]
        return self._packed(batches, uids[:num_used], after, passed)

    def unpacked_latents(self) -> Iterator[torch.Tensor]:
        """The latents (N, C), or features (N, E), of all documents that are read and not yet packed."""
        for read in self._window.values():
            for one in read.pieces:
                for span in (span for spans in (one.spans, *one.nulls) for span in spans):
                    if not isinstance(span, TokenSpan):
                        yield span.latents if isinstance(span, LatentSpan) else span.features

    def _pieces_from(self, cursor: int) -> Iterator[tuple[int, Composed | Read]]:
        """From `cursor` on: every piece with its uid, and every document without pieces."""
        part, index = divmod(cursor, PIECES)
        while self.end is None or index < self.end:
            read = self._read(index)
            yield from ((index + number * PIECES, one) for number, one in enumerate(read.pieces) if number >= part)
            if not read.pieces:
                yield index, read
            index, part = index + self.stride, 0

    def _packed(self, batches: list[Batch], used: list[int], after: int, passed: dict[int, Read]) -> Packed:
        """The batches, with the counts of the documents that this step finishes; removes those from the window."""
        begun = {uid: self._window[uid] for uid in used if uid < PIECES}
        done = {i: read for i, read in passed.items() if i < after % PIECES}
        skipped, dropped = ([(i, r.why) for i, r in done.items() if r.what == what] for what in ("skipped", "dropped"))
        num_held_out = sum(read.what == "held_out" for read in done.values())
        dropped = sorted([*dropped, *((i, read.why) for i, read in begun.items() if read.why)])
        num_split = sum(len(read.pieces) > 1 for read in begun.values())
        counts = {"documents": len(begun), "skipped": len(skipped), "dropped": len(dropped), "split": num_split}
        counts |= {"pieces": len(used), "held_out": num_held_out}
        self.counts.update(counts)
        self._window = {i: read for i, read in self._window.items() if i >= after % PIECES}
        documents = list(dict.fromkeys(uid % PIECES for uid in used))
        return Packed(batches, documents, after, skipped, dropped, counts)

    def _with_nulls(self, batch: Batch, composed: dict[int, Composed]) -> Batch:
        """The batch with the uids of documents with dropped conditions, and a null context for each of its items."""
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

    def _read(self, index: int) -> Read:
        """The document at `index` as read, with those after it where it is not in the window."""
        if index not in self._window:
            self._fill(index)
        return self._window[index]

    def _fill(self, start: int) -> None:
        """Read, prepare and compose LOOKAHEAD documents; encode all their media in one call."""
        read: dict[int, Document] = {}
        end = start + LOOKAHEAD * self.stride
        for index in range(start, end if self.end is None else min(end, self.end), self.stride):
            try:
                document = self._with_dropped_conditions(index, self.document(index))
            except CorruptRecord as error:
                what = "held_out" if isinstance(error, HeldOutRecord) else "skipped"
                self._window[index] = Read(what=what, why=str(error))
                continue
            try:
                read[index] = replace(document, segments=tuple(map(self.prepare, document.segments)))
            except ValueError as error:
                self._window[index] = _skipped(error)
        media = {index: [s for s in d.segments if isinstance(s, Image | Video)] for index, d in read.items()}
        encoded = iter(self.memo.encode([segment for found in media.values() for segment in found]))
        for index, document in read.items():
            latents = [next(encoded) for _ in media[index]]
            try:
                self._window[index] = self._split_if_too_long(document, media[index], latents)
            except ValueError as error:
                self._window[index] = _skipped(error)

    def _split_if_too_long(self, document: Document, media: list[Image | Video], latents: list[Blocks]) -> Read:
        """A document as read: whole, in pieces, or dropped. media: of the document; latents: of each of them."""
        encoded = {id(segment): one for segment, one in zip(media, latents, strict=True)}
        whole = self._composed(Piece(document), encoded)
        size = self._size(whole.spans)
        if self._fits(size):
            return Read((whole,))
        longest = [max(getattr(shape, name) for shape in self.shape.shapes) for name in ("budget", "refine_budget")]
        limit = f"the longest row holds {longest[0]} and {longest[1]}"
        if self.shape.too_long == "drop":
            return Read((), "dropped", f"too long: {size.context} context and {size.refine} refine positions, {limit}")
        exact = None if self.is_additive else partial(self._measured_whole, encoded=encoded)
        pieces, problem = Splitter(partial(self._measured, encoded=encoded), self._fits, exact).split(document)
        made = tuple(self._composed(piece, encoded) for piece in pieces)
        assert all(self._fits(self._size(one.spans)) for one in made), "a piece is longer than it was measured"
        why = (
            f"too long: a {problem}; {limit}"
            if problem
            else ""
            if made
            else f"too long, with no supervised segment; {limit}"
        )
        return Read(made, "read" if made else "dropped", why)

    def _composed(self, piece: Piece, encoded: dict[int, Blocks]) -> Composed:
        """The spans of a piece, and its null documents."""
        document = piece.document
        media = [s for s in document.segments if isinstance(s, Image | Video)]
        latents = [encoded[id(segment)] for segment in media]
        spans = _without_cut_ends(self.compose(document, _encoder_returning(latents)), piece, self.ends)
        return Composed(spans, self._nulls(document, latents), "dropped" in document.meta)

    def _measured(self, segment: Segment, encoded: dict[int, Blocks]) -> Size:
        """The size of one segment, without the ids of its document and turn."""
        latents = [] if isinstance(segment, Text) else [encoded[id(segment)]]
        size = self._size(self.compose(Document((segment,)), _encoder_returning(latents)))
        return Size(size.context - BEGIN - TURN, size.refine)

    def _measured_whole(self, segments: Sequence[Segment], encoded: dict[int, Blocks]) -> Size:
        """The size of a document of these segments."""
        latents = [encoded[id(segment)] for segment in segments if not isinstance(segment, Text)]
        return self._size(self.compose(Document(tuple(segments)), _encoder_returning(latents)))

    def _nulls(self, document: Document, latents: list[Blocks]) -> tuple[list[Span], ...]:
        """One null document per supervised picture or clip; `latents` are those of all its media, in order."""
        if not self.null_contexts:
            return ()
        media = [s for s in document.segments if isinstance(s, Image | Video)]
        kept = [one for one, segment in zip(latents, media, strict=True) if segment.supervise]
        documents = null_documents(document)
        return tuple(self.compose(null, _encoder_returning([one])) for null, one in zip(documents, kept, strict=True))

    def _size(self, spans: Sequence[Span]) -> Size:
        """Context and refine positions of spans, with all copies."""
        blocks = [len(s.latents) for s in spans if isinstance(s, LatentSpan) and s.supervise]
        return Size(context_length(spans), self.shape.copies * sum(blocks))

    def _fits(self, size: Size) -> bool:
        """Whether some batch row holds this size."""
        shapes = self.shape.shapes
        return any(size.context <= shape.budget and size.refine <= shape.refine_budget for shape in shapes)

    def _with_dropped_conditions(self, index: int, document: Document) -> Document:
        """The document, for a keyed share of indices with a dropped condition."""
        if not any(isinstance(s, Image | Video) and s.supervise for s in document.segments):
            return document
        draw = self.key.fold("drop", index).python().random()
        for what, share in self.drop.model_dump().items():
            if draw < share:
                return drop(document, what) or document  # type: ignore[arg-type]
            draw -= share
        return document

    def _check_passed(self, num_seen: int, passed: dict[int, Read], some_good: bool) -> None:
        """Raise where too many documents are corrupt, or too many in a row are unusable."""
        shape, last = self.shape, list(passed.values())[-1].why
        skipped = self.counts["skipped"] + sum(read.what == "skipped" for read in passed.values())
        seen = sum(self.counts[name] for name in ("documents", "skipped", "dropped", "held_out")) + num_seen
        if skipped * self.stride >= shape.min_corrupt and skipped > shape.max_corrupt * seen:
            raise TooManyCorrupt(
                f"{skipped} of {seen} documents could not be used, and batch.max_corrupt = {shape.max_corrupt:g}; "
                f"the last: {last}"
            )
        if len(passed) >= MAX_UNUSABLE_IN_ROW and not some_good:
            raise ValueError(f"{len(passed)} documents in a row are unusable; the last: {last}")


def _skipped(error: ValueError) -> Read:
    """A document that cannot be used, for example a picture whose size the codec or a block's header cannot
    represent."""
    return Read((), "skipped", f"unusable: {error}")


def _without_cut_ends(spans: list[Span], piece: Piece, ends: Sequence[int]) -> list[Span]:
    """The spans of a piece; the first supervised id, or the last of `ends`, is unsupervised where the reply does not
    begin, or end, with the piece. Without `ends`, the last id is the end."""
    if not piece.begins:
        first = ((n, s) for n, s in enumerate(spans) if isinstance(s, TokenSpan) and any(s.supervise))
        spans = next((_unsupervised(spans, n, s.supervise.index(True)) for n, s in first), spans)
    if piece.ends:
        return spans
    last = spans[-1]
    assert isinstance(last, TokenSpan)
    offset = next((n for n in reversed(range(len(last.ids))) if last.ids[n] in ends), len(last.ids) - 1)
    return _unsupervised(spans, len(spans) - 1, offset)


def _unsupervised(spans: list[Span], at: int, offset: int) -> list[Span]:
    """The spans, with one id of span `at` unsupervised."""
    span = spans[at]
    assert isinstance(span, TokenSpan)
    flags = list(span.supervise)
    flags[offset] = False
    return [*spans[:at], replace(span, supervise=flags), *spans[at + 1 :]]


def _encoder_returning(latents: list[Blocks]) -> EncodeMedia:
    """An encode_media for `compose`: returns the next of these latents for each media segment, in the document's
    order."""
    waiting = iter(latents)
    return lambda segments: [next(waiting) for _ in segments]

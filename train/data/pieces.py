"""Splits a document that is too long for a batch row into pieces, each a document that fits.

    head  exchange  exchange  |  head  exchange  |  head  request  reply, first part  |  head  request  reply, the rest

An exchange is a request and its reply: it begins where a turn of the user (or of the system) follows one of the
assistant. Cuts are between exchanges where possible. An exchange that is too long alone is cut inside its reply,
between segments; the request, everything before its first supervised segment, is repeated before each part. A text that
is too long alone is cut at the end of a paragraph, a sentence or a word where there is one. A picture or clip is never
cut. The head, the system turns at the start of the document, is repeated before each piece.

A segment that fits in no row with its head and request is left out, with the rest of its exchange, which may refer to
it. A piece without a supervised segment is left out too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from omni.document import Document, Image, Role, Segment, Text, Video

BEGIN, TURN = 1, 2  # ids of omni.text.compose: of a document; of a turn, its role and its end
REQUEST_SHARE = 0.75  # of a row, at most, for head and request where a text is cut: else rows repeat little else
CUTS = (("\n\n", 2), ("\n", 1), (". ", 1), (" ", 0))  # marks to cut a text at, and the offset of the cut


class Size(NamedTuple):
    """Context and refine positions."""

    context: int
    refine: int


@dataclass(frozen=True)
class Piece:
    """begins, ends: whether its supervised part begins, and ends, where a reply of the document does. Otherwise its
    first supervised id, or the end of its last turn, is not supervised."""

    document: Document
    begins: bool = True
    ends: bool = True


Measure = Callable[[Segment], Size]
Fits = Callable[[Size], bool]


class Splitter:
    """measure: the size of one segment, without its turn's ids. fits: whether some row has room for a document.
    whole: the size of a document, where it is not the sum of these: a chat template writes its turns."""

    def __init__(self, measure: Measure, fits: Fits, whole: Callable[[Sequence[Segment]], Size] | None = None) -> None:
        self._measure, self._fits, self._whole = measure, fits, whole
        self._known: dict[int, Size] = {}

    def split(self, document: Document) -> tuple[list[Piece], str]:
        """The pieces in order, and the reason for what was left out: empty where nothing was."""
        if self._whole is None:
            self._known = {id(segment): self._measure(segment) for segment in document.segments}
        head, exchanges = _exchanges(document.segments)
        pieces: list[Piece] = []
        waiting: list[Segment] = []
        problem = ""

        def flush() -> None:
            if any(segment.supervise for segment in waiting):
                pieces.append(Piece(replace(document, segments=(*head, *waiting))))
            waiting.clear()

        for exchange in exchanges:
            if not self.fits((*head, *waiting, *exchange)):
                flush()
            if self.fits((*head, *waiting, *exchange)):
                waiting += exchange
                continue
            found, why = self._split_exchange(head, exchange)
            pieces += [replace(one, document=replace(document, segments=one.document.segments)) for one in found]
            problem = problem or why
        flush()
        return pieces, problem

    def size(self, segments: Sequence[Segment]) -> Size:
        """The size of a document of these segments."""
        if self._whole is not None:
            return self._whole(segments)
        sizes = [self._known.get(id(segment)) or self._measure(segment) for segment in segments]
        turns = sum(1 for at, s in enumerate(segments) if not at or s.role != segments[at - 1].role)
        return Size(BEGIN + TURN * turns + sum(s.context for s in sizes), sum(s.refine for s in sizes))

    def fits(self, segments: Sequence[Segment]) -> bool:
        """Whether some batch row holds a document of these segments."""
        return self._fits(self.size(segments))

    def _split_exchange(self, head: Sequence[Segment], exchange: Sequence[Segment]) -> tuple[list[Piece], str]:
        """The parts of one exchange that is too long, and the reason where the rest is left out."""
        first = next((at for at, segment in enumerate(exchange) if segment.supervise), len(exchange))
        before, reply = [*head, *exchange[:first]], list(exchange[first:])
        pieces: list[Piece] = []
        part: list[Segment] = []
        begins = True

        def flush(ends: bool) -> None:
            nonlocal begins
            if any(segment.supervise for segment in part):
                pieces.append(Piece(Document((*before, *part)), begins, ends))
            part.clear()
            begins = ends

        while reply:
            segment = reply[0]
            if self.fits((*before, *part, segment)):
                part.append(reply.pop(0))
                continue
            if part:
                flush(part[-1].role != segment.role)
                continue
            taken = self._longest_beginning(before, segment) if isinstance(segment, Text) else ""
            if not taken:
                return pieces, self._too_long_message((*before, segment))
            assert isinstance(segment, Text)
            part.append(replace(segment, text=taken))
            reply[0] = replace(segment, text=segment.text[len(taken) :])
        flush(True)
        return pieces, ""

    def _longest_beginning(self, before: Sequence[Segment], segment: Text) -> str:
        """As much of a text as fits behind `before`, up to a good place to cut; empty where too little fits."""
        size = self.size(before)
        if not self._fits(Size(round(size.context / REQUEST_SHARE), size.refine)):
            return ""
        end = largest_fitting(
            len(segment.text), lambda n: self.fits((*before, replace(segment, text=segment.text[:n])))
        )
        return segment.text[: cut_before(segment.text, end)]

    def _too_long_message(self, segments: Sequence[Segment]) -> str:
        """What the last of the segments needs, in words."""
        size = self.size(segments)
        what = {Text: "text", Image: "picture", Video: "clip"}[type(segments[-1])]
        return f"{what} that needs {size.context} context and {size.refine} refine positions with its request"


def largest_fitting(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n <= most that fits, if fits is monotone. Few and short trials where it is far below `most`."""
    low, step = 0, 64
    while low + step <= most and fits(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, most + 1)  # does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def cut_before(text: str, end: int) -> int:
    """The best cut in the second half of text[:end]: behind a paragraph, a line, a sentence, a word (a space belongs to
    the next word, as in tokenizers); else the last cut that separates no character from its combining marks."""
    for mark, behind in CUTS:
        at = text.rfind(mark, max(end // 2, 1), end)
        if at >= 0:
            return at + behind
    at = end
    while 0 < at < len(text) and _is_one_character(text[at - 1], text[at]):
        at -= 1
    return at or end


def _is_one_character(before: str, after: str) -> bool:
    """Whether two code points belong to one visible character."""
    joins = "\u200d"  # zero-width joiner: composed emoji
    return joins in (before, after) or bool(unicodedata.combining(after)) or after in "\ufe0e\ufe0f"


def _exchanges(segments: Iterable[Segment]) -> tuple[list[Segment], list[list[Segment]]]:
    """The unsupervised system turns at the beginning, and the rest, exchange by exchange."""
    waiting = list(segments)
    head: list[Segment] = []
    while waiting and waiting[0].role == Role.SYSTEM and not waiting[0].supervise:
        head.append(waiting.pop(0))
    return head, list(_split_at_requests(waiting))


def _split_at_requests(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """The segments, cut where the assistant is followed by another role."""
    part: list[Segment] = []
    for segment in segments:
        if part and part[-1].role == Role.ASSISTANT != segment.role:
            yield part
            part = []
        part.append(segment)
    if part:
        yield part

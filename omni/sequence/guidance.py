"""Guidance for interleaved history: what is dropped, in training and at inference, by one function.

    reduce(segments, "text")     every text segment is emptied; pictures and clips stay
    reduce(segments, "images")   every picture and clip goes; text stays
    reduce(segments, "all")      both

Roles and turn ends stay, so that a null context is an ordinary document. Training draws a keyed share of documents,
picks the last supervised picture, and conditions it on the reduced history (`drop`); inference reduces the history in
front of the picture that it is about to draw, and combines

    F = F_all + w_images (F_text - F_all) + w (F - F_text)        (InstructPix2Pix, arXiv 2211.09800, eq. 3)

where F_text has the text dropped, F_all everything. w = w_images = 1 is no guidance and costs nothing;
w_images = 1 alone needs no F_all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from omni.document import Document, Image, Role, Segment, Text, Video

Drop = Literal["text", "images", "all"]


def reduce(segments: Sequence[Segment], what: Drop) -> tuple[Segment, ...]:
    """The history without what is dropped. Turns survive as empty text, so the control tokens stay in place."""
    out: list[Segment] = []
    for role, turn in Document(tuple(segments)).turns():
        kept = [
            s
            for s in turn
            if (what == "text" and not isinstance(s, Text)) or (what == "images" and isinstance(s, Text))
        ]
        out += kept or [Text("", role)]
    return tuple(out)


def drop(document: Document, what: Drop) -> Document | None:
    """The training form: history before the last supervised picture reduced, that picture alone supervised.

    None when the document has no supervised picture or clip.
    """
    targets = _targets(document)
    return _reduced(document, targets[-1], what) if targets else None


def null_documents(document: Document) -> list[Document]:
    """For every supervised picture or clip, in order, the document that has it alone behind an empty history."""
    return [_reduced(document, index, "all") for index in _targets(document)]


def _targets(document: Document) -> list[int]:
    return [i for i, s in enumerate(document.segments) if not isinstance(s, Text) and s.supervise]


def _reduced(document: Document, index: int, what: Drop) -> Document:
    target = document.segments[index]
    before = [replace(s, supervise=False) for s in document.segments[:index]]
    assert isinstance(target, Image | Video)
    return Document((*reduce(open_turn(before, target.role), what), target), {**document.meta, "dropped": what})


def open_turn(before: Sequence[Segment], role: Role) -> list[Segment]:
    """The history with the turn of `role` open at its end, even when nothing of that turn stands there yet."""
    return list(before) if before and before[-1].role == role else [*before, Text("", role)]

"""Guidance for interleaved history: one function drops conditions, in training and at inference.

    reduce(segments, "text")     every text segment is emptied; pictures and clips stay
    reduce(segments, "images")   pictures and clips are removed; text stays
    reduce(segments, "all")      both

Roles and turn ends stay: a null context is an ordinary document. In training, for a keyed share of documents, `drop`
conditions the last supervised picture on the reduced history. Inference reduces the history before the picture that it
generates, and combines

    F = F_all + w_images (F_text - F_all) + w (F - F_text)        (InstructPix2Pix, arXiv 2211.09800, eq. 3)

where F_text has the text dropped and F_all everything. w = w_images = 1 is no guidance and has no cost; w_images = 1
alone needs no F_all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from omni.document import Document, Image, Role, Segment, Text, Video

Drop = Literal["text", "images", "all"]


def reduce(segments: Sequence[Segment], what: Drop) -> tuple[Segment, ...]:
    """The reduced history. Each turn stays, if need be as empty text: the control tokens keep their order."""
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
    """Training: the history before the last supervised picture is reduced, and only that picture is supervised.

    None if the document has no supervised picture or clip.
    """
    targets = _targets(document)
    return _reduced(document, targets[-1], what) if targets else None


def null_documents(document: Document) -> list[Document]:
    """For each supervised picture or clip, in order: a document with it alone after an empty history."""
    return [_reduced(document, index, "all") for index in _targets(document)]


def _targets(document: Document) -> list[int]:
    """Indices of the supervised pictures and clips."""
    return [i for i, s in enumerate(document.segments) if not isinstance(s, Text) and s.supervise]


def _reduced(document: Document, index: int, what: Drop) -> Document:
    """The segments before `index`, reduced and not supervised, and that segment."""
    target = document.segments[index]
    before = [replace(s, supervise=False) for s in document.segments[:index]]
    assert isinstance(target, Image | Video)
    return Document((*reduce(open_turn(before, target.role), what), target), {**document.meta, "dropped": what})


def open_turn(before: Sequence[Segment], role: Role) -> list[Segment]:
    """The history, ending in a turn of `role`; the turn may be empty."""
    return list(before) if before and before[-1].role == role else [*before, Text("", role)]

"""What one training step holds: its configuration, and what the loader makes of documents on the way to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from omni.config import Frozen
from omni.sequence.layout import Batch, Span

PIECES = 1 << 40  # piece p of document i has the uid i + p PIECES (see train.data.loader)


class TooManyCorrupt(RuntimeError):
    """More than `batch.max_corrupt` of the documents could not be read."""


class ShapeConfig(Frozen):
    """`rows` rows of `budget` context and `refine_budget` refine positions."""

    rows: int = Field(ge=1)
    budget: int = Field(ge=8)
    refine_budget: int = Field(ge=0)


class BatchConfig(Frozen):
    """What one step holds: rows of one or more shapes (short rows first: attention costs least there).

    copies: noisy copies of every supervised block. trim: share of the documents whose last picture is left out of the
    context stream, where nothing but the closing ids would read it (cheaper; the rest teach how a turn closes).
    fixed: tensors always have the full shape; else they shrink to what is used. too_long: what becomes of a document
    that no row holds; a picture or clip that none holds is dropped in any case (see train.data.pieces). max_corrupt:
    the run stops when a larger share of the documents cannot be read, from `min_corrupt` such documents on.
    """

    shapes: tuple[ShapeConfig, ...] = Field(min_length=1)
    copies: int = Field(1, ge=1)
    trim: float = Field(0.0, ge=0, le=1)
    fixed: bool = False
    too_long: Literal["split", "drop"] = "split"
    max_corrupt: float = Field(0.05, ge=0, lt=1)
    min_corrupt: int = Field(20, ge=1)

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
class Read:
    """What a document became: its pieces, one where it is not too long. Without pieces, `what` says why it has none;
    `why` in words, also of what was left out where there are some."""

    pieces: tuple[Composed, ...] = ()
    what: Literal["read", "skipped", "dropped", "held_out"] = "read"
    why: str = ""


@dataclass(frozen=True)
class Packed:
    """What one step trains on: a batch per shape, the global indices of its documents, and the cursor after it (of a
    lane, see train.data.lanes). skipped: corrupt documents; dropped: what no row holds. counts: how many documents were
    packed, skipped, dropped (in part or whole), held out and split, and into how many pieces; one that is split counts
    once."""

    batches: list[Batch]
    documents: list[int]
    cursor: int
    skipped: list[tuple[int, str]] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    lane: int | None = None

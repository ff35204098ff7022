"""The data of one training step: its configuration, and the loader's forms of a document."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from omni.config import Frozen
from omni.sequence.layout import Batch, Span

PIECES = 1 << 40  # piece p of document i has the uid i + p PIECES (see train.data.loader)


class TooManyCorrupt(RuntimeError):
    """A larger share of the documents than `batch.max_corrupt` could not be read."""


class ShapeConfig(Frozen):
    """`rows` batch rows of `budget` context and `refine_budget` refine positions."""

    rows: int = Field(ge=1)
    budget: int = Field(ge=8)
    refine_budget: int = Field(ge=0)


class BatchConfig(Frozen):
    """Batch rows of one or more shapes (short rows first: attention costs least there).

    copies: noisy copies of every supervised block. trim: share of the documents whose last picture is left out of the
    context stream, where only the closing ids attend to it (cheaper; the other documents train the end of a turn).
    fixed: tensors always have the full shape; else they shrink to the used part. too_long: split or drop a document
    that no row holds; a picture or clip that no row holds is always dropped (see train.data.pieces). max_corrupt: the
    run stops where a larger share of the documents cannot be read, from `min_corrupt` such documents on.
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
        """Context positions of all shapes."""
        return sum(shape.rows * shape.budget for shape in self.shapes)


class DropConfig(Frozen):
    """Probabilities of dropping conditions, for guidance, per document with a supervised picture."""

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
    """A document as read: its pieces, one where it is not too long. `what`: the reason where it has no pieces; `why`:
    the same in words, or what was left out of the pieces."""

    pieces: tuple[Composed, ...] = ()
    what: Literal["read", "skipped", "dropped", "held_out"] = "read"
    why: str = ""


@dataclass(frozen=True)
class Packed:
    """The data of one step: a batch per shape, the global indices of its documents, and the cursor after it (of one
    worker, see train.data.workers). skipped: corrupt documents; dropped: documents that no row holds. counts: how many
    documents were packed, skipped, dropped (in part or whole), held out and split, and how many pieces; a split
    document counts once."""

    batches: list[Batch]
    documents: list[int]
    cursor: int
    skipped: list[tuple[int, str]] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    worker: int | None = None

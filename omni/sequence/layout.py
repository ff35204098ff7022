"""Layout: documents, as spans of token ids and latents, packed into batch rows of positions.

A document is a list of spans: `TokenSpan` (ids), `LatentSpan` (one block of latents) and `FeatureSpan` (one block of
features of an encoder). `pack` packs many documents
into R batch rows. Every batch row has two streams:

    context stream (T positions)   the ids, the CLEAN latents of every block, and features, in order
    refine stream  (S positions)   copies of supervised latent blocks; an objective adds noise to them

Visibility depends on integers (document, block, copy, rank) alone: see `mask.visible`. A text token is a block of one;
an image is one block; a video is a sequence of chunk blocks.

Legend: R batch rows, T context positions, S refine positions, C latent channels, N latents of one block, E features of
a position, F positions of features.
This module does not depend on a tokenizer, a codec or a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from omni.sequence.features import Features, FeatureSpan
from omni.sequence.mask import Fields

IGNORE = -100  # target of a position without next-token loss


@dataclass(frozen=True)
class TokenSpan:
    """Ids in order; `supervise[i]`: whether the loss covers the prediction of `ids[i]`. adapted: whether an invoked
    LoRA is active there (nn.lora)."""

    ids: list[int]
    supervise: list[bool]
    adapted: bool = False

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.supervise):
            raise ValueError(f"{len(self.ids)} ids but {len(self.supervise)} supervise flags; give one per id")

    def part(self, start: int, stop: int | None = None) -> TokenSpan:
        """The ids from start to stop."""
        return replace(self, ids=self.ids[start:stop], supervise=self.supervise[start:stop])


@dataclass(frozen=True, eq=False)
class LatentSpan:
    """One block of latents: (N, C) float, N = t*h*w in row-major (time, row, column) order of `grid`. in_context: False
    where the context holds only the features of the picture, and the latents are there to be refined. Blocks are
    `adapted`, see TokenSpan."""

    latents: Tensor
    grid: tuple[int, int, int]
    supervise: bool = False
    in_context: bool = True

    def __post_init__(self) -> None:
        t, h, w = self.grid
        if self.latents.ndim != 2 or self.latents.shape[0] != t * h * w:
            raise ValueError(
                f"a block of grid {self.grid} needs ({t * h * w}, C) latents, got {tuple(self.latents.shape)}"
            )


Span = TokenSpan | LatentSpan | FeatureSpan


def num_context(span: Span) -> int:
    """The number of context positions of a span."""
    if isinstance(span, TokenSpan):
        return len(span.ids)
    if isinstance(span, FeatureSpan):
        return len(span.features)
    return len(span.latents) if span.in_context else 0


@dataclass(frozen=True)
class Stream:
    """The positions of one stream of R batch rows, as integers; all tensors (R, length) unless noted.

    document: index of the document in its batch row; -1 is padding. block: index of the block in its document.
    copy: 0 in the context stream, >= 1 in the refine stream (unique in a batch row), -1 padding of the refine stream.
    position: (R, length, 3) int64, (time, row, column) rotary coordinates. rank: order inside a copy; None: all 0.
    bound: refine stream only: the copy sees context blocks below it; None: those before the position's own block.

    Several blocks of one request that see one another in one pass are one copy: `rank` gives the order of visibility,
    and `bound` the end of the finished context for all of them. Times belong to items, not to copies: a block, or a
    single position, with a time of its own is an item of its own (Transformer.refine).
    """

    document: Tensor
    block: Tensor
    copy: Tensor
    position: Tensor
    rank: Tensor | None = None
    bound: Tensor | None = None

    @property
    def fields(self) -> Fields:
        """The four integers that decide visibility (mask.visible)."""
        return Fields(self.document, self.block if self.bound is None else self.bound, self.copy, self.rank)


@dataclass(frozen=True)
class Batch:
    """One packed batch. `item` numbers the refine copies over the whole batch (-1: padding)."""

    ids: Tensor  # (R, T) int64; pad id on latents and padding
    latents: Tensor  # (R, T, C) float32; zero where not latent
    is_latent: Tensor  # (R, T) bool
    target: Tensor  # (R, T) int64: the next id, or IGNORE
    context: Stream
    refine_latents: Tensor  # (R, S, C) float32, clean
    refine: Stream
    item: Tensor  # (R, S) int64 in 0..num_items-1, or -1
    item_first: Tensor  # (num_items,) int64: flat index r*S+s of the first position of each item
    item_names: tuple[tuple[int, int, int], ...] = ()  # (document uid, block, copy) of each item; the key of its noise
    documents: tuple[int, ...] = ()  # uids of the packed documents
    num_context: int = 0  # context positions that are not padding
    num_refine: int = 0
    dropped: frozenset[int] = frozenset()  # uids of documents without their condition
    adapted: Tensor | None = None  # (R, T) bool: where an invoked LoRA is active; None: nowhere
    null: Batch | None = None  # the same items, in the same order, each after an empty history
    features: Features | None = None  # of pictures in the context; None: it has none

    @property
    def num_items(self) -> int:
        return int(self.item_first.numel())

    @property
    def is_block(self) -> Tensor:
        """(R, T) bool: the context positions of latents and of features."""
        if self.features is None:
            return self.is_latent
        return self.is_latent.flatten().index_fill(0, self.features.at, True).view_as(self.is_latent)

    @property
    def num_positions(self) -> int:
        """Positions of both streams that are not padding."""
        return self.num_context + self.num_refine

    @property
    def num_targets(self) -> int:
        """Positions with a next-token loss."""
        return int((self.target != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch with all tensors on `device`, null contexts too."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor | Features | Batch):
                return value.to(device)
            if isinstance(value, Stream):
                return Stream(*(move(getattr(value, f.name)) for f in fields(value)))
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass
class LaidOut:
    """The layout of one document: lists with one entry per context position, and its refine blocks."""

    ids: list[int]
    latents: list[Tensor | None]
    supervise: list[bool]
    block: list[int]
    position: list[tuple[int, int, int]]
    blocks: list[tuple[int, LatentSpan, int]]  # (block index, span, first rotary position): blocks to refine
    next_position: int
    next_block: int
    features: list[tuple[Tensor, tuple[int, int]] | None] = field(default_factory=list)  # values (E,), (row, column)
    pictures: list[Tensor] = field(default_factory=list)  # of features that the model computes, in order
    adapted: list[bool] = field(default_factory=list)  # where an invoked LoRA is active

    def is_text(self, index: int) -> bool:
        """Whether a position is an id: neither a latent nor features."""
        return self.latents[index] is None and self.features[index] is None


def lay_out(
    spans: Sequence[Span], pad_id: int, *, start_position: int = 0, start_block: int = 0, trim_tail: bool = False
) -> LaidOut:
    """Lay out one document. A text token advances the rotary position by one. A block of grid (t, h, w) at position p
    has coordinates (p + time, p + row, p + column); the next position is p + max(t, h, w). So text has the ordinary 1-D
    rotary positions of a decoder language model. `trim_tail` leaves a last supervised block, and all spans after it,
    out of the context stream: no position sees them there.
    """
    out = LaidOut([], [], [], [], [], [], start_position, start_block, [])
    last = _last_supervised(spans) if trim_tail else None
    for index, span in enumerate(spans):
        p = out.next_position
        if isinstance(span, TokenSpan):
            out.features += [None] * len(span.ids)
            out.adapted += [span.adapted] * len(span.ids)
            for offset, (token, flag) in enumerate(zip(span.ids, span.supervise, strict=True)):
                out.ids.append(int(token))
                out.latents.append(None)
                out.supervise.append(flag)
                out.block.append(out.next_block + offset)
                out.position.append((p + offset, p + offset, p + offset))
            out.next_block += len(span.ids)
            out.next_position = p + len(span.ids)
            continue
        if isinstance(span, LatentSpan):
            if span.supervise:
                out.blocks.append((out.next_block, span, p))
            if index == last:
                break
            if not span.in_context:
                continue
        num = num_context(span)
        is_latent = isinstance(span, LatentSpan)
        if isinstance(span, FeatureSpan) and span.pixels is not None:
            out.pictures.append(span.pixels)
        out.latents += list(span.latents.unbind(0)) if is_latent else [None] * num
        out.features += [None] * num if is_latent else list(zip(span.features.unbind(0), span.places, strict=True))
        out.ids += [pad_id] * num
        out.supervise += [False] * num
        out.adapted += [True] * num
        out.block += [out.next_block] * num
        out.position += grid_positions(span.grid, p)
        out.next_block += 1
        out.next_position = p + max(span.grid)
    return out


def context_length(spans: Sequence[Span], trim_tail: bool = False) -> int:
    """The number of context positions that `lay_out` makes of a document."""
    last = _last_supervised(spans) if trim_tail else None
    return sum(map(num_context, spans[:last]))


def _last_supervised(spans: Sequence[Span]) -> int | None:
    """Index of the last latent span if it is supervised, else None."""
    indices = [i for i, s in enumerate(spans) if isinstance(s, LatentSpan)]
    if indices and spans[indices[-1]].supervise:  # type: ignore[union-attr]
        return indices[-1]
    return None


def grid_positions(grid: tuple[int, int, int], p: int) -> list[tuple[int, int, int]]:
    """(time, row, column) coordinates of a block whose first rotary position is p, in row-major order."""
    t, h, w = grid
    return [(p + a, p + b, p + c) for a in range(t) for b in range(h) for c in range(w)]


@dataclass(frozen=True)
class Shape:
    """`rows` batch rows, each of `budget` context and `refine_budget` refine positions."""

    rows: int
    budget: int
    refine_budget: int


def pack(
    documents: Sequence[Sequence[Span]],
    shapes: Sequence[Shape],
    *,
    channels: int,
    pad_id: int,
    copies: int = 1,
    uids: Sequence[int] | None = None,
    trim: Sequence[bool] | None = None,
    fixed_shape: bool = True,
) -> tuple[list[Batch], int]:
    """Pack documents in order, each into the first batch row with room; stop at the first that fits in none.

    Several shapes give several batches, which one training step accumulates: short documents share short rows, where
    attention costs less; long ones have long rows. Returns (one batch per shape, number of documents used), so that a
    loader's state is one integer. `trim[i]` leaves the last block of document i out of the context (see `lay_out`).
    With `fixed_shape` tensors have exactly the shape's size; else they shrink to the used size.

    Raises ValueError if a document alone exceeds every shape.
    """
    uids = list(range(len(documents))) if uids is None else list(uids)
    rows = [(shape, [0, 0], []) for shape in shapes for _ in range(shape.rows)]
    count = 0
    for number, spans in enumerate(documents):
        one = lay_out(spans, pad_id, trim_tail=bool(trim[number]) if trim is not None else False)
        need = (len(one.ids), copies * sum(len(span.latents) for _, span, _ in one.blocks))
        if not any(need[0] <= shape.budget and need[1] <= shape.refine_budget for shape in shapes):
            raise ValueError(
                f"document {uids[number]} needs {need[0]} context and {need[1]} refine positions, but a batch row has "
                f"{max(s.budget for s in shapes)} and {max(s.refine_budget for s in shapes)}; raise one or shorten it"
            )
        for shape, used, members in rows:
            if used[0] + need[0] <= shape.budget and used[1] + need[1] <= shape.refine_budget:
                members.append((uids[number], one))
                used[0] += need[0]
                used[1] += need[1]
                break
        else:
            break
        count += 1
    batches = []
    for shape in shapes:
        mine = [(used, members) for s, used, members in rows if s is shape]
        budget = shape.budget if fixed_shape else max(1, max(used[0] for used, _ in mine))
        refine_budget = shape.refine_budget if fixed_shape else max(used[1] for used, _ in mine)
        batches.append(_assemble([m for _, m in mine], budget, refine_budget, channels, pad_id, copies))
    return batches, count


def lay_rows(
    documents: Sequence[Sequence[Span]], *, channels: int, pad_id: int, copies: int, uids: Sequence[int]
) -> Batch:
    """One document per batch row, in order, without its last block in the context; rows are as long as the longest."""
    laid = [lay_out(spans, pad_id, trim_tail=True) for spans in documents]
    budget = max((len(one.ids) for one in laid), default=1)
    refine = max((copies * sum(len(span.latents) for _, span, _ in one.blocks) for one in laid), default=1)
    rows = [[(uid, one)] for uid, one in zip(uids, laid, strict=True)]
    return _assemble(rows, budget, refine, channels, pad_id, copies)


@dataclass(frozen=True)
class ContextTensors:
    """Batch rows of the context stream: ids (R, N) int64, latents (R, N, C) float32, is_latent (R, N) bool; document
    (-1 is padding) and block (R, N), position (R, N, 3), int64; valid: the number of used positions of each row."""

    ids: Tensor
    latents: Tensor
    is_latent: Tensor
    document: Tensor
    block: Tensor
    position: Tensor
    valid: list[int]
    features: Features | None = None
    adapted: Tensor | None = None


def context_tensors(rows: Sequence[Sequence[LaidOut]], length: int, channels: int, pad_id: int) -> ContextTensors:
    """The documents of each batch row, concatenated. Packing and prefill both use this function."""
    R = len(rows)
    out = ContextTensors(
        torch.full((R, length), pad_id, dtype=torch.int64), torch.zeros(R, length, channels),
        torch.zeros(R, length, dtype=torch.bool), torch.full((R, length), -1, dtype=torch.int64),
        torch.zeros(R, length, dtype=torch.int64), torch.zeros(R, length, 3, dtype=torch.int64), [],
    )  # fmt: skip
    for r, row in enumerate(rows):
        n = sum(len(one.ids) for one in row)
        out.ids[r, :n] = torch.tensor([token for one in row for token in one.ids], dtype=torch.int64)
        out.block[r, :n] = torch.tensor([block for one in row for block in one.block], dtype=torch.int64)
        out.document[r, :n] = torch.tensor([d for d, one in enumerate(row) for _ in one.ids], dtype=torch.int64)
        position = [coordinates for one in row for coordinates in one.position]
        out.position[r, :n] = torch.tensor(position, dtype=torch.int64).reshape(-1, 3)
        latents = [latent for one in row for latent in one.latents]
        where = [i for i, latent in enumerate(latents) if latent is not None]
        if where:
            out.latents[r, where] = torch.stack([z for z in latents if z is not None]).to(out.latents)
            out.is_latent[r, where] = True
        out.valid.append(n)
    return replace(out, features=_features(rows, length), adapted=_adapted(rows, length))


def _adapted(rows: Sequence[Sequence[LaidOut]], length: int) -> Tensor | None:
    """(R, N) bool: where an invoked LoRA is active; None: nowhere."""
    if not any(any(one.adapted) for row in rows for one in row):
        return None
    found = torch.zeros(len(rows), length, dtype=torch.bool)
    for r, row in enumerate(rows):
        flags = [flag for one in row for flag in one.adapted]
        found[r, : len(flags)] = torch.tensor(flags)
    return found


def _features(rows: Sequence[Sequence[LaidOut]], length: int) -> Features | None:
    """The features of all rows; None where there are none."""
    values: list[Tensor] = []
    places: list[tuple[int, int]] = []
    at: list[int] = []
    for r, row in enumerate(rows):
        for t, found in enumerate(one for laid in row for one in laid.features):
            if found is not None:
                values.append(found[0])
                places.append(found[1])
                at.append(r * length + t)
    if not at:
        return None
    pictures = tuple(pixels for row in rows for laid in row for pixels in laid.pictures)
    return Features(torch.stack(values).float(), torch.tensor(places), torch.tensor(at), pictures)


def _assemble(filled: list[list[tuple[int, LaidOut]]], T: int, S: int, C: int, pad_id: int, copies: int) -> Batch:
    """The batch of laid-out documents: R rows of T context and S refine positions. Items are numbered row by row,
    document by document, block by block, copy by copy: objectives rely on that order."""
    R, padding = len(filled), _empty_stream(len(filled), T, copy=0)
    laid = context_tensors([[one for _, one in row] for row in filled], T, C, pad_id)
    block = torch.where(laid.document >= 0, laid.block, padding.block)
    context = Stream(laid.document, block, padding.copy, laid.position)
    refine, refine_latents = _empty_stream(R, S, copy=-1), torch.zeros(R, S, C)
    item = torch.full((R, S), -1, dtype=torch.int64)
    item_first: list[int] = []
    item_names: list[tuple[int, int, int]] = []
    for r, row in enumerate(filled):
        j = copy_id = 0
        for d, (uid, one) in enumerate(row):
            for block_index, span, p in one.blocks:
                coordinates = torch.tensor(grid_positions(span.grid, p), dtype=torch.int64)
                for c in range(copies):
                    copy_id += 1
                    at = slice(j, j + len(span.latents))
                    refine_latents[r, at] = span.latents.float()
                    refine.document[r, at] = d
                    refine.block[r, at] = block_index
                    refine.copy[r, at] = copy_id
                    refine.position[r, at] = coordinates
                    item[r, at] = len(item_first)
                    item_first.append(r * S + j)
                    item_names.append((uid, block_index, c))
                    j = at.stop
    return Batch(
        laid.ids, laid.latents, laid.is_latent, _targets(filled, T), context, refine_latents, refine, item,
        torch.tensor(item_first, dtype=torch.int64), tuple(item_names),
        tuple(uid for row in filled for uid, _ in row), sum(laid.valid), int((item >= 0).sum()),
        features=laid.features, adapted=laid.adapted,
    )  # fmt: skip


def _targets(filled: list[list[tuple[int, LaidOut]]], T: int) -> Tensor:
    """(R, T): the next id of the same document if supervised, else IGNORE."""
    target = torch.full((len(filled), T), IGNORE, dtype=torch.int64)
    for r, row in enumerate(filled):
        follows: list[int] = []
        for _, one in row:
            follows += [t if flag else IGNORE for t, flag in zip(one.ids[1:], one.supervise[1:], strict=True)]
            follows += [IGNORE] * bool(one.ids)
        target[r, : len(follows)] = torch.tensor(follows, dtype=torch.int64)
    return target


def _empty_stream(rows: int, length: int, copy: int) -> Stream:
    """Padding: document -1; block numbers increase, so that a padded position sees only padding, itself included."""
    return Stream(
        torch.full((rows, length), -1, dtype=torch.int64),
        torch.arange(length).expand(rows, length).clone(),
        torch.full((rows, length), copy, dtype=torch.int64),
        torch.zeros(rows, length, 3, dtype=torch.int64),
    )

"""Blocks of tokens in the refine stream: their starts, their target ids, and the stream of their positions.

A block starts after a position of the context stream, its START, whose hidden state predicts the block's first token.
It has up to K tokens. In a pass it is one copy of n positions: clean tokens, if any, after the start, then
placeholders. Its positions see the clean context up to the start and, in the block, positions of no higher rank:

    causal   ranks 0, 1, 2, ...: every position sees those before it
    block    all placeholders have one rank, above the clean tokens: they see one another

In training every batch row of text has N blocks beside it ("staircase"; cost (T + N K) / T of the text pass).

Legend: R batch rows, T context positions, B = R N blocks, K tokens of a block, n positions of a block in a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.rng import Key
from omni.sequence.layout import IGNORE, Batch, Stream


@dataclass(frozen=True)
class Starts:
    """Where B blocks start: flat row-major (batch row, number). `position`: rotary coordinate of the block's first
    token."""

    row: Tensor  # (B,) int64
    at: Tensor  # (B,) int64, index in the context stream
    document: Tensor  # (B,) int64, -1 for an absent block
    block: Tensor  # (B,) int64: the block index of the block's first token
    position: Tensor  # (B,) int64
    per_row: int  # N


@dataclass(frozen=True)
class Blocks:
    """The target ids of B blocks of K tokens. `valid` (B, K): a prefix of each; ids are 0 where it is False.

    names: (document uid, offset of the start in its document, 0), the key of a block's random values.
    """

    ids: Tensor  # (B, K) int64
    valid: Tensor  # (B, K) bool
    names: tuple[tuple[int, int, int], ...]

    @property
    def count(self) -> float:
        """The number of valid tokens."""
        return float(self.valid.sum())


def choose_blocks(batch: Batch, length: int, per_row: int, key: Key) -> tuple[Starts, Blocks]:
    """`per_row` random starts in every batch row of a packed batch, at text positions whose next id is supervised.

    A block ends after K ids, or where the next id is not supervised (where a picture begins or a turn ends). The chosen
    starts depend on the documents of the batch row; the random value of a start depends on (document, offset) alone.
    Another key changes the starts of every run.
    """
    R, T = batch.ids.shape
    device = batch.ids.device
    supervised = (batch.target != IGNORE).cpu()
    can_start = supervised & ~batch.is_block.cpu()
    document = batch.context.document.cpu()
    offset, uid = _offsets(document), _uids(batch)
    draws = torch.full((R, T), 2.0)
    for r in range(R):
        for d, name in enumerate(uid[r]):
            where = (document[r] == d).nonzero().flatten()
            draws[r, where] = key.fold("starts", name).uniform((len(where),))
    draws[~can_start] = 2.0
    order = draws.sort(dim=1, stable=True)
    at = order.indices[:, :per_row]
    there = order.values[:, :per_row] < 2.0
    if per_row > T:
        at = torch.nn.functional.pad(at, (0, per_row - T))
        there = torch.nn.functional.pad(there, (0, per_row - T))
    steps = at[:, :, None] + torch.arange(length)
    inside = (steps < T) & there[:, :, None]
    steps = steps.clamp(max=T - 1)
    rows = torch.arange(R)[:, None, None]
    valid = (supervised[rows, steps] & inside).cumprod(-1).bool().to(device)
    ids = torch.where(valid, batch.target[rows.to(device), steps.to(device)], 0)
    row, flat = torch.arange(R).repeat_interleave(per_row).to(device), at.flatten().to(device)
    alive = there.flatten().to(device)
    starts = Starts(
        row,
        flat,
        torch.where(alive, batch.context.document[row, flat], -1),
        batch.context.block[row, flat] + 1,
        batch.context.position[row, flat, 0] + 1,
        per_row,
    )
    names = tuple(
        (uid[r][int(document[r, i])] if yes else -1 - r, int(offset[r, i]) if yes else n, 0)
        for r in range(R)
        for n, (i, yes) in enumerate(zip(at[r].tolist(), there[r].tolist(), strict=True))
    )
    return starts, Blocks(ids.flatten(0, 1), valid.flatten(0, 1), names)


def block_stream(starts: Starts, num: int, causal: bool, clean: int = 0) -> Stream:
    """The refine stream (R, N num) of one pass: `num` positions a block, of which the first `clean` are clean
    tokens."""
    N = starts.per_row
    step = torch.arange(num, device=starts.at.device)
    rank = step if causal else step.clamp(max=clean)

    def lay(value_B: Tensor) -> Tensor:
        return value_B.view(-1, N, 1).expand(-1, N, num).flatten(1)

    copy = torch.arange(1, N + 1, device=step.device).repeat(len(starts.at) // N)
    position = (starts.position[:, None] + step).view(-1, N * num, 1).expand(-1, -1, 3)
    ranks = rank.expand(len(starts.at), num).reshape(-1, N * num)
    return Stream(lay(starts.document), lay(starts.block), lay(copy), position, ranks)


def _offsets(document: Tensor) -> Tensor:
    """(R, T): the index of each position in its document; documents are contiguous."""
    T = document.shape[1]
    index = torch.arange(T).expand_as(document)
    fresh = torch.ones_like(document, dtype=torch.bool)
    fresh[:, 1:] = document[:, 1:] != document[:, :-1]
    return index - torch.where(fresh, index, 0).cummax(1).values


def _uids(batch: Batch) -> list[list[int]]:
    """The uids of each batch row's documents, in order."""
    names, out = iter(batch.documents), []
    for row in batch.context.document.max(1).values.tolist():
        out.append([next(names) for _ in range(row + 1)])
    return out

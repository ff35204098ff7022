"""What a noisy block reads of the other blocks of its clip: a property of a model, the same in training and sampling.

    reads      "finished"  the blocks before it, finished: they are context (Transfusion, BAGEL)
               "before"    the blocks before it, each at its present level: causal (Diffusion Forcing, AR-Diffusion)
               "all"       all blocks at their present levels: bidirectional (full-sequence and Rolling Diffusion)
    finished   "context"   a finished block is read as clean context, like text (a cache beside the window)
               "refine"    it stays in the refine pass at time `context_time` (Diffusion Forcing)

    unit       "block"     all latents of a block have one level
               "latent"    each latent of a block has its own: known ones are clean, others are noise or masked (MAR)

The blocks of one clip that read one another are one copy of the refine stream (sequence.layout.Stream): `joined` gives
the integers of training, generation.plane those of sampling.

Legend: I items, R batch rows, S refine positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.config import Frozen
from omni.sequence.layout import Batch, Stream

BlockReads = Literal["finished", "before", "all"]


class BlockContext(Frozen):
    """See the head of the file.

    context_time: in [0, 1), the time at which finished blocks are shown. As context they are multiplied by
    1 - context_time, in training and in sampling. In the refine pass they are shown at t = s = context_time, multiplied
    by 1 - context_time, and kept unchanged (stabilisation of Diffusion Forcing, arXiv 2407.01392); levels of a kind
    that trains every level, such as "independent", show them so in training too, and others are refused
    (objectives.base.check_blocks).
    context_noise: whether context_time times noise is added there, new in every evaluation: noise that is drawn once
    would be taken for data.

    Raises ValueError for finished "refine" with reads "finished", for unit "latent" with other reads, and for
    context_noise that has no effect.
    """

    reads: BlockReads = "finished"
    finished: Literal["context", "refine"] = "context"
    context_time: float = Field(default=0.0, ge=0, lt=1)
    context_noise: bool = False
    unit: Literal["block", "latent"] = "block"

    @model_validator(mode="after")
    def _noise_has_effect(self) -> BlockContext:
        if self.context_noise and (self.finished == "context" or not self.context_time):
            raise ValueError(
                "context_noise has an effect with finished = 'refine' and a context_time above 0 only; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _latents_are_of_one_block(self) -> BlockContext:
        if self.unit == "latent" and self.reads != "finished":
            raise ValueError(
                f"unit = 'latent' with reads = {self.reads!r} is not implemented: the latents of a block read one "
                "another and finished blocks; leave reads out"
            )
        return self

    @model_validator(mode="after")
    def _finished_blocks_are_context(self) -> BlockContext:
        if self.reads == "finished" and self.finished == "refine":
            raise ValueError(
                "finished = 'refine' has no effect with reads = 'finished', where finished blocks are context; leave "
                "it out, or take reads 'before' or 'all'"
            )
        return self

    @property
    def is_joint(self) -> bool:
        """Whether noisy blocks read noisy blocks."""
        return self.reads != "finished"

    @property
    def needs_levels(self) -> bool:
        """Whether training needs the joint times of what reads one another."""
        return self.is_joint or self.unit == "latent"

    @property
    def context_scale(self) -> float:
        """The factor of clean latents in the context stream."""
        return 1 - self.context_time if self.finished == "context" else 1.0


@dataclass(frozen=True)
class Neighbours:
    """The items of a batch as groups: the copies of blocks that follow one another without a token between them, such
    as those of one clip.

    names: (document, first block, copy) of each group. group, index: (I,) int64, the group of each item and its place
    there. count: (G,) int64, the blocks of each group.
    """

    names: list[tuple[int, int, int]]
    group: Tensor
    index: Tensor
    count: Tensor

    @classmethod
    def of(cls, names: Sequence[tuple[int, int, int]]) -> Neighbours:
        """The groups of items named (document, block, copy), in any order. ValueError if two items have one name."""
        found = torch.tensor(list(names), dtype=torch.int64).reshape(-1, 3)
        order = torch.arange(len(found))
        for column in (1, 2, 0):  # by document, then copy, then block
            order = order[found[order, column].argsort(stable=True)]
        rows, place = found[order], order.argsort()
        step, same = rows[1:, 1] - rows[:-1, 1], (rows[1:] == rows[:-1])[:, [0, 2]].all(1)
        if bool((same & (step == 0)).any()):
            twice = tuple(rows[1:][same & (step == 0)][0].tolist())
            raise ValueError(f"two items have the name {twice}; names (document, block, copy) must be distinct")
        starts = torch.cat([torch.ones(1, dtype=torch.bool), ~(same & (step == 1))])[: len(found)]
        group, first = starts.cumsum(0) - 1, starts.nonzero().squeeze(1)
        index = torch.arange(len(found)) - first[group]
        heads = [(document, block, copy) for document, block, copy in rows[first].tolist()]
        return cls(heads, group[place], index[place], group.bincount(minlength=len(heads)))

    def padded(self, value_I: Tensor, fill: float = 0.0) -> Tensor:
        """(I,) -> (G, B), with `fill` after the last block of a group."""
        out = value_I.new_full((len(self.names), int(self.count.max()) if len(self.names) else 0), fill)
        out[self.group, self.index] = value_I
        return out

    def items(self, value_GB: Tensor) -> Tensor:
        """(G, B) -> (I,), the inverse of `padded`."""
        return value_GB[self.group, self.index]


LATENTS = 1 << 20  # most latents of a block


def of_latents(batch: Batch) -> Batch:
    """The batch with an item for each latent, named (document, block LATENTS + n, copy): the latents of a block are
    neighbours."""
    there = batch.item >= 0
    item, of_block = batch.item.clone(), batch.item[there]
    item[there] = torch.arange(len(of_block), device=item.device)
    count = of_block.bincount(minlength=batch.num_items)
    names = [
        (document, block * LATENTS + n, copy)
        for (document, block, copy), num in zip(batch.item_names, count.tolist(), strict=True) for n in range(num)
    ]  # fmt: skip
    return replace(batch, item=item, item_names=tuple(names), item_first=there.flatten().nonzero().squeeze(1))


def joined(
    refine: Stream, item: Tensor, names: Sequence[tuple[int, int, int]], context: BlockContext,
    is_finished: Tensor | None = None, is_noise: Tensor | None = None,
) -> Stream:  # fmt: skip
    """The refine stream (R, S) in which the blocks of a group read one another as `context` defines.

    item: (R, S) int64, the item of each position (-1: padding). names: (document, block, copy) of each item.
    is_finished: (I,) bool; with finished = "context" the blocks before the first unfinished one of a group are read as
    context, and no other block reads their copies. is_noise: (I,) bool, blocks that have not started: no other block
    reads them.
    """
    if not context.is_joint or not names:
        return refine
    groups, device = Neighbours.of(names), item.device
    first = torch.tensor([block for _, block, _ in groups.names])
    bound, is_alone = first[groups.group], torch.zeros(len(names), dtype=torch.bool)
    if context.finished == "context" and is_finished is not None:
        head = groups.padded(is_finished.cpu().long()).cumprod(1)  # 1 on the finished blocks at the head of a group
        bound, is_alone = bound + head.sum(1)[groups.group], groups.items(head) == 1
    if is_noise is not None:
        is_alone = is_alone | is_noise.cpu()
    copy = torch.where(is_alone, len(groups.names) + 1 + torch.arange(len(names)), groups.group + 1)
    there, at = item >= 0, item.clamp(min=0)

    def spread(value_I: Tensor, otherwise: Tensor) -> Tensor:
        return torch.where(there, value_I.to(device)[at], otherwise)

    rank = groups.index if context.reads == "before" else torch.zeros_like(groups.index)
    return replace(
        refine,
        copy=spread(copy, refine.copy),
        rank=spread(rank, torch.zeros_like(item)),
        bound=spread(bound, refine.block),
    )

"""The past of every block of a batch, replaced by samples: what a model reads when it generates its own context.

Block r of a document needs the samples of its blocks before r, so blocks are sampled in rounds: round r has the r-th
supervised block of every document, and no later block reads the last one, which has no round. After all rounds one
context pass serves every block (Self-Forcing, arXiv 2506.08009, in the layout of training).

Legend: R batch rows, T context positions, S refine positions, C channels, I items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from omni.sequence.layout import Batch, Stream

Memory = TypeVar("Memory")


def rounds(batch: Batch) -> list[Tensor]:
    """The items of each round, int64, ascending: the first copy of the r-th supervised block of every document that has
    a later one."""
    blocks: dict[int, list[int]] = {}  # of each document, its first copies in order
    for index, (document, _, copy) in enumerate(batch.item_names):
        if copy == 0:
            blocks.setdefault(document, []).append(index)
    found: dict[int, list[int]] = {}
    for items in blocks.values():
        for r, index in enumerate(items[:-1]):
            found.setdefault(r, []).append(index)
    return [torch.tensor(sorted(items), device=batch.item.device) for items in found.values()]


def with_items(batch: Batch, chosen: Tensor) -> Batch:
    """The batch with these items alone in the refine stream, in their order and as short as possible; without null
    contexts. chosen: indices of items, int64, ascending."""
    there = torch.isin(batch.item, chosen)
    width = max(1, int(there.sum(1).max())) if there.numel() else 0
    order = (~there).int().argsort(dim=1, stable=True)[:, :width]
    kept = there.gather(1, order)
    number = torch.full((batch.num_items + 1,), -1, device=chosen.device)  # the last entry: padding
    number[chosen] = torch.arange(len(chosen), device=chosen.device)
    refine, index = batch.refine, order.unsqueeze(-1)
    return replace(
        batch,
        refine_latents=batch.refine_latents.gather(1, index.expand(*order.shape, batch.refine_latents.shape[-1])),
        refine=Stream(
            torch.where(kept, refine.document.gather(1, order), -1),
            torch.where(kept, refine.block.gather(1, order), torch.arange(width, device=order.device)),
            torch.where(kept, refine.copy.gather(1, order), -1),
            refine.position.gather(1, index.expand(*order.shape, 3)),
        ),
        item=torch.where(kept, number[batch.item.gather(1, order)], -1),
        item_first=kept.flatten().nonzero().squeeze(1)[_firsts(batch.item[there])],
        item_names=tuple(batch.item_names[n] for n in chosen.tolist()),
        num_refine=int(there.sum()),
        null=None,
    )


def with_past(batch: Batch, part: Batch, x: Tensor) -> Batch:
    """The batch with the latents x (R, S, C) of the items of `part`, of `with_items`, in its context stream."""
    codes, there = _codes(part.refine, part.item >= 0), part.item >= 0
    where = torch.isin(_codes(batch.context, batch.is_latent), codes[there]) & batch.is_latent
    latents = batch.latents.clone()
    latents[where] = x[there].to(latents.dtype)  # both in order of row, document, block and place in the block
    return replace(batch, latents=latents)


def own_past(
    batch: Batch,
    memory: Memory,
    sample: Callable[[Batch, Memory], Tensor],
    context: Callable[[Batch], Memory],
) -> tuple[Batch, Memory]:
    """The batch in whose context stream every block that a later one reads is a sample, and its memory.

    memory: of `batch`. sample: (a batch with the items of a round, the memory of their past) -> x (R, S, C). context: a
    batch -> its memory. For documents of at most B supervised blocks that is B - 1 context passes and B - 1 calls of
    `sample`, which together refine each block but the last once.
    """
    for chosen in rounds(batch):
        part = with_items(batch, chosen)
        batch = with_past(batch, part, sample(part, memory))
        memory = context(batch)
    return batch, memory


def _firsts(item: Tensor) -> Tensor:
    """Indices of the first position of each run of equal values."""
    changed = torch.ones_like(item, dtype=torch.bool)
    changed[1:] = item[1:] != item[:-1]
    return changed.nonzero().squeeze(1)


def _codes(stream: Stream, there: Tensor) -> Tensor:
    """(R, length) int64: one number for each row, document and block; -1 where not `there`."""
    row = torch.arange(len(there), device=there.device).unsqueeze(1)
    return torch.where(there, (row << 48) + (stream.document << 32) + stream.block, -1)

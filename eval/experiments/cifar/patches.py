"""CIFAR-10 as documents of Omni: a short chat that names a class, and one block of normalised patches to refine.

    begin user CLASS end assistant image SIZE SIZE   [ block ]

Every batch row is one such document, so a batch is laid out once and each step only replaces classes and latents. The
block ends its document, so its clean latents are not in the context, and every refine position attends to the whole
context.

Legend: R rows, T context and S refine positions of a row, N latents of a picture, C channels, P side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eval.experiments.cifar.pictures import NUM_CLASSES, SIDE, Pictures
from omni.codecs.pixels import PixelCodec, PixelConfig
from omni.objectives.times import BatchNames
from omni.sequence.layout import Batch, LatentSpan, TokenSpan, lay_rows

# Ids of this vocabulary; FIRST_CLASS + n is class n.
BEGIN, USER, END, ASSISTANT, IMAGE, GRID_SIDE, PADDING, NO_CLASS = range(8)
FIRST_CLASS = 8
VOCAB_SIZE = FIRST_CLASS + NUM_CLASSES
CHAT = [BEGIN, USER, NO_CLASS, END, ASSISTANT, IMAGE, GRID_SIDE, GRID_SIDE]
CLASS_PLACE = CHAT.index(NO_CLASS)


@dataclass(frozen=True, eq=False)
class Patches:
    """The exact pixel codec with every channel normalised by `mean` and `deviation` (C,) of the training pictures."""

    codec: PixelCodec
    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(pictures: Pictures, patch: int) -> Patches:
        """The patches of a set, normalised over its first 10,000 pictures."""
        codec = PixelCodec(PixelConfig(patch=patch))
        latents = codec.encode(pictures.pixels[:10_000])
        return Patches(codec, latents.mean((0, 1, 2)), latents.std((0, 1, 2)).clamp(min=1e-3))

    @property
    def side(self) -> int:
        """Side of the grid of latents."""
        return self.codec.grid(SIDE, SIDE)[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (N, C) of a picture's latents."""
        return self.side**2, self.codec.spec.channels

    def encode(self, pixels_RPP3: Tensor) -> Tensor:
        """uint8 -> float32 (R, N, C)."""
        return ((self.codec.encode(pixels_RPP3) - self.mean) / self.deviation).flatten(1, 2)

    def decode(self, latents_RNC: Tensor) -> Tensor:
        """float (R, N, C) -> uint8 (R, P, P, 3)."""
        latents = latents_RNC.float() * self.deviation + self.mean
        return self.codec.decode(latents.unflatten(1, (self.side, self.side)))


def lay_pictures(rows: int, patches: Patches, copies: int = 1) -> Batch:
    """R documents without a class and with blank latents, `copies` refine copies of each, on the patches' device."""
    latents = LatentSpan(torch.zeros(patches.shape), (1, patches.side, patches.side), supervise=True)
    document = [TokenSpan(CHAT, [False] * len(CHAT)), latents]
    batch = lay_rows(
        [document] * rows, channels=patches.shape[1], pad_id=PADDING, copies=copies, uids=list(range(rows))
    )
    return replace(batch, item_names=BatchNames(rows * copies, copies)).to(patches.mean.device)  # type: ignore[arg-type]


def with_classes(blank: Batch, labels_R: Tensor, dropped_R: Tensor | None = None) -> Batch:
    """The rows of `lay_pictures` with their classes. dropped_R (bool, CPU): the rows without a class."""
    ids, dropped = blank.ids.clone(), frozenset[int]()
    ids[:, CLASS_PLACE] = FIRST_CLASS + labels_R
    if dropped_R is not None:
        ids[:, CLASS_PLACE].masked_fill_(dropped_R.to(ids.device, non_blocking=True), NO_CLASS)
        dropped = frozenset(dropped_R.nonzero().flatten().tolist())
    return replace(blank, ids=ids, dropped=dropped, null=blank)


def with_latents(batch: Batch, latents_RNC: Tensor) -> Batch:
    """The batch with the clean latents of each row in all of its copies."""
    copies = batch.refine_latents.shape[1] // latents_RNC.shape[1]
    return replace(batch, refine_latents=latents_RNC.repeat(1, copies, 1))

"""Placeholders of joint tokens in the same pass that appends the context before them to a cache.

Legend: R batch rows, N appended positions, n placeholders, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.nn.cache import KVCache
from omni.nn.lora import Gated
from omni.sequence.mask import Fields


@dataclass(frozen=True)
class Tail:
    """n placeholders after the positions that a pass appends to a cache: they attend to it in that pass and are not
    cached.

    inputs (R, n, W): they pass through the last layers only, one layer for each of `adapters`, whose gate is 0 at
    appended positions. block, position (R,) int64: block number and rotary coordinate of the first placeholder.
    """

    inputs: Tensor
    block: Tensor
    position: Tensor
    adapters: Sequence[Gated | None]
    causal: bool

    @property
    def fields(self) -> Fields:
        """(R, n): all placeholders of a batch row are one copy of a block in the refine stream."""
        block = self.block[:, None].expand(self.inputs.shape[:2])
        step = torch.arange(block.shape[1], device=block.device).expand_as(block)
        return Fields(
            torch.zeros_like(block), block, torch.ones_like(block), step if self.causal else torch.zeros_like(block)
        )

    @property
    def positions(self) -> Tensor:
        step = torch.arange(self.inputs.shape[1], device=self.position.device)
        return (self.position[:, None] + step).unsqueeze(-1).expand(-1, -1, 3)

    def keys(self, cache: KVCache, num: int) -> Fields:
        """The fields of all used slots, after `num` appended positions and the tail."""
        own, n = self.fields, self.inputs.shape[1]
        known = cache.fields(cache.longest + num + n)
        parts = [part.clone() for part in (known.document, known.block, known.copy, known.ranks)]
        for r, length in enumerate(cache.lengths):
            at = slice(length + num, length + num + n)
            for part, value in zip(parts, (own.document, own.block, own.copy, own.ranks), strict=True):
                part[r, at] = value[r]
        return Fields(*parts)

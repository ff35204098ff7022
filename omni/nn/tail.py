"""Placeholders of joint tokens in the pass that appends the context before them to a cache.

Legend: R rows, N appended positions, n placeholders, W width.
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
    """n placeholders behind what is appended to a cache: they read it in the same pass, and nothing of them is kept.

    inputs (R, n, W), which go through the last layers alone, one for each of `adapters` (gated: zero at what is
    appended). block, position (R,) int64: the number and the rotary coordinate that the first of them has.
    """

    inputs: Tensor
    block: Tensor
    position: Tensor
    adapters: Sequence[Gated | None]
    causal: bool

    @property
    def fields(self) -> Fields:
        """(R, n) of them all: one copy of a block in the refine stream."""
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
        """Of every slot that is in use after a pass over `num` appended positions and the tail wrote theirs."""
        own, n = self.fields, self.inputs.shape[1]
        known = cache.fields(cache.longest + num + n)
        parts = [part.clone() for part in (known.document, known.block, known.copy, known.ranks)]
        for r, length in enumerate(cache.lengths):
            at = slice(length + num, length + num + n)
            for part, value in zip(parts, (own.document, own.block, own.copy, own.ranks), strict=True):
                part[r, at] = value[r]
        return Fields(*parts)

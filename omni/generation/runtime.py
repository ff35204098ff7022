"""What all turns share: the model, its tokenizer, the grammar, the pool of keys and values, latents of pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omni.document import Image, Video
from omni.generation.grammar import Grammar
from omni.generation.prefixes import Latents
from omni.model import Omni
from omni.nn.cache import Pool
from omni.text.tokenizer import ControlTokens, Tokenizer


@dataclass(frozen=True)
class Runtime:
    model: Omni
    tokenizer: Tokenizer
    grammar: Grammar
    pool: Pool
    latents: Latents

    @property
    def control(self) -> ControlTokens:
        return self.tokenizer.control

    @property
    def device(self) -> torch.device:
        return self.model.token.embedding.weight.device

    def num_positions(self, segment: Image | Video) -> int:
        """Context positions of the blocks of a medium of the prompt, before it is encoded."""
        return self.model.num_positions((segment.pixels if isinstance(segment, Image) else segment.frames).shape)

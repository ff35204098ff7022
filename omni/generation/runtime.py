"""What all turns share: the model, its tokenizer, the grammar, the pool of keys and values, latents of pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.document import Image, Video
from omni.generation.grammar import Grammar
from omni.generation.prefixes import Latents
from omni.model import Omni
from omni.nn.cache import Pool
from omni.nn.native_step import CompiledStep
from omni.text.tokenizer import ControlTokens, Tokenizer


@dataclass
class Runtime:
    """native: the native step, or None; the engine replaces it when the weights change."""

    model: Omni
    tokenizer: Tokenizer
    grammar: Grammar
    pool: Pool
    latents: Latents
    native: CompiledStep | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) of hidden states (N, W); by native code, where there is some."""
        token = self.model.token
        return token.read(hidden) if self.native is None else token.cap(self.native.read(hidden))

    @property
    def control(self) -> ControlTokens:
        return self.tokenizer.control

    @property
    def device(self) -> torch.device:
        return self.model.token.embedding.weight.device

    def num_positions(self, segment: Image | Video) -> int:
        """Context positions of the blocks of a medium of the prompt, before it is encoded."""
        return self.model.num_positions((segment.pixels if isinstance(segment, Image) else segment.frames).shape)

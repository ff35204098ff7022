"""Shared parts of the engine: a model, its tokenizer, the grammar of a turn, and the step of text decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.generation.context import append_spans
from omni.generation.grammar import Grammar
from omni.model import Omni
from omni.nn.cache import KVCache
from omni.nn.decode_step import TokenStep
from omni.sequence.layout import Span
from omni.text.tokenizer import ControlTokens, Tokenizer


@dataclass(frozen=True)
class Runtime:
    model: Omni
    tokenizer: Tokenizer
    grammar: Grammar
    step: TokenStep

    @property
    def control(self) -> ControlTokens:
        return self.tokenizer.control

    @property
    def device(self) -> torch.device:
        return self.model.token.embedding.weight.device

    def append(self, cache: KVCache, spans: Sequence[Sequence[Span]]) -> Tensor:
        """Append spans to each batch row (some may have none); returns logits (R, V) after each row's last position."""
        hidden = append_spans(self.model, cache, spans, self.control.pad)
        return self.model.token.read(hidden)

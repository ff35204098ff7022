"""The token head: embedding of ids and next-token logits, with tied weights by default.

Legend: R rows, N positions, W width, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TokenHead(nn.Module):
    """Ids (R, N) int64 -> hidden (R, N, W); hidden (..., W) -> logits (..., V)."""

    def __init__(self, vocab_size: int, width: int, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.unembedding = None if tied else nn.Linear(width, vocab_size, bias=False)

    def embed(self, ids_RN: Tensor) -> Tensor:
        return self.embedding(ids_RN)

    @property
    def output_weight(self) -> Tensor:
        """(V, W): the matrix that reads logits."""
        return self.embedding.weight if self.unembedding is None else self.unembedding.weight

    def read(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.output_weight)

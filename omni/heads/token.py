"""The token head: embedding of ids and next-token logits, with tied weights by default.

With `logit_cap` c the logits are c tanh(x / c), as in Gemma 2 (arXiv 2408.00118, section 2). They stay in (-c, c),
where float32 is more precise, and the cross-entropy cannot lower the logits of unlikely ids without bound.

Legend: R batch rows, N positions, W width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.nn.declare import EMBEDDING, Declared


class TokenHead(nn.Module):
    """Ids (R, N) int64 -> hidden (R, N, W); hidden (..., W) -> logits (..., V)."""

    def __init__(self, vocab_size: int, width: int, tied: bool = True, logit_cap: float | None = None) -> None:
        super().__init__()
        self.logit_cap = logit_cap
        self.embedding = nn.Embedding(vocab_size, width)
        self.unembedding = None if tied else nn.Linear(width, vocab_size, bias=False)

    def declare(self) -> dict[str, Declared]:
        """Keyed by name: a renamed weight starts otherwise and does not load."""
        own = {"embedding.weight": EMBEDDING}
        return own if self.unembedding is None else {**own, "unembedding.weight": EMBEDDING}

    def embed(self, ids_RN: Tensor) -> Tensor:
        """Ids (R, N) -> hidden (R, N, W)."""
        return self.embedding(ids_RN)

    @property
    def output_weight(self) -> Tensor:
        """(V, W): the matrix of the output projection."""
        return self.embedding.weight if self.unembedding is None else self.unembedding.weight

    def read(self, hidden: Tensor) -> Tensor:
        """Hidden (..., W) -> capped logits (..., V)."""
        return self.cap(F.linear(hidden, self.output_weight))

    def cap(self, logits: Tensor) -> Tensor:
        """Capped logits of plain products; computed in float32 or better, where tanh does not round to 1.

        Without gradients, an infinite product becomes NaN; its capped value would be finite and hide it.
        """
        if self.logit_cap is None:
            return logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if torch.is_grad_enabled():
            return self.logit_cap * (wide / self.logit_cap).tanh()
        return (wide / self.logit_cap).tanh_().mul_(self.logit_cap).add_(logits, alpha=0)

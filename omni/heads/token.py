"""The token head: embedding of ids and next-token logits, with tied weights by default.

With `logit_cap` c the logits are c tanh(x / c), as in Gemma 2 (arXiv 2408.00118, section 2). They stay in (-c, c),
where float32 is more precise, and the cross-entropy cannot lower the logits of unlikely ids without bound.

The last `new_rows` ids have tables of their own: control ids that a published model does not have. They can be trained
alone, while its own tables are frozen.

Legend: R batch rows, N positions, W width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.nn.declare import EMBEDDING, Declared


class TokenHead(nn.Module):
    """Ids (R, N) int64 -> hidden (R, N, W); hidden (..., W) -> logits (..., V). scale: factor of embeddings (Gemma)."""

    def __init__(
        self, vocab_size: int, width: int, tied: bool = True, logit_cap: float | None = None, scale: float = 1.0,
        new_rows: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.logit_cap, self.scale, self.num_old = logit_cap, scale, vocab_size - new_rows
        self.embedding = nn.Embedding(self.num_old, width)
        self.unembedding = None if tied else nn.Linear(width, self.num_old, bias=False)
        self.new_embedding = nn.Embedding(new_rows, width) if new_rows else None
        self.new_unembedding = nn.Linear(width, new_rows, bias=False) if new_rows and not tied else None

    def declare(self) -> dict[str, Declared]:
        """Keyed by name: a renamed weight starts otherwise and does not load."""
        return {f"{name}.weight": EMBEDDING for name, _ in self.named_children()}

    def embed(self, ids_RN: Tensor) -> Tensor:
        """Ids (R, N) -> hidden (R, N, W)."""
        if self.new_embedding is None:
            h = self.embedding(ids_RN)
        else:
            number = ids_RN - self.num_old
            old, new = self.embedding(ids_RN.clamp(max=self.num_old - 1)), self.new_embedding(number.clamp(min=0))
            h = torch.where((number >= 0).unsqueeze(-1), new, old)
        return h if self.scale == 1 else h * torch.tensor(self.scale, dtype=h.dtype, device=h.device)

    @property
    def output_tables(self) -> list[Tensor]:
        """The matrices (V, W) of the output projection, one after another."""
        if self.unembedding is None:
            pair = self.embedding, self.new_embedding
        else:
            pair = self.unembedding, self.new_unembedding
        return [table.weight for table in pair if table is not None]

    @property
    def output_weight(self) -> Tensor:
        """(V, W): the matrix of the output projection."""
        tables = self.output_tables
        return tables[0] if len(tables) == 1 else torch.cat(tables)

    def read(self, hidden: Tensor, num: int | None = None) -> Tensor:
        """Hidden (..., W) -> capped logits (..., V); of the first `num` ids alone, where it is given."""
        tables = self.output_tables
        if num is not None and num <= len(tables[0]):
            tables = [tables[0][:num]]
        logits = [F.linear(hidden, table) for table in tables]
        return self.cap(logits[0] if len(logits) == 1 else torch.cat(logits, -1))

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

"""Pooling of the context into one vector per block, which joins its condition beside the times.

Attention has to find what a prompt asks for before it can learn to draw it; a pooled vector reaches every layer of the
refine stream through the modulation from the first step on (the pooled text embedding of SD3, arXiv 2403.03206). Here
it is a mean of the context's values in some layers, with learned weights: softmax of a linear score of the values, zero
at first (arXiv 1703.03130 with one hop). Values of a language model have any size, so the mean is normalised.

Legend: R batch rows, S refine positions, K context positions, L layers, G key heads, D head width, E = L G D, I items,
W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omni.nn.cache import Memory
from omni.nn.declare import ZERO, Declared, of_linear
from omni.nn.layer import normalised
from omni.nn.runs import Run, Runs
from omni.sequence.layout import Stream
from omni.sequence.mask import dense

NORM_EPS = 1e-6


class ContextPool(nn.Module):
    """layers: whose values are pooled. size: G D of one layer. width: of the refine stream."""

    def __init__(self, layers: Sequence[int], size: int, width: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.score = nn.Linear(len(layers) * size, 1, bias=False)
        self.project = nn.Linear(len(layers) * size, width)

    def declare(self) -> dict[str, Declared]:
        """Both start at zero: a new pool is a mean that changes nothing."""
        return {**of_linear("score", self.score, ZERO), **of_linear("project", self.project, ZERO)}

    def forward(self, stream: Stream, item: Tensor | None, memory: Memory | Runs, num_items: int) -> Tensor:
        """(I, W) for the items of a pass, from the context that each one's first position sees; see
        Transformer.refine."""
        first = _first_positions(stream, item, num_items)  # (I,) flat
        if isinstance(memory, Runs):
            found = torch.cat([self.of_values(self.values_of(memory, run))[None] for run in memory.runs])
            ends = torch.tensor([run.first + run.num for run in memory.runs], device=first.device)
            pooled = found[torch.searchsorted(ends, first, right=True)]
        else:
            pooled = self.packed(stream, memory)[first]
        return self.project(normalised(pooled, NORM_EPS).to(self.project.weight.dtype))

    def values_of(self, runs: Runs, run: Run) -> Tensor:
        """(K, E): the values of the context that a run sees."""
        history = run.history
        slots = slice(history.start, history.start + (run.at if run.seen is None else run.seen))
        return runs.pool.v[list(self.layers), :, slots].permute(2, 0, 1, 3).flatten(1)

    def of_values(self, values_KE: Tensor) -> Tensor:
        """(E,): their mean, each weighted by its score; zero without context."""
        if not len(values_KE):
            return values_KE.new_zeros(values_KE.shape[1])
        values_KE = values_KE.to(self.score.weight.dtype)
        return self.score(values_KE).softmax(0).T.squeeze(0) @ values_KE

    def packed(self, stream: Stream, memory: Memory) -> Tensor:
        """(R S, E): the mean at every position of a packed refine stream."""
        values = torch.cat([memory.values[n].transpose(1, 2).flatten(2) for n in self.layers], -1)  # (R, K, E)
        values = values.to(self.score.weight.dtype)
        seen = dense(stream.fields, memory.fields)
        score = self.score(values).transpose(1, 2).masked_fill(~seen, -torch.inf)  # (R, S, K)
        weight = score.softmax(-1).nan_to_num(0.0)  # nothing is seen: zero
        return (weight.to(values.dtype) @ values).flatten(0, 1)


def _first_positions(stream: Stream, item: Tensor | None, num_items: int) -> Tensor:
    """(I,) int64: the flat index of the first position of each item. Without `item` every batch row is one."""
    R, S = stream.position.shape[:2]
    device = stream.position.device
    if item is None:
        return torch.arange(R, device=device) * S
    flat = item.flatten()
    where = torch.arange(R * S, device=device)
    first = torch.full((num_items + 1,), R * S, dtype=torch.int64, device=device)
    return first.scatter_reduce(0, torch.where(flat < 0, num_items, flat), where, "amin")[:num_items]

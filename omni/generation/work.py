"""What a request waits for: the work that steps of the engine do, for many requests in one pass.

A turn (generation.turn) is a generator. It yields events, and work; the engine sends the result of the work back:

    Read       append spans to histories     ->  the hidden states (n, W) of each, or Scores after the last
    Evaluate   F of blocks of latents        ->  F of each guidance branch, (K, N, C); or hidden states (K, N, W)
    Propose    a draft of the joint head     ->  (Draft of one row, the hidden state (W,) before it or None)
    Decode     latents to pixels             ->  uint8 pixels

Legend: V vocabulary, K guidance branches, N latents of a block, C channels, W width.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.generation.context import Append
from omni.generation.events import Event
from omni.generation.request import Request
from omni.nn.cache import History

SHORT = 64  # positions: a read up to this length is not delayed by the budget


@dataclass
class Read:
    """Append spans to histories, in as many passes as the budget of positions needs. mask: (V,), which ids may follow
    (0 or -inf); then the result is the Scores after the last append, else the hidden states (n, W) of each. number: of
    that id in the reply, from 0, for errors."""

    appends: list[Append]
    mask: Tensor | None = None
    number: int = 0


class Scores(NamedTuple):
    """values: masked logits, float32 (V,). best: the (first) id of the largest."""

    values: Tensor
    best: int


class Noisy(NamedTuple):
    """A block of latents in a pass: x (N, C) at time t, the end s of its jump (t if it does not move), its grid, and
    its first rotary position after the history. each: (t, s) of every latent, in place of t and s."""

    x: Tensor
    t: float
    s: float
    grid: tuple[int, int, int]
    start: int = 0
    each: Sequence[tuple[float, float]] | None = None

    @property
    def times(self) -> Sequence[tuple[float, float]]:
        """(t, s) of every item: of the block, or of each latent."""
        return [(self.t, self.s)] if self.each is None else self.each

    @property
    def counts(self) -> list[int]:
        """The number of latents of every item."""
        return [len(self.x)] if self.each is None else [1] * len(self.x)


@dataclass(frozen=True)
class Evaluate:
    """F(x, t, s) of blocks that read one another after each history: all of them, or with `is_causal` those before.
    betas: the guidance embedding after each history. For a model with a latent head the result is
    hidden states, `Omni.known_states`."""

    blocks: Sequence[Noisy]
    histories: Sequence[History]
    betas: Sequence[float]
    is_causal: bool = False

    @property
    def num(self) -> int:
        """Positions after one history."""
        return sum(len(block.x) for block in self.blocks)

    def __len__(self) -> int:
        return self.num * len(self.histories)


def item_tensors(
    groups: Sequence[tuple[Sequence[Noisy], Sequence[float]]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t, s, beta) of every item, float32 (I,), and the item of every position, int64 (1, N).

    groups: blocks, and the guidance embedding after each history; the blocks are repeated for every history.
    """
    times = [(*ts, beta) for blocks, betas in groups for beta in betas for block in blocks for ts in block.times]
    counts = [num for blocks, betas in groups for _ in betas for block in blocks for num in block.counts]
    t, s, beta = torch.tensor(times, dtype=torch.float32, device=device).unbind(1)
    item = torch.arange(len(times), device=device).repeat_interleave(torch.tensor(counts, device=device))
    return t, s, beta, item[None]


@dataclass(frozen=True)
class Propose:
    """A draft of the joint-token head after an append; None: recurrently, from the hidden state of the request."""

    request: Request
    append: Append | None

    @property
    def needs_log_q(self) -> bool:
        """Whether verification needs the probabilities that the draft was sampled from."""
        return self.request.options.speculative.verify in ("rejection", "block")

    @property
    def kind(self) -> tuple[bool, bool]:
        """Requests that agree in this share a draft."""
        return self.append is None, self.needs_log_q


@dataclass(frozen=True)
class Decode:
    """The blocks (t, h, w, C) of one picture or clip."""

    blocks: list[Tensor]
    is_clip: bool


Work = Read | Evaluate | Propose | Decode
Turn = Generator[Work | Event, Any, Any]

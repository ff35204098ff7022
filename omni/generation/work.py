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


@dataclass(frozen=True)
class Evaluate:
    """F(x, t, s) of blocks that read one another after each history: all of them, or with `is_causal` those before.
    betas: the guidance embedding after each history. For a model with a head of its own for each latent, the result is
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

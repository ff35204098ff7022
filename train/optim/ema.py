"""Exponential moving average of the weights, in float32, with a decay that warms up.

decay(n) = min(decay, (1 + n) / (10 + n)) after n updates, so early weights fade soon. Buffers are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """Averages of a module's named parameters. `applied()` lends them to the module for a while."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self._live = dict(module.named_parameters())
        self.averages = {name: p.detach().to(torch.float32, copy=True) for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = [p.detach().float() for p in self._live.values()]
        torch._foreach_lerp_(list(self.averages.values()), live, 1.0 - decay)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the module's parameters hold the averages; afterwards exactly what they held before."""
        kept = {name: p.detach().clone() for name, p in self._live.items()}
        try:
            self._copy(self.averages)
            yield
        finally:
            self._copy(kept)

    def load(self, averages: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Raises ValueError when names or shapes differ from the module's."""
        for name, value in self.averages.items():
            if name not in averages or averages[name].shape != value.shape:
                raise ValueError(f"the saved average of {name!r} is missing or of another shape; use the same recipe")
            value.copy_(averages[name])
        self.num_updates = num_updates

    @torch.no_grad()
    def _copy(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(values[name])

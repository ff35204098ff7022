"""What objectives share: Terms, the callables they see, keyed draws of times and noise.

Time: t = 1 is noise, t = 0 data, s <= t. x_t = (1 - t) x0 + t eps, v = eps - x0, jump x + (s - t) F.

Legend: R rows, S refine positions, C channels, I items (noisy copies of blocks).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from omni.config import Frozen, Registry
from omni.rng import Key

OBJECTIVES: Registry = Registry("objective")


@dataclass(frozen=True)
class Terms:
    """A loss as (sum, count): the trainer divides once, by the global count. `weight` multiplies it in the total."""

    sum: Tensor
    count: float
    weight: float = 1.0


class FlowCall(Protocol):
    """F(x, t, s): x (R, S, C); t, s (I,); returns (R, S, C)."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor: ...

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        """d/dh F(x + h dx, t + h dt, s + h ds) at h = 0, without a graph (for stop-gradient targets)."""
        ...


@dataclass(frozen=True)
class Items:
    """The noisy copies of a batch: clean latents and, per position, which copy it belongs to (-1 is padding)."""

    latents: Tensor  # (R, S, C)
    item: Tensor  # (R, S)
    names: Sequence[tuple[int, int, int]]  # (document, block, copy) of each item

    def expand(self, value_I: Tensor) -> Tensor:
        """(I,) -> (R, S, 1), each position with the value of its item."""
        return value_I[self.item.clamp(min=0)].unsqueeze(-1)

    @property
    def mask(self) -> Tensor:
        return self.item >= 0

    def noise(self, key: Key) -> Tensor:
        """(R, S, C) standard normal; the noise of an item depends on (key, document, block, copy) alone."""
        counts = torch.bincount(self.item[self.mask].cpu(), minlength=len(self.names)).tolist()
        channels = self.latents.shape[-1]
        parts = [key.fold("noise", *name).normal((n, channels)) for name, n in zip(self.names, counts, strict=True)]
        out = torch.zeros(self.latents.shape, dtype=torch.float32)
        if parts:
            out[self.mask.cpu()] = torch.cat(parts)  # items stand in flat order (see layout.pack)
        return out.to(self.latents.device, self.latents.dtype)


class TimeDistribution(Frozen):
    """How t is drawn: uniform, or logit-normal sigmoid(mean + std z) (SD3, arXiv 2403.03206). The copies of one block
    are stratified: their quantiles are spread evenly, from one keyed offset."""

    kind: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def draw(self, items: Items, key: Key, purpose: str) -> Tensor:
        """(I,) float32 in (0, 1), each depending on (key, document, block, copy) alone."""
        copies = 1 + max((copy for _, _, copy in items.names), default=0)
        offsets = {}
        values = []
        for document, block, copy in items.names:
            at = (document, block)
            if at not in offsets:
                offsets[at] = key.fold(purpose, *at).python().random()
            values.append((offsets[at] + copy / copies) % 1.0)
        u = torch.tensor(values, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        t = u if self.kind == "uniform" else torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return t.float().to(items.latents.device)


class Objective(Frozen, ABC):
    """An objective with its options. `kind` says what it reads: token logits or flow items."""

    weight: float = 1.0

    @property
    @abstractmethod
    def kind(self) -> Literal["token", "flow"]: ...


@dataclass(frozen=True)
class Draw:
    """Noisy inputs and the pieces of the target: x_t, v (R, S, C), times t, s (I,)."""

    x: Tensor
    v: Tensor
    t: Tensor
    s: Tensor
    items: Items


class FlowObjective(Objective):
    """An objective on latent blocks: `draw` makes noisy inputs, `loss` compares the callable with its target."""

    time: TimeDistribution = TimeDistribution()

    @property
    def kind(self) -> Literal["token", "flow"]:
        return "flow"

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        """(t, s), each (I,). The base class trains the diagonal s = t."""
        t = self.time.draw(items, key, "time")
        return t, t

    def draw(self, items: Items, key: Key) -> Draw:
        t, s = self.times(items, key)
        noise = items.noise(key)
        tt = items.expand(t)
        return Draw((1 - tt) * items.latents + tt * noise, noise - items.latents, t, s, items)

    @abstractmethod
    def loss(self, call: FlowCall, draw: Draw) -> Terms: ...


def build_objective(name: str, **options: Any) -> Objective:
    """The objective registered as `name`, with its options validated. Raises ValueError with the nearest known name."""
    return OBJECTIVES.get(name)(**options)


def squared_error(prediction: Tensor, target: Tensor, items: Items, weight: float) -> Terms:
    """Sum over latents of the channel-mean squared error, in float32; the count is the number of latents."""
    error = (prediction.float() - target.float()).pow(2).mean(-1)
    return Terms((error * items.mask).sum(), float(items.mask.sum()), weight)

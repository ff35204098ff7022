"""Low-rank adapters at placeholders of tokens only: LoRA (arXiv 2106.09685), gated as in arXiv 2507.11851.

Every projection y = W x of a layer is y + B A x at placeholders and y at all other positions: adding a joint-token head
changes no bit at other positions. B starts at zero.

Legend: R batch rows, S positions, W width, H query heads, G key heads, D head width, M width of the MLP, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omni.nn.declare import FAN_IN, ZERO, Declared, declarations
from omni.rng import Key

# Projections of a layer, in the order of `sizes`; names of stored weights: never change them.
PARTS = ("qkv", "out", "gate_up", "down")


class LowRank(nn.Module):
    """x (..., in) -> B A x (..., out). B starts at zero, so a new adapter changes nothing."""

    def __init__(self, size_in: int, size_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(size_in, rank, bias=False)
        self.up = nn.Linear(rank, size_out, bias=False)

    def declare(self) -> dict[str, Declared]:
        return {"down.weight": FAN_IN, "up.weight": ZERO}

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class LayerAdapter(nn.Module):
    """The low-rank terms of the four projections of one layer, by name."""

    def __init__(self, sizes: Sequence[tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: LowRank(*size, rank) for name, size in zip(PARTS, sizes, strict=True)})


@dataclass(frozen=True)
class Gated:
    """A layer's adapter in one pass. `gate` (R, S, 1): 1 at placeholders, 0 at clean tokens; None: 1 everywhere."""

    adapter: LayerAdapter
    gate: Tensor | None

    def at(self, where: Tensor) -> Gated:
        """The adapter in a pass over the positions where (R, S) is True alone."""
        gate = self.gate
        return self if gate is None else Gated(self.adapter, gate.expand(*where.shape, 1)[where])

    def __call__(self, part: str, x: Tensor) -> Tensor:
        """The term (..., out) to add to the projection `part` of x (..., in), whose positions are those of the gate."""
        y = self.adapter.parts[part](x)
        return y if self.gate is None else y * self.gate.to(y.dtype)


class Adapters(nn.Module):
    """One LayerAdapter for every layer that placeholders pass through."""

    def __init__(self, depth: int, sizes: Sequence[tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LayerAdapter(sizes, rank) for _ in range(depth))

    def gated(self, gate: Tensor | None) -> list[Gated]:
        """The adapters of the layers, each with `gate` (R, S, 1)."""
        return [Gated(layer, gate) for layer in self.layers]  # type: ignore[arg-type]


@torch.no_grad()
def initialise_adapters(adapters: Adapters, key: Key) -> None:
    """A normal with deviation 1/sqrt(fan in), keyed by name; B zero."""
    declared = declarations(adapters)
    for name, parameter in adapters.named_parameters():
        if declared[name] == ZERO:
            parameter.zero_()
        else:
            parameter.copy_(key.fold("adapter", name).normal(tuple(parameter.shape)) / math.sqrt(parameter.shape[1]))

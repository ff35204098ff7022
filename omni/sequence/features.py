"""Features of a picture encoder in the layout: of one picture, as a span, and at the positions of a pass.

Legend: N positions of one picture, F positions of features in a pass, E features of a position, h, w rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureBlock:
    """What an encoder makes of one picture, behind its latents in the list of its blocks (Omni.encode_media).

    values: (1, h, w, E) float. alone: the context holds these in place of the latents. sides: rows and columns in the
    picture's header, as of its latents. pixels: uint8 (H, W, 3) in the encoder's size, for a model that computes the
    features itself, of which `values` has E = 0.
    """

    values: Tensor
    alone: bool
    sides: tuple[int, int]
    pixels: Tensor | None = None

    @classmethod
    def of_pixels(cls, pixels: Tensor, grid: tuple[int, int], alone: bool, sides: tuple[int, int]) -> Self:
        """Of a picture uint8 (H, W, 3) in the encoder's size, whose features have `grid` rows and columns."""
        return cls(torch.zeros(1, *grid, 0), alone, sides, pixels)

    @property
    def num_bytes(self) -> int:
        return self.values.numel() * self.values.element_size() + (0 if self.pixels is None else self.pixels.numel())

    def clone(self) -> FeatureBlock:
        return replace(self, values=self.values.clone())


Blocks = list[Tensor | FeatureBlock]
"""Of one picture or clip: latents (t, h, w, C), one block of a picture, one per chunk of a clip; then features."""


def split_blocks(blocks: Blocks) -> tuple[list[Tensor], FeatureBlock | None]:
    """The latents of one picture or clip, and its features; None without them. ValueError for several features."""
    features = [one for one in blocks if isinstance(one, FeatureBlock)]
    if len(features) > 1:
        raise ValueError(f"a picture has {len(features)} blocks of features; give at most one")
    return [one for one in blocks if isinstance(one, Tensor)], features[0] if features else None


@dataclass(frozen=True, eq=False)
class FeatureSpan:
    """One block of features of a picture: (N, E) float, N = h*w in row-major order of `grid` (1, h, w). In the context
    alone, with the text weights, and never supervised. pixels: as of FeatureBlock."""

    features: Tensor
    grid: tuple[int, int, int]
    pixels: Tensor | None = None

    def __post_init__(self) -> None:
        t, h, w = self.grid
        if t != 1 or self.features.ndim != 2 or self.features.shape[0] != h * w:
            raise ValueError(f"a grid {self.grid} needs (h*w, E) features and t = 1, got {tuple(self.features.shape)}")

    @property
    def places(self) -> list[tuple[int, int]]:
        """(row, column) of every position."""
        _, h, w = self.grid
        return [(row, column) for row in range(h) for column in range(w)]


@dataclass(frozen=True)
class Features:
    """The F positions of features in R batch rows of T context positions. values: (F, E) float32. place: (F, 2) int64,
    their (row, column) in the picture. at: (F,) int64, their flat indices r*T + t, ascending. pictures: uint8 (H, W, 3)
    each, in the order of `at`: where there are any, the model computes the features, and E = 0 in `values`."""

    values: Tensor
    place: Tensor
    at: Tensor
    pictures: tuple[Tensor, ...] = ()

    def to(self, device: torch.device | str) -> Features:
        """Pictures stay where they are: an encoder begins with them on the CPU."""
        return Features(self.values.to(device), self.place.to(device), self.at.to(device), self.pictures)

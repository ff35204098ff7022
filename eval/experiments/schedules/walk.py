"""A walk on a circle, as documents of pictures: data whose distributions given any past are known.

A picture is one latent of two channels, a point at distance sqrt(2) from the origin, so that each channel has variance
1. Its angle is that of the picture before it plus a step of N(mean, std^2); the first angle is uniform. A model that
reads a past of its own adds up the errors of its steps, and reads points off the circle, which no data has.

Two distances of picture n from the truth, over the radius: the sliced 2-Wasserstein distance between the pictures,
turned back by an angle, and the exact distribution of what is left, by its quantiles.

    next   turned by the angle of the picture that it follows: one step
    far    turned by that of the document's first picture: n - 1 steps

Legend: D documents, P pictures of one, K directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from omni.rng import Key
from omni.sequence.layout import Batch, LatentSpan, Span, TokenSpan, lay_rows

RADIUS = math.sqrt(2)
DIRECTIONS = 16
START, PAD = 0, 1  # the id before each picture; padding


@dataclass(frozen=True)
class CircleWalk:
    """num_pictures in a document; mean and std of a step, in radians. ValueError for fewer than 2 pictures, or std not
    above 0."""

    num_pictures: int = 8
    mean: float = 0.8
    std: float = 0.3

    def __post_init__(self) -> None:
        if self.num_pictures < 2 or self.std <= 0:
            raise ValueError(f"a walk has 2 pictures or more and a std above 0, got {self.num_pictures} and {self.std}")

    def sample(self, key: Key, num: int) -> Tensor:
        """(D, P, 2) float32: the pictures of `num` documents."""
        steps = self.mean + self.std * key.fold("steps").normal((num, self.num_pictures), torch.float64)
        steps[:, 0] = 2 * math.pi * key.fold("start").uniform((num,), torch.float64)
        return points(steps.cumsum(1)).float()

    @cached_property
    def _layouts(self) -> dict[int, Batch]:
        """Batches by their number of documents, all latents 0."""
        return {}

    def batch(self, pictures_DPC: Tensor, first: int = 0) -> Batch:
        """One document in each row, named from `first` on: an id, a picture, an id, ...; all pictures supervised."""
        num = len(pictures_DPC)
        if num not in self._layouts:
            one: list[Span] = [TokenSpan([START], [False]), LatentSpan(torch.zeros(1, 2), (1, 1, 1), True)]
            spans = [one * self.num_pictures] * num
            self._layouts[num] = lay_rows(spans, channels=2, pad_id=PAD, copies=1, uids=range(num))
        empty = self._layouts[num]
        latents = empty.latents.clone()
        latents[empty.is_latent] = pictures_DPC[:, :-1].flatten(0, 1)
        return replace(
            empty,
            latents=latents,
            refine_latents=pictures_DPC,
            item_names=tuple((first + document, block, copy) for document, block, copy in empty.item_names),
            documents=tuple(first + document for document in empty.documents),
        )

    def distances(self, pictures_DPC: Tensor, past_DPC: Tensor) -> tuple[Tensor, Tensor]:
        """(next, far), each (P - 1,) float64, of the pictures from the second on; picture n has read past[:, :n]."""
        found, past = pictures_DPC.double(), past_DPC.double()
        angle = torch.atan2(past[..., 1], past[..., 0])
        ns = range(1, self.num_pictures)
        near = [self.distance(turn(found[:, n], -angle[:, n - 1]), 1) for n in ns]
        far = [self.distance(turn(found[:, n], -angle[:, 0]), n) for n in ns]
        return torch.stack(near), torch.stack(far)

    def distance(self, pictures_DC: Tensor, num_steps: int) -> Tensor:
        """The distance of points (D, 2) from the exact distribution after `num_steps` from angle 0."""
        place = (torch.arange(len(pictures_DC), dtype=torch.float64) + 0.5) / len(pictures_DC)
        angle = num_steps * self.mean + num_steps**0.5 * self.std * torch.special.ndtri(place)
        directions = points(math.pi * torch.arange(DIRECTIONS, dtype=torch.float64) / DIRECTIONS) / RADIUS
        one, two = ((each @ directions.T).sort(0).values for each in (pictures_DC.double(), points(angle)))
        return (one - two).square().mean().sqrt() / RADIUS


def points(angle: Tensor) -> Tensor:
    """(...) -> (..., 2): points of the circle."""
    return RADIUS * torch.stack([angle.cos(), angle.sin()], -1)


def turn(points_DC: Tensor, angle_D: Tensor) -> Tensor:
    """Each point (D, 2), turned by its angle."""
    (x, y), c, s = points_DC.unbind(-1), angle_D.cos(), angle_D.sin()
    return torch.stack([c * x - s * y, s * x + c * y], -1)

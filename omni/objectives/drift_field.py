"""The drift V of generative drifting (arXiv 2602.04770): attraction to data minus repulsion from generated particles.

    joint   A = sqrt(max(softmax over targets * softmax over particles, min_affinity)) of logits -d / tau, times the
            target's weight;  V = sum_+ A_+ (y_+ - x) * sum A_-  -  sum_- A_- (y_- - x) * sum A_+        (released code)
    row     V = sum_+ k (y_+ - x) / sum_+ k  -  sum_- k (y_- - x) / sum_- k,  k = weight exp(-d / tau)      (the paper)

Both change sign if positives and negatives are swapped. So V = 0 in expectation if both have one distribution; the
converse need not hold. Nothing here has a graph.

Legend: G groups, M particles, T targets (K negatives, then P positives), D numbers in a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omni.objectives.kernels import pairwise_distance

SELF_DISTANCE = 100.0  # mean distances, added to the distance of a particle to itself

Affinity = Literal["joint", "row"]


@dataclass(frozen=True)
class Targets:
    """The targets of the particles: vectors (G, T, D), negatives first; weight (G, T); own: each particle's own
    targets."""

    vectors: Tensor
    num_negatives: int
    weight: Tensor
    own: Tensor  # (M, T) bool: the particle itself, and targets from the same x0

    def swapped(self) -> Targets:
        """Positives and negatives swapped."""
        k = self.num_negatives
        vectors, weight, own = (
            torch.cat([value.narrow(dim, k, value.shape[dim] - k), value.narrow(dim, 0, k)], dim)
            for value, dim in ((self.vectors, 1), (self.weight, 1), (self.own, 1))
        )
        return Targets(vectors, self.vectors.shape[1] - k, weight, own)


def distances(x_GMD: Tensor, targets: Targets, *, per_group: bool) -> tuple[Tensor, Tensor]:
    """(G, M, T) from particles to targets, with FAR added for a particle's own; and the weighted mean before that, over
    each group (G, 1, 1) or over all (1, 1, 1)."""
    found = pairwise_distance(x_GMD, targets.vectors)
    dims = (1, 2) if per_group else (0, 1, 2)
    weight = targets.weight[:, None].expand_as(found)
    mean = ((found * weight).mean(dims, keepdim=True) / weight.mean(dims, keepdim=True)).clamp(min=1e-3)
    return found + SELF_DISTANCE * mean * targets.own, mean


def drift(x_GMD: Tensor, targets: Targets, cost_GMT: Tensor, affinity: Affinity, min_affinity: float) -> Tensor:
    """V (G, M, D) of particles x at one temperature; `cost`: distance / tau."""
    coefficients = joint_coefficients if affinity == "joint" else row_coefficients
    signed_GMT = coefficients(cost_GMT, targets.weight, targets.num_negatives, min_affinity)
    return signed_GMT @ targets.vectors - signed_GMT.sum(-1, keepdim=True) * x_GMD


def joint_coefficients(cost_GMT: Tensor, weight_GT: Tensor, num_negatives: int, min_affinity: float) -> Tensor:
    """(G, M, T): the factor of y - x for each target y, negative for negatives."""
    both = cost_GMT.neg().softmax(-1) * cost_GMT.neg().softmax(-2)
    affinity = both.clamp(min=min_affinity).sqrt() * weight_GT[:, None]
    negative, positive = affinity[..., :num_negatives], affinity[..., num_negatives:]
    return torch.cat([-negative * positive.sum(-1, keepdim=True), positive * negative.sum(-1, keepdim=True)], -1)


def row_coefficients(cost_GMT: Tensor, weight_GT: Tensor, num_negatives: int, min_affinity: float) -> Tensor:
    """The same for the paper's field, in which each side has mass 1; `min_affinity` is not used."""
    logits = weight_GT.log()[:, None] - cost_GMT
    negative, positive = logits[..., :num_negatives].softmax(-1), logits[..., num_negatives:].softmax(-1)
    return torch.cat([-negative, positive], -1)

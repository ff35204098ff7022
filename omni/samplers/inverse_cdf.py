"""Inverse-CDF samples: from a uniform to an id and back, in the order of ids. All sampling of ids uses this.

The order is fixed, so similar distributions map a uniform to similar ids. A head can learn the map from noise to ids
(heads.joint.push_forward), and samples of two distributions with one uniform often agree (samplers.verification).

Legend: V vocabulary.
The order of ids is the map from noise to ids that heads learn: never change it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_cdf_sample(log_p: Tensor, u: Tensor) -> Tensor:
    """The inverse-CDF sample at u: min{v : F(v) > u}, F the cumulative distribution in the order of ids.

    log_p (..., V), normalised or not; u (...) in [0, 1) -> (...) int64. Computed in float64; rounding never gives an id
    of probability zero.
    """
    p = log_p.double().softmax(-1)
    cumulative = p.cumsum(-1)
    found = (cumulative <= (u.double() * cumulative[..., -1]).unsqueeze(-1)).sum(-1)
    last = p.shape[-1] - 1 - (p.flip(-1) > 0).to(torch.int8).argmax(-1)
    return torch.minimum(found, last)


def uniform_interval(log_p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, width) of the uniforms that `inverse_cdf_sample` maps to ids: u in [lower, lower + width). Both have the
    shape of ids, float64."""
    p = log_p.double().softmax(-1)
    cumulative = p.cumsum(-1)
    upper = cumulative.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    lower = cumulative.gather(-1, (ids - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    lower = torch.where(ids > 0, lower, 0.0)
    total = cumulative[..., -1]
    return lower / total, (upper - lower) / total

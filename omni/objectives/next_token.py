"""Next token: cross-entropy at the supervised positions of the context stream, and a z-loss on the scale of the
logits."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from omni.objectives.base import OBJECTIVES, Objective, Terms


@OBJECTIVES.register("next_token")
class NextToken(Objective):
    """Sum of -log p(next id) + z_loss log(Z)^2, count = number of supervised ids; Z is the sum of exponentiated logits.

    z_loss: 1e-4 in PaLM (arXiv 2204.02311, section 5). It moves Z to 1, so that the level of the logits, which the
    cross-entropy does not fix, does not drift; at its minimum p is unchanged. Likely ids then have logits near 0, and
    the many unlikely ones far below.
    """

    reads = "logits"
    z_loss: float = Field(default=0.0, ge=0)

    def loss(self, logits_NV: Tensor, target_N: Tensor) -> Terms:
        """logits (N, V) of the supervised positions, target (N,) int64."""
        logits_NV = logits_NV.float()
        total, entropy = F.cross_entropy(logits_NV, target_N, reduction="sum"), None
        if self.z_loss:
            total, entropy = total + self.z_loss * logits_NV.logsumexp(-1).square().sum(), total.detach()
        return Terms(total, float(target_N.numel()), self.weight, entropy)

"""Next token: cross-entropy at the supervised positions of the context stream."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from omni.objectives.base import OBJECTIVES, Objective, Terms


@OBJECTIVES.register("next_token")
class NextToken(Objective):
    """Sum of -log p(next id), count = number of supervised ids."""

    @property
    def kind(self) -> Literal["token", "flow"]:
        return "token"

    def loss(self, logits_NV: Tensor, target_N: Tensor) -> Terms:
        """logits (N, V) of the supervised positions, target (N,) int64."""
        total = F.cross_entropy(logits_NV.float(), target_N, reduction="sum")
        return Terms(total, float(target_N.numel()), self.weight)

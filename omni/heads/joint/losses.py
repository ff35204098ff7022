"""The loss of every token of blocks of tokens, which joint-token heads share.

Legend: B blocks of tokens, K tokens of a block, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from omni.heads.joint.base import LossInputs

Target = Literal["ids", "teacher"]


def token_losses(logits: Tensor, inputs: LossInputs, target: Target, at: int = 0) -> Tensor:
    """(B, K - at): cross-entropy of logits (B, K - at, V) of the tokens from number `at` on, in float32 or better, to
    the ids, or to the probabilities of the model's own autoregressive pass ("teacher"). Both have one optimum for text
    of the model itself; the second has less variance. For other text the second is nearer to what verification
    accepts."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if target == "teacher":
        return -(inputs.teacher[:, at:].exp().to(wide.dtype) * wide.log_softmax(-1)).sum(-1)
    ids = inputs.blocks.ids[:, at:]
    return cross_entropy(wide.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)

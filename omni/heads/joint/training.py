"""The loss of a joint-token head, on blocks of tokens of a packed batch (heads.joint.base.JointCall in training).

Legend: R batch rows, T context positions, B blocks of tokens, K tokens of a block, n positions of a pass, V vocabulary,
W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni.heads.joint.backbone import Backbone, Reads, draft_pass, head_of
from omni.heads.joint.base import LossInputs
from omni.nn.cache import Memory
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.sequence.layout import Batch
from omni.sequence.placeholders import Blocks, Starts, choose_blocks


@dataclass
class BatchCall(Reads):
    """Blocks of tokens of a packed batch, after its context pass: hidden (R, T, W) and memory."""

    model: Backbone
    starts: Starts
    hidden: Tensor
    memory: Memory
    frozen: bool = False
    passes: int = 0

    @property
    def start(self) -> Tensor:
        """(B, W): hidden states at the starts."""
        return self.hidden[self.starts.row, self.starts.at]

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        self.passes += 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = draft_pass(self.model, inputs, self.starts, self.memory, causal, clean)
            return torch.cat([self.start.unsqueeze(1).to(found.dtype), found], 1)

    def target(self) -> BatchCall:
        return BatchCall(self.model, self.starts, self.hidden.detach(), self.memory.detach(), frozen=True)


def joint_loss(
    model: Backbone, batch: Batch, hidden: Tensor, memory: Memory, per_row: int, key: Key, progress: float = 1.0
) -> dict[str, Terms]:
    """The loss terms of the model's joint-token head on random blocks of a packed batch, by name."""
    joint = head_of(model)
    starts, blocks = choose_blocks(batch, joint.head.length, per_row, key)
    blocks = within(blocks, joint.c.vocabulary)
    call = BatchCall(model, starts, hidden, memory)
    teacher = hidden.new_zeros(0)
    if joint.head.needs_teacher:
        own, dtype = joint.head.inverts_noise, torch.float64 if joint.head.inverts_noise else torch.float32
        teacher = teacher_log_probs(model, hidden, starts, blocks, joint.c.vocabulary, dtype, rest=own)
    return joint.head.loss(call, LossInputs(blocks, teacher, key, progress))


def within(blocks: Blocks, num: int | None) -> Blocks:
    """Blocks that end before their first id outside of the first `num` ids, which the head does not draft; None: all
    ids. So a token counts if those before it could be drafted."""
    if num is None:
        return blocks
    valid = (blocks.valid & (blocks.ids < num)).long().cumprod(-1).bool()
    return replace(blocks, ids=torch.where(valid, blocks.ids, 0), valid=valid)


@torch.no_grad()
def teacher_log_probs(
    model: Backbone, hidden: Tensor, starts: Starts, blocks: Blocks, num: int | None = None,
    dtype: torch.dtype = torch.float64, rest: bool = False,
) -> Tensor:  # fmt: skip
    """(B, K, V) in `dtype` or better: log P(x_k | c, x_<k) of the autoregressive pass, from its hidden states (R, T,
    W); given that the id is one of the first `num`, where that is given. rest: instead the probabilities of the first
    `num` ids, and of all others together: (B, K, num + 1). Undefined past the end of a block."""
    K, row = blocks.ids.shape[1], starts.row[:, None]
    at = (starts.at[:, None] + torch.arange(K, device=hidden.device)).clamp(max=hidden.shape[1] - 1)

    def log_probs(states: Tensor) -> Tensor:
        logits = model.token.read(states, None if rest else num)
        logits = logits.to(torch.promote_types(logits.dtype, dtype))
        if not rest or num is None or num >= logits.shape[-1]:
            return logits.log_softmax(-1)
        parts = torch.cat([logits[..., :num], logits[..., num:].logsumexp(-1, keepdim=True)], -1)
        return parts.log_softmax(-1)

    if at.numel() > hidden[..., 0].numel():  # blocks overlap: every position once
        return log_probs(hidden)[row, at]
    return log_probs(hidden[row, at])

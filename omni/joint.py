"""The backbone as a joint-token head sees it (heads.joint.base.JointCall) in training; behind a cache: drafting.

Legend: R rows, T context positions, B blocks, K tokens of a block, n positions of a pass, V vocabulary, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omni.heads.joint import JointTokens, Lesson
from omni.nn.cache import Memory
from omni.nn.lora import Gated
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.sequence.layout import Batch
from omni.sequence.placeholders import Blocks, Starts, block_stream, choose_blocks

if TYPE_CHECKING:
    from omni.model import Omni


class Reads:
    """What all calls share."""

    model: Omni

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.token.embed(ids)

    def read(self, hidden: Tensor) -> Tensor:
        return self.model.token.read(hidden)


@dataclass
class BatchCall(Reads):
    """Blocks beside a packed batch, whose context pass has been made: hidden (R, T, W) and memory."""

    model: Omni
    starts: Starts
    hidden: Tensor
    memory: Memory
    frozen: bool = False
    passes: int = 0

    @property
    def start(self) -> Tensor:
        return self.hidden[self.starts.row, self.starts.at]

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        self.passes += 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = draft_pass(self.model, inputs, self.starts, self.memory, causal, clean)
            return torch.cat([self.start.unsqueeze(1).to(found.dtype), found], 1)

    def target(self) -> BatchCall:
        return BatchCall(self.model, self.starts, self.hidden.detach(), self.memory.detach(), frozen=True)


def joint_loss(
    model: Omni, batch: Batch, hidden: Tensor, memory: Memory, per_row: int, key: Key, progress: float = 1.0
) -> dict[str, Terms]:
    """The loss of the model's joint-token head on random blocks of a packed batch, by name."""
    joint = head_of(model)
    starts, blocks = choose_blocks(batch, joint.head.length, per_row, key)
    call = BatchCall(model, starts, hidden, memory)
    teacher = teacher_laws(model, hidden, starts, blocks) if joint.head.needs_teacher else hidden.new_zeros(0)
    return joint.head.loss(call, Lesson(blocks, teacher, key, progress))


@torch.no_grad()
def teacher_laws(model: Omni, hidden: Tensor, starts: Starts, blocks: Blocks) -> Tensor:
    """(B, K, V) float64: log P(x_k | c, x_<k) of the autoregressive pass itself, whose hidden states (R, T, W) are
    given. Past the end of a block the values mean nothing."""
    K = blocks.ids.shape[1]
    at = (starts.at[:, None] + torch.arange(K, device=hidden.device)).clamp(max=hidden.shape[1] - 1)
    logits = model.token.read(hidden[starts.row[:, None], at])
    return logits.double().log_softmax(-1)


def draft_pass(model: Omni, inputs: Tensor, starts: Starts, memory: Memory, causal: bool, clean: int) -> Tensor:
    """One pass over blocks (B, n, W), the first `clean` inputs of each clean tokens; (B, n, W).

    Placeholders go through the last layers alone (JointConfig.depth), clean tokens through the others before."""
    joint = head_of(model)
    top = range(model.config.transformer.depth - joint.depth, model.config.transformer.depth)
    if clean and top.start:
        below = _layers(model, inputs[:, :clean], starts, memory, True, clean, range(top.start))
        inputs = torch.cat([below, inputs[:, clean:].to(below.dtype)], 1)
    return _layers(model, inputs, starts, memory, causal, clean, top)


def _layers(
    model: Omni, inputs: Tensor, starts: Starts, memory: Memory, causal: bool, clean: int, layers: range
) -> Tensor:
    """Some layers of `draft_pass`."""
    B, n, W = inputs.shape
    per_row, adapters = starts.per_row, head_of(model).adapters
    gated: list[Gated | None] = [None] * len(layers)
    if adapters is not None and clean < n:
        gate = None
        if clean:
            at = torch.arange(n, device=inputs.device) >= clean
            gate = at.to(inputs.dtype).repeat(per_row)[None, :, None]
        gated = [*adapters.gated(gate)]
    h = inputs.reshape(B // per_row, per_row * n, W)
    stream = block_stream(starts, n, causal, clean)
    return model.transformer.draft(h, stream, memory, gated, layers).reshape(B, n, W)


def head_of(model: Omni) -> JointTokens:
    if model.joint is None:
        raise ValueError(
            'this model has no joint-token head; train one with heads.joint = {head = "push_forward"} and the '
            'objective "joint_tokens", or take tokens_per_pass = 1'
        )
    return model.joint

"""The sequential head: one pass of the backbone, then a small recurrent block, K steps of it. The strong baseline.

    s_0 = start        s_k = block(M [norm(s_(k-1)); norm(embed(x_k))])        q(x_(k+1) | x_<=k) = read(norm(s_k))

The first law is the model's own next-token law; the block has one set of weights for all steps and is trained at the
depth at which it draws (multi-token prediction of DeepSeek-V3, arXiv 2412.19437; EAGLE, arXiv 2401.15077). By the chain
rule any joint can be had, capacity permitting; likelihood and conditionals are exact. It is not parallel in K.

Legend: B blocks, K tokens, m <= K of them, V vocabulary, W width, M hidden width of the block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from omni.config import Frozen
from omni.heads.joint.base import JOINT_HEADS, Choose, Draft, JointCall, JointHead, Lesson, LogProb
from omni.nn.transformer import RMSNorm
from omni.pick import pick
from omni.rng import Key
from omni.terms import Terms


class SequentialConfig(Frozen):
    """expansion: M / W of the block's gated MLP. norm_eps: of its norms."""

    expansion: int = Field(default=4, ge=1, le=16)
    norm_eps: float = Field(default=1e-6, gt=0)


class Step(nn.Module):
    """(s_(k-1), embed(x_k)), each (B, W) -> s_k (B, W): M [norm; norm], then a residual gated MLP."""

    def __init__(self, width: int, expansion: int, eps: float) -> None:
        super().__init__()
        self.state_norm, self.token_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.merge = nn.Linear(2 * width, width, bias=False)
        self.mlp_norm = RMSNorm(width, eps)
        self.gate_up = nn.Linear(width, 2 * expansion * width, bias=False)
        self.down = nn.Linear(expansion * width, width, bias=False)

    def forward(self, state: Tensor, token: Tensor) -> Tensor:
        state = _linear(self.merge, torch.cat([self.state_norm(state), self.token_norm(token)], -1))
        gate, up = _linear(self.gate_up, self.mlp_norm(state)).chunk(2, -1)
        return state + _linear(self.down, F.silu(gate) * up)


@JOINT_HEADS.register("sequential")
class Sequential(JointHead):
    exact, universal, conditional, carries_on = True, True, True, True
    Config = SequentialConfig

    def __init__(self, config: SequentialConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.step = Step(width, config.expansion, config.norm_eps)
        self.norm = RMSNorm(width, config.norm_eps)

    def run(self, call: JointCall, num: int, choose: Choose, said: Tensor | None = None) -> Tensor:
        """`num` ids (B, num) after the ids `said` (B, m) that follow the start, each chosen from its logits."""
        state, ids = call.start, [] if said is None else [*said.unbind(1)]
        given = len(ids)
        for k in range(given + num):
            if k:
                state = self.step(state, call.embed(ids[k - 1]).to(state.dtype))
            if k >= given:
                ids.append(choose(k - given, call.read(self.norm(state) if k else state)))
        return torch.stack(ids[given:], 1)

    def laws(self, call: JointCall, num: int, choose: Choose) -> tuple[Tensor, Tensor]:
        """ids (B, num) and log q(. | x_<k) (B, num, V) float64, where `choose` takes k and such a law to ids (B,)."""
        found: list[Tensor] = []

        def chosen(k: int, logits: Tensor) -> Tensor:
            found.append(logits.double().log_softmax(-1))
            return choose(k, found[k])

        return self.run(call, num, chosen), torch.stack(found, 1)

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """Token k is pick(q(. | x_<k), u_k). Fewer uniforms than K draw the first tokens alone."""
        num = self.fits(uniforms)
        self.check_passes(passes, num)
        ids, log_q = self.laws(call, num, lambda k, law: pick(law, uniforms[:, k]))
        return Draft(ids, log_q, num)

    def carry_on(self, call: JointCall, said: Tensor, num: int, choose: Choose) -> Tensor:
        if num < 1 or said.shape[1] + num > self.length:
            raise ValueError(
                f"this head goes {self.length} tokens past a hidden state, not {num} after {said.shape[1]}; take fewer"
            )
        return self.run(call, num, choose, said)

    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        """Of ids (B, m), m <= K: a shorter block has the exact marginal of its tokens."""
        found = self.conditionals(call, ids).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return LogProb(found.sum(-1), "exact")

    def conditionals(self, call: JointCall, ids: Tensor) -> Tensor:
        return self.laws(call, self.fits(ids), lambda k, _: ids[:, k])[1]

    def loss(self, call: JointCall, lesson: Lesson) -> dict[str, Terms]:
        """Cross-entropy of the valid prefix, in nats per token."""
        blocks = lesson.blocks
        found = self.conditionals(call, blocks.ids).gather(-1, blocks.ids.unsqueeze(-1)).squeeze(-1)
        dtype = torch.promote_types(call.start.dtype, torch.float32)
        return {"sequential": Terms(-(found * blocks.valid).sum().to(dtype), blocks.count)}


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype))

"""The sequential head: one pass of the backbone, then a small recurrent block, K steps of it. The strong baseline.

    s_0 = start        s_k = block(M [norm(s_(k-1)); norm(embed(x_k))])        q(x_(k+1) | x_<=k) = read(norm(s_k))

The first distribution is the model's own next-token distribution. The recurrent block has one set of weights for all
steps and is trained at the depth at which it samples (multi-token prediction of DeepSeek-V3, arXiv 2412.19437; EAGLE,
arXiv 2401.15077). By the chain rule it represents any joint, given capacity. Likelihood and conditionals are exact. It
is not parallel in K.

Legend: B blocks of tokens, K tokens, m <= K of them, V vocabulary, W width, M hidden width of the recurrent block.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from omni.config import Frozen
from omni.heads.joint.base import JOINT_HEADS, Draft, JointCall, JointHead, LogProb, LossInputs
from omni.heads.joint.losses import Target, token_losses
from omni.nn.transformer import RMSNorm
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample


class SequentialConfig(Frozen):
    """expansion: M / W of the gated MLP. norm_eps: of all norms. target: see `losses.token_losses`."""

    expansion: int = Field(default=4, ge=1, le=16)
    norm_eps: float = Field(default=1e-6, gt=0)
    target: Target = "ids"


class RecurrentBlock(nn.Module):
    """The recurrent block: (s_(k-1), embed(x_k)), each (B, W) -> s_k (B, W): M [norm; norm], then a residual gated
    MLP."""

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
    """One pass of the backbone, then the recurrent block for every token."""

    exact, universal, conditional, is_recurrent = True, True, True, True
    Config = SequentialConfig

    def __init__(self, config: SequentialConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.step = RecurrentBlock(width, config.expansion, config.norm_eps)
        self.norm = RMSNorm(width, config.norm_eps)
        self.needs_teacher = config.target == "teacher"

    def walk(self, call: JointCall, emitted: Tensor | None = None) -> Generator[Tensor, Tensor, None]:
        """Yields logits (B, V) of the next id repeatedly; receives ids (B,); the first ids are `emitted` (B, m)."""
        state = call.start
        ids = iter(() if emitted is None else emitted.unbind(1))
        for k in range(self.length):
            last = next(ids, None)
            if last is None:
                last = yield call.read(self.norm(state) if k else state)
            if k + 1 < self.length:
                state = self.step(state, call.embed(last).to(state.dtype))

    def run(self, call: JointCall, num: int, choose: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Choose tokens left to right: ids (B, num) and log q(. | x_<k) (B, num, V). `choose` maps k and the
        log-probabilities (B, V) to ids (B,)."""
        ids: list[Tensor] = []
        found: list[Tensor] = []
        walk = self.walk(call)
        for k in range(num):
            logits = walk.send(ids[-1]) if k else next(walk)
            found.append(logits.double().log_softmax(-1))
            ids.append(choose(k, found[k]))
        return torch.stack(ids, 1), torch.stack(found, 1)

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """Token k is the inverse-CDF sample of q(. | x_<k) at u_k. Fewer uniforms than K give the first tokens only."""
        num = self.num_tokens(uniforms)
        self.check_passes(passes, num)
        ids, log_q = self.run(call, num, lambda k, log_p: inverse_cdf_sample(log_p, uniforms[:, k]))
        return Draft(ids, log_q, num)

    def draft_recurrently(self, call: JointCall, emitted: Tensor, uniforms: Tensor) -> Generator[Tensor, Tensor, None]:
        self.num_after(emitted)
        return self.walk(call, emitted)

    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        """Of ids (B, m), m <= K: the exact marginal of a shorter block."""
        found = self.conditionals(call, ids).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return LogProb(found.sum(-1), "exact")

    def conditionals(self, call: JointCall, ids: Tensor) -> Tensor:
        """(B, m, V): log q(. | x_<k) for ids (B, m)."""
        return self.run(call, self.num_tokens(ids), lambda k, _: ids[:, k])[1]

    def loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        """Cross-entropy of the valid prefix, in nats per token."""
        ids, walk = inputs.blocks.ids, self.walk(call)
        logits = [next(walk), *(walk.send(ids[:, k]) for k in range(self.num_tokens(ids) - 1))]
        miss = token_losses(torch.stack(logits, 1), inputs, self.config.target)
        return {"sequential": Terms((miss * inputs.blocks.valid).sum(), inputs.blocks.count)}


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer, without bias, in x's dtype."""
    return F.linear(x, layer.weight.to(x.dtype))

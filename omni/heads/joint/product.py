"""Product heads: all tokens of a draft are independent. The baseline.

K residual blocks on the hidden state of the start, x + SiLU(W x), and the model's own unembedding (Medusa, arXiv
2401.10774; Gloeckle et al., arXiv 2404.19737). Whatever the loss, q(x) = prod_k q_k(x_k) cannot separate "high card,
two pair" from "high pair": its best forward KL to the joint is the total correlation.

Legend: B blocks of tokens, K tokens, V vocabulary, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omni.config import Frozen
from omni.heads.joint.base import JOINT_HEADS, Draft, JointCall, JointHead, LogProb, LossInputs
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample


class ProductConfig(Frozen):
    """No options: the residual blocks are as wide as the model."""


@JOINT_HEADS.register("product")
class Product(JointHead):
    """K independent distributions, each from one residual block on the hidden state of the start."""

    exact, conditional, order = True, True, "any"
    Config = ProductConfig

    def __init__(self, config: ProductConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.blocks = nn.Parameter(torch.zeros(length, width, width))

    def initialise(self, key: Key) -> None:
        """Zero: every distribution starts as the model's own next-token distribution."""
        torch.nn.init.zeros_(self.blocks)

    def log_probs(self, call: JointCall) -> Tensor:
        """(B, K, V) log q_k."""
        h = call.start
        moved = torch.einsum("bw,kvw->bkv", h, self.blocks.to(h.dtype))
        return call.read(h.unsqueeze(1) + nn.functional.silu(moved)).double().log_softmax(-1)

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        num = self.num_tokens(uniforms)
        self.check_passes(passes, num)
        log_probs = self.log_probs(call)[:, :num]
        return Draft(inverse_cdf_sample(log_probs, uniforms), log_probs)

    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        log_probs = self.log_probs(call)[:, : self.num_tokens(ids)]
        return LogProb(log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).sum(-1), "exact")

    def conditionals(self, call: JointCall, ids: Tensor) -> Tensor:
        """(B, n, V) log q_k for ids (B, n); they depend on no id."""
        return self.log_probs(call)[:, : self.num_tokens(ids)]

    def loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        """Cross-entropy of the valid tokens, in nats per token."""
        blocks = inputs.blocks
        found = self.log_probs(call).gather(-1, blocks.ids.unsqueeze(-1)).squeeze(-1)
        return {"product": Terms(-(found * blocks.valid).sum().float(), blocks.count)}

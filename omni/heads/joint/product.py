"""Product heads: all tokens of a draft are independent. The baseline.

K residual blocks on the hidden state of the start, x + SiLU(W x), and the model's own unembedding (Medusa, arXiv
2401.10774; Gloeckle et al., arXiv 2404.19737). Whatever the loss, q(x) = prod_k q_k(x_k) cannot separate "high card,
two pair" from "high pair": its best forward KL to the joint is the total correlation.

Recurrent drafting: after ids that no pass has read, the blocks of the tokens after them draft from the hidden state
before them, as Medusa's heads do.

Legend: B blocks of tokens, K tokens, V vocabulary, W width.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor, nn

from omni.config import Frozen
from omni.heads.joint.base import JOINT_HEADS, Draft, JointCall, JointHead, LogProb, LossInputs
from omni.heads.joint.losses import Target, token_losses
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample


class ProductConfig(Frozen):
    """The residual blocks are as wide as the model. target: see `losses.token_losses`."""

    target: Target = "ids"


@JOINT_HEADS.register("product")
class Product(JointHead):
    """K independent distributions, each from one residual block on the hidden state of the start."""

    exact, conditional, order, is_recurrent = True, True, "any", True
    Config = ProductConfig

    def __init__(self, config: ProductConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.blocks = nn.Parameter(torch.zeros(length, width, width))
        self.needs_teacher = config.target == "teacher"

    def initialise(self, key: Key) -> None:
        """Zero: every distribution starts as the model's own next-token distribution."""
        torch.nn.init.zeros_(self.blocks)

    def logits(self, call: JointCall, first: int = 0) -> Tensor:
        """(B, K - first, V) of the tokens from number `first` on."""
        h = call.start
        moved = torch.einsum("bw,kvw->bkv", h, self.blocks[first:].to(h.dtype))
        return call.read(h.unsqueeze(1) + nn.functional.silu(moved))

    def log_probs(self, call: JointCall) -> Tensor:
        """(B, K, V) log q_k."""
        return self.logits(call).double().log_softmax(-1)

    def draft_recurrently(self, call: JointCall, emitted: Tensor, uniforms: Tensor) -> Generator[Tensor, Tensor, None]:
        num = min(self.num_after(emitted), uniforms.shape[1])
        return each(self.logits(call, emitted.shape[1])[:, :num])

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
        miss = token_losses(self.logits(call), inputs, self.config.target)
        return {"product": Terms((miss * inputs.blocks.valid).sum(), inputs.blocks.count)}


def each(logits: Tensor) -> Generator[Tensor, Tensor, None]:
    """Logits (B, n, V), one token after another, whatever the ids."""
    for one in logits.unbind(1):  # noqa: UP028  (`yield from` a tuple takes no ids)
        yield one

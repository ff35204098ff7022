"""Product heads: all tokens of a draft are independent. The baseline.

K residual blocks on the hidden state of the start, x + SiLU(W x), and the model's own unembedding (Medusa, arXiv
2401.10774; Gloeckle et al., arXiv 2404.19737). Whatever the loss, q(x) = prod_k q_k(x_k) cannot separate "high card,
two pair" from "high pair": its best forward KL to the joint is the total correlation.

Recurrent drafting: after ids that no pass has read, the blocks of the tokens after them draft from the hidden state
before them, as Medusa's heads do. With `reads_first` they also read the block's first id, x + SiLU(W x + U norm(e)),
which is then known. Given that id, tokens are independent, as in DFlash.

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
    """The residual blocks are as wide as the model. target: see `losses.token_losses`. reads_first: the tokens after
    the first read it. Only they are trained then: the first keeps the model's own distribution."""

    target: Target = "ids"
    reads_first: bool = False


@JOINT_HEADS.register("product")
class Product(JointHead):
    """K independent distributions, each from one residual block on the hidden state of the start. Names of weights are
    stored: never rename them."""

    exact, conditional, order, is_recurrent = True, True, "any", True
    Config = ProductConfig

    def __init__(self, config: ProductConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.blocks = nn.Parameter(torch.zeros(length, width, width))
        self.of_first = nn.Parameter(torch.zeros(length - 1, width, width)) if config.reads_first else None
        self.needs_teacher = config.target == "teacher"

    def initialise(self, key: Key) -> None:
        """Zero: every distribution starts as the model's own next-token distribution."""
        torch.nn.init.zeros_(self.blocks)
        if self.of_first is not None:
            torch.nn.init.zeros_(self.of_first)

    def logits(self, call: JointCall, ids: Tensor, at: int = 0, stop: int | None = None) -> Tensor:
        """(B, stop - at, V) of the tokens from number `at` on, given the first of ids (B, n), where it is read; it may
        be any for token 0."""
        h, stop = call.start, self.length if stop is None else stop
        moved = torch.einsum("bw,kvw->bkv", h, self.blocks[at:stop].to(h.dtype))
        if self.of_first is not None and stop > 1:
            token = nn.functional.rms_norm(call.embed(ids[:, 0]), (self.width,)).to(h.dtype)
            of_first = torch.einsum("bw,kvw->bkv", token, self.of_first[max(at - 1, 0) : stop - 1].to(h.dtype))
            moved = moved + nn.functional.pad(of_first, (0, 0, int(at == 0), 0))
        return call.read(h.unsqueeze(1) + nn.functional.silu(moved))

    def log_probs(self, call: JointCall, ids: Tensor) -> Tensor:
        """(B, n, V) log q_k of ids (B, n)."""
        return self.logits(call, ids, 0, self.num_tokens(ids)).double().log_softmax(-1)

    def draft_recurrently(self, call: JointCall, emitted: Tensor, uniforms: Tensor) -> Generator[Tensor, Tensor, None]:
        m = emitted.shape[1]
        return each(self.logits(call, emitted, m, m + min(self.num_after(emitted), uniforms.shape[1])))

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        num = self.num_tokens(uniforms)
        self.check_passes(passes, num)
        ids = torch.zeros_like(uniforms, dtype=torch.int64)
        if self.of_first is not None and num > 1:
            ids[:, :1] = inverse_cdf_sample(self.log_probs(call, ids[:, :1]), uniforms[:, :1])
        log_probs = self.log_probs(call, ids)
        return Draft(inverse_cdf_sample(log_probs, uniforms), log_probs)

    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        log_probs = self.log_probs(call, ids)
        return LogProb(log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).sum(-1), "exact")

    def conditionals(self, call: JointCall, ids: Tensor) -> Tensor:
        """(B, n, V) log q_k for ids (B, n); they depend on no id, or on the first alone."""
        return self.log_probs(call, ids)

    def loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        """Cross-entropy of the valid tokens, in nats per token."""
        at = int(self.of_first is not None)
        miss = token_losses(self.logits(call, inputs.blocks.ids, at), inputs, self.config.target, at)
        valid = inputs.blocks.valid[:, at:]
        return {"product": Terms((miss * valid).sum(), float(valid.sum()))}


def each(logits: Tensor) -> Generator[Tensor, Tensor, None]:
    """Logits (B, n, V), one token after another, whatever the ids."""
    for one in logits.unbind(1):  # noqa: UP028  (`yield from` a tuple takes no ids)
        yield one

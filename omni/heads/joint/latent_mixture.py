"""A mixture over one number: K placeholders condition on lambda ~ U[0, 1]; given lambda, tokens are independent.

    q(x) = E prod_k q_k(x_k | c, lambda)

(arXiv 2410.08709.) One sample of lambda couples the block. With growing capacity the mixture is any joint distribution,
but the mean has no closed form. So loss and likelihood are log-mean-exp over M values of lambda, one in each M-th of
[0, 1]: in expectation a lower bound on log q, which tightens with M.

Legend: B blocks of tokens, K tokens, V vocabulary, W width, M values of lambda.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from omni.config import Frozen
from omni.heads.joint.base import JOINT_HEADS, Draft, ExtendedCall, JointCall, JointHead, LogProb, LossInputs
from omni.heads.joint.noise_kinds import SineEmbedding, uniforms_by_name
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample


class LatentMixtureConfig(Frozen):
    """num_latents: M in training, each a pass with a graph. num_samples: M of a block's likelihood.
    frequencies: of the sines that embed lambda."""

    num_latents: int = Field(default=8, ge=1, le=1 << 16)
    num_samples: int = Field(default=64, ge=1, le=1 << 16)
    frequencies: int = Field(default=8, ge=1, le=24)


@JOINT_HEADS.register("latent_mixture")
class LatentMixture(JointHead):
    """The mixture over lambda of the module docstring. Names of weights are stored: never rename them."""

    layout, universal, passes, order = "block", True, "divisors", "any"
    Config = LatentMixtureConfig
    config: LatentMixtureConfig

    def __init__(self, config: LatentMixtureConfig, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.placeholder = nn.Parameter(torch.zeros(width))
        self.waves = SineEmbedding(1, width, config.frequencies)
        self.decoder = nn.Parameter(torch.zeros(width, width))

    def initialise(self, key: Key) -> None:
        """The matrix before the output projection starts at zero."""
        super().initialise(key)
        torch.nn.init.zeros_(self.decoder)

    def log_probs(self, call: JointCall, latent: Tensor) -> Tensor:
        """(B, length, V) float64 log q_k(. | c, lambda) for lambda (B,). One pass."""
        inputs = self.placeholder + self.waves(latent.unsqueeze(-1))
        hidden = call(inputs.unsqueeze(1).expand(-1, self.length, -1), causal=False)[:, 1:]
        moved = hidden + nn.functional.linear(hidden, self.decoder.to(hidden.dtype))
        return call.read(moved).double().log_softmax(-1)

    def mixture(self, call: JointCall, ids: Tensor, valid: Tensor, offsets: Tensor) -> Tensor:
        """(B,) float64: log-mean-exp, over the M values (m + offset_m) / M, of the probability of ids (B, K) where
        `valid` (B, K); offsets (B, M) in [0, 1). M passes."""
        M, scores = offsets.shape[1], []
        for m in range(M):
            log_probs = self.log_probs(call, (m + offsets[:, m]) / M)[:, : ids.shape[1]]
            found = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            scores.append(torch.where(valid, found, 0.0).sum(-1))
        return torch.stack(scores, -1).logsumexp(-1) - math.log(M)

    def sample(self, call: JointCall, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:
        """See the contract. Lambda is keyed and independent of the uniforms; given lambda, ids are sampled from
        `log_q`. `passes` must divide K: each pass has a lambda of its own and gives K / passes tokens."""
        B, K = len(uniforms), self.num_tokens(uniforms)
        self.check_passes(passes, K)
        ids, log_probs, n = torch.zeros(B, 0, dtype=torch.int64, device=uniforms.device), [], K // passes
        for step in range(passes):
            latent = key.fold("latent", step).uniform((B,), torch.float64).to(uniforms.device)
            log_probs.append(self.log_probs(ExtendedCall(call, ids) if step else call, latent)[:, :n])
            ids = torch.cat([ids, inverse_cdf_sample(log_probs[-1], uniforms[:, step * n : (step + 1) * n])], 1)
        return Draft(ids, torch.cat(log_probs, 1))

    @torch.no_grad()
    def log_prob(self, call: JointCall, ids: Tensor, key: Key) -> LogProb:
        """A lower bound in expectation over `key`, from num_samples values of lambda."""
        offsets = key.fold("latents").uniform((len(ids), self.config.num_samples), torch.float64).to(ids.device)
        return LogProb(self.mixture(call, ids, torch.ones_like(ids, dtype=torch.bool), offsets), "bound")

    def loss(self, call: JointCall, inputs: LossInputs) -> dict[str, Terms]:
        """Minus log-mean-exp over num_latents values of lambda, in nats per token."""
        blocks = inputs.blocks
        offsets = uniforms_by_name(blocks.names, (self.config.num_latents,), inputs.key.fold("latents")).to(
            blocks.ids.device
        )
        found = self.mixture(call, blocks.ids, blocks.valid, offsets)
        return {"latent_mixture": Terms(-found.sum().float(), blocks.count)}

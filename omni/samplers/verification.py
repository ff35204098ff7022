"""Draft verification: how many of K drafted tokens are accepted, given the target probabilities of each.

Lossless: emitted tokens have exactly the distribution of autoregressive decoding from p:

    coupled     y_k is the inverse-CDF sample of p_k at the token's own uniform u_k; x_k is accepted while x_k = y_k.
                Exact for ANY draft. For a given u the ids are those of autoregressive decoding. Greedy decoding is the
                case where p_k is one id. A token keeps its u in all rounds: drafts may depend on the noise of later
                tokens.
    rejection   accept x_k with probability min(1, p_k(x_k) / q_k(x_k)); at the first rejection sample from the excess
                of p_k over q_k                                   (arXiv 2211.17192, 2302.01318)
    block       the longest prefix by a joint test: in expectation accepts at least as many as rejection
                                                                  (arXiv 2403.10444, algorithm 2)

The last two need x_k sampled from the given q_k. q_k may depend on all earlier samples, including noise that is not in
the ids, but not on the coins used here. "none" accepts all drafts: lossy, for experiments; it needs no computation.
Every kind emits at least one token: after n accepted ones, the (n + 1)-th is sampled here.

Legend: B batch rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.samplers.inverse_cdf import inverse_cdf_sample

LOSSLESS = ("coupled", "rejection", "block")
VERIFICATIONS = (*LOSSLESS, "none")


@dataclass(frozen=True)
class Verified:
    """ids (B, K + 1): of batch row b the first `accepted[b] + 1` are emitted; the last of these is sampled here."""

    ids: Tensor
    accepted: Tensor  # (B,) int64, 0..K


def coupled(draft: Tensor, log_p: Tensor, uniforms: Tensor) -> Verified:
    """draft (B, K); log_p (B, K + 1, V): log-probabilities after each prefix of the draft; uniforms (B, K + 1)."""
    return agreed(draft, inverse_cdf_sample(log_p, uniforms))


def agreed(draft: Tensor, plain: Tensor) -> Verified:
    """The same, given the ids of autoregressive decoding after each prefix of the draft: plain (B, K + 1)."""
    return Verified(plain, _leading(plain[:, :-1] == draft))


def rejection(draft: Tensor, log_q: Tensor, log_p: Tensor, coins: Tensor, uniforms: Tensor) -> Verified:
    """log_q (B, K, V): the log-probabilities that the draft was sampled from. coins (B, K), uniforms (B, K + 1) in [0,
    1), independent of the draft and of one another."""
    p, q = log_p.double().exp(), log_q.double().exp()
    at = draft.unsqueeze(-1)
    ratio = p[:, :-1].gather(-1, at).squeeze(-1) / q.gather(-1, at).squeeze(-1).clamp(min=1e-300)
    accepted = _leading(coins < ratio)
    excess = (p[:, :-1] - q).clamp(min=0)
    return _finish(draft, accepted, torch.cat([excess, p[:, -1:]], 1), p, uniforms)


def block(draft: Tensor, log_q: Tensor, log_p: Tensor, coins: Tensor, uniforms: Tensor) -> Verified:
    """Arguments as in `rejection`; one coin for each prefix length 1..K."""
    p, q = log_p.double().exp(), log_q.double().exp()
    B, K = draft.shape
    at = draft.unsqueeze(-1)
    ratio = p[:, :-1].gather(-1, at).squeeze(-1) / q.gather(-1, at).squeeze(-1).clamp(min=1e-300)
    weight = torch.ones(B, K + 1, dtype=torch.float64, device=draft.device)
    for k in range(K):
        weight[:, k + 1] = (weight[:, k] * ratio[:, k]).clamp(max=1)
    excess = (weight[:, :K, None] * p[:, :K] - q).clamp(min=0)  # of prefix lengths 0..K-1
    mass = excess.sum(-1)
    accept = mass / (mass + 1 - weight[:, :K]).clamp(min=1e-300)
    accept = torch.cat([accept[:, 1:], weight[:, K:]], 1)  # of prefix lengths 1..K
    passed = coins < accept
    lengths = torch.arange(1, K + 1, device=draft.device)
    accepted = torch.where(passed, lengths, 0).max(1).values
    return _finish(draft, accepted, torch.cat([excess, p[:, -1:]], 1), p, uniforms)


def _finish(draft: Tensor, accepted: Tensor, excess: Tensor, p: Tensor, uniforms: Tensor) -> Verified:
    """The token after the accepted ones, sampled from the excess there; if rounding left none, from p itself."""
    rows = torch.arange(len(draft), device=draft.device)
    residual = excess[rows, accepted]
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p[rows, accepted])
    drawn = inverse_cdf_sample(residual.log(), uniforms[rows, accepted])
    ids = torch.nn.functional.pad(draft, (0, 1)).clone()
    ids[rows, accepted] = drawn
    return Verified(ids, accepted)


def _leading(flags: Tensor) -> Tensor:
    """(B, K) bool -> (B,): the number of true flags before the first false one."""
    return flags.long().cumprod(-1).sum(-1)

"""Verification: how many of K drafted tokens stand, given the laws that plain decoding has for each of them.

Lossless, that is, what is emitted has exactly the law of drawing token by token from p:

    coupled     y_k = pick(p_k, u_k) with the token's own noise, as long as the draft said the same: exact for
                ANY draft, and for a given u the very ids of plain decoding. Greedy, where p_k is one id. A token
                keeps its u in every round that comes to it: drafts may hang on the noise of later tokens.
    rejection   keep x_k with probability min(1, p_k(x_k) / q_k(x_k)); at the first refusal draw from the excess of p_k
                over q_k                                          (arXiv 2211.17192, 2302.01318)
    block       the longest prefix by a joint test: never keeps fewer than rejection in expectation
                                                                  (arXiv 2403.10444, algorithm 2)

The last two need that x_k was drawn from the given q_k; q_k may depend on all that was drawn before (so also on noise
that is not in the ids), not on the coins used here. "none" keeps drafts as they are: lossy, for study, and nothing to
compute. Every kind here emits at least one token: after n kept ones the (n + 1)-th is drawn here.

Legend: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.samplers.inverse_cdf import pick

LOSSLESS = ("coupled", "rejection", "block")
VERIFICATIONS = (*LOSSLESS, "none")


@dataclass(frozen=True)
class Verdict:
    """ids (B, K + 1): of row b the first `kept[b] + 1` are emitted; the last of these is the one drawn here."""

    ids: Tensor
    kept: Tensor  # (B,) int64, 0..K


def coupled(draft: Tensor, log_p: Tensor, uniforms: Tensor) -> Verdict:
    """draft (B, K); log_p (B, K + 1, V): laws after each prefix of the draft; uniforms (B, K + 1): the noise."""
    return agreed(draft, pick(log_p, uniforms))


def agreed(draft: Tensor, plain: Tensor) -> Verdict:
    """The same, given what plain decoding says after each prefix of the draft: plain (B, K + 1)."""
    return Verdict(plain, _leading(plain[:, :-1] == draft))


def rejection(draft: Tensor, log_q: Tensor, log_p: Tensor, coins: Tensor, uniforms: Tensor) -> Verdict:
    """log_q (B, K, V): the laws the draft was drawn from. coins (B, K), uniforms (B, K + 1) in [0, 1), independent of
    the draft and of one another."""
    p, q = log_p.double().exp(), log_q.double().exp()
    at = draft.unsqueeze(-1)
    ratio = p[:, :-1].gather(-1, at).squeeze(-1) / q.gather(-1, at).squeeze(-1).clamp(min=1e-300)
    kept = _leading(coins < ratio)
    excess = (p[:, :-1] - q).clamp(min=0)
    return _finish(draft, kept, torch.cat([excess, p[:, -1:]], 1), p, uniforms)


def block(draft: Tensor, log_q: Tensor, log_p: Tensor, coins: Tensor, uniforms: Tensor) -> Verdict:
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
    kept = torch.where(passed, lengths, 0).max(1).values
    return _finish(draft, kept, torch.cat([excess, p[:, -1:]], 1), p, uniforms)


def _finish(draft: Tensor, kept: Tensor, excess: Tensor, p: Tensor, uniforms: Tensor) -> Verdict:
    """The drawn token after the kept ones: from the excess there, or, where rounding left none, from p itself."""
    rows = torch.arange(len(draft), device=draft.device)
    law = excess[rows, kept]
    law = torch.where(law.sum(-1, keepdim=True) > 0, law, p[rows, kept])
    drawn = pick(law.log(), uniforms[rows, kept])
    ids = torch.nn.functional.pad(draft, (0, 1)).clone()
    ids[rows, kept] = drawn
    return Verdict(ids, kept)


def _leading(flags: Tensor) -> Tensor:
    """(B, K) bool -> (B,): how many are true before the first that is not."""
    return flags.long().cumprod(-1).sum(-1)

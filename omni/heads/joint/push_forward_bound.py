"""What a push-forward head says of given ids: noise that its own laws invert them to, and a bound on their likelihood.

Categorical mode draws x_k = pick(C_k-1(. | eps_<k), eps_k). With noise drawn left to right, eps_k ~ p(. | C_k-1, x_k),

    q(x) = E prod_k C_k-1(x_k | eps_<k)

(the mean over that noise; substitute it in the integral over the prior). The logarithm of one draw is below log q in
the mean, and log-mean-exp of M draws is a bound that tightens with M: an evidence bound whose posterior is exact for
every token but blind to the tokens after it.

Legend: B blocks, K tokens, S numbers of a token's noise, V vocabulary, M draws.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omni.heads.joint.base import JointCall
from omni.rng import Key

if TYPE_CHECKING:
    from omni.heads.joint.push_forward import PushForward


@torch.no_grad()
def own_noise(head: PushForward, call: JointCall, ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Noise (B, K, S) that names ids (B, K) under the head's own categorical laws, from uniforms `draws` (B, K, S), and
    the ids' log-probabilities under those laws (B, K). K - 1 passes; no graph."""
    K = ids.shape[1]
    hidden, found, scores = call.start, [], []
    for j in range(K):
        law = call.read(hidden).double().log_softmax(-1)
        scores.append(law.gather(-1, ids[:, j : j + 1]))
        found.append(head.noise.invert(law, ids[:, j], draws[:, j]))
        if j + 1 < K:
            hidden = call(head.placeholders(torch.stack(found, 1)))[:, -1]
    return torch.stack(found, 1), torch.cat(scores, 1)


@torch.no_grad()
def block_bound(head: PushForward, call: JointCall, ids: Tensor, key: Key, num_samples: int) -> Tensor:
    """(B,) float64: log-mean-exp over `num_samples` draws of noise; below log q(ids) in the mean. num_samples times
    K - 1 passes."""
    total = torch.full((len(ids),), -math.inf, dtype=torch.float64, device=ids.device)
    for m in range(num_samples):
        shape = (*ids.shape, head.noise.size)
        draws = key.fold("posterior", m).uniform(shape, torch.float64).to(ids.device)
        total = torch.logaddexp(total, own_noise(head, call, ids, draws)[1].sum(-1))
    return total - math.log(num_samples)

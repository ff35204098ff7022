"""Distances of a distribution from a known joint: total variation, both divergences, valid mass, coverage, entropy.

The distribution is given by samples, as a full table, or by log-probabilities on the joint's support, which suffice for
total variation: 1 - sum over the support of min(p, q). A finite number of exact samples has a positive expected
distance (`sampling_error`).

Legend: B samples, K tokens, V ids, N strings of the support.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.experiments.joint.joints import Table, codes


@dataclass(frozen=True)
class Distances:
    """Distances of a distribution q from a joint p. Divergences in nats, infinite where a support is not contained.

    valid: q's mass on p's support. coverage: the share of p's strings with mass, or samples, in q. entropy: of q in
    nats, for samples of the empirical distribution; None where q is known on the support alone.
    """

    tv: float
    forward_kl: float  # KL(p || q)
    reverse_kl: float  # KL(q || p)
    valid: float
    coverage: float
    entropy: float | None


def of_support(joint: Table, log_q: Tensor, entropy: float | None = None, slack: float = 1e-9) -> Distances:
    """From log q (N,) of the joint's strings. Other mass of up to `slack` counts as none."""
    q, p = log_q.double().exp(), joint.p
    valid = float(q.sum())
    if valid > 1 + 1e-6:
        raise ValueError(f"probabilities of distinct strings add up to {valid}; give log-probabilities")
    given = q > 0
    ratio = torch.where(given, (q.clamp(min=1e-300) / p).log(), -math.inf)
    reverse = float((q * ratio)[given].sum()) if valid >= 1 - slack else math.inf
    tv = 1 - float(torch.minimum(p, q).sum())
    return Distances(max(tv, 0.0), float(-(p * ratio).sum()), reverse, valid, float(given.double().mean()), entropy)


def of_distribution(joint: Table, q: Tensor) -> Distances:
    """From the full table of probabilities, (V,) * K or flat, of sum 1."""
    flat = q.double().flatten()
    if len(flat) != joint.vocab_size**joint.length or abs(float(flat.sum()) - 1) > 1e-6:
        raise ValueError(f"{joint.name} needs {joint.vocab_size}^{joint.length} probabilities of sum 1")
    entropy = float(-torch.special.xlogy(flat, flat).sum())
    return of_support(joint, flat[joint.codes].log(), entropy)


def of_samples(joint: Table, ids: Tensor) -> Distances:
    """From samples (B, K) int64; ids of V and above are outside the support."""
    at = joint.find(ids)
    counts = torch.bincount(at[at >= 0], minlength=len(joint.p)).double()
    base = max(joint.vocab_size, int(ids.max()) + 1)
    f = codes(ids, base).unique(return_counts=True)[1].double() / len(ids)
    return of_support(joint, (counts / len(ids)).log(), float(-(f * f.log()).sum()), slack=0.5 / len(ids))


def sampling_error(joint: Table, num: int) -> float:
    """The expected total variation of `num` exact samples: half the sum of mean absolute deviations of binomials
    (de Moivre), about sum sqrt(p (1 - p) / (2 pi num))."""
    p = joint.p[joint.p < 1]
    m = (num * p).floor() + 1
    log_choose = torch.lgamma(torch.tensor(num + 1.0).double()) - torch.lgamma(m + 1) - torch.lgamma(num - m + 1)
    each = log_choose + m.log() + m * p.log() + (num - m + 1) * torch.log1p(-p)
    return float(each.exp().sum() / num)

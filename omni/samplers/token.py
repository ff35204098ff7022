"""Sampling one id from logits with a key: temperature and nucleus (top-p, arXiv 1904.09751).

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from omni.errors import NotFiniteError, in_range, require_finite
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample


def masked_scores(logits_NV: Tensor, mask: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The scores of N tokens, float32 (N, V) logits + mask, and the (first) best id of each, (N,) int64. mask: (V,) or
    (N, V), 0 or -inf. numbers: the index of each token in the reply, from 0, for the error.

    NotFiniteError if a logit is NaN or infinite, if the mask leaves no id, or if all logits are 0, which the final norm
    returns for a hidden state whose square overflows.
    """
    scores = logits_NV.float() + mask
    top, ids = scores.max(-1)
    best = top.tolist()
    if not in_range(logits_NV) or not all(value and math.isfinite(value) for value in best):
        for logits_V, value, number in zip(logits_NV, best, numbers, strict=True):
            _require_sound(logits_V, value, number)
    return scores, ids


def _require_sound(logits_V: Tensor, best: float, number: int) -> None:
    """NotFiniteError if the logits, or what the mask leaves of them, are no distribution."""
    what, way_out = f"the logits of token {number + 1} of the reply", "check the model's files with `omni verify`"
    require_finite(logits_V, what, f"a weight is damaged, or too large for the model's dtype: {way_out}")
    if not math.isfinite(best):
        raise NotFiniteError(f"the mask leaves no id for token {number + 1} of the reply; {way_out}")
    if not logits_V.any():
        raise NotFiniteError(f"{what} are all 0: a hidden state overflowed because a weight is too large; {way_out}")


def token_log_probs(score: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """(..., V) float64 log-probabilities of softmax(score / temperature), restricted to the top_k largest scores (0: to
    all), then to the top-p nucleus: the smallest set of most probable ids with at least that mass. Scores equal to the
    last of the top_k are kept. Temperature 0: all mass on the (first) largest score."""
    if temperature == 0:
        log_p = torch.full(score.shape, -torch.inf, dtype=torch.float64, device=score.device)
        return log_p.scatter_(-1, score.argmax(-1, keepdim=True), 0.0)
    score = score.double()
    if 0 < top_k < score.shape[-1]:
        score = score.masked_fill(score < score.topk(top_k).values[..., -1:], -torch.inf)
    log_p = ((score - score.amax(-1, keepdim=True)) / temperature).log_softmax(-1)  # the largest never overflows
    if top_p >= 1:
        return log_p
    values, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    dropped = (values.cumsum(-1) - values) >= top_p
    log_p = log_p.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), -torch.inf)
    return log_p.log_softmax(-1)


def token_uniform(key: Key) -> float:
    """The uniform of one token, in autoregressive and in speculative decoding."""
    return key.python().random()


def sample_token(score_V: Tensor, temperature: float, top_p: float, key: Key, top_k: int = 0) -> int:
    """The inverse-CDF sample of `token_log_probs` at the key's uniform."""
    log_p = token_log_probs(score_V, temperature, top_p, top_k)
    return int(inverse_cdf_sample(log_p, torch.tensor(token_uniform(key), dtype=torch.float64)))

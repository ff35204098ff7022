"""Drawing one id from logits, by a key: temperature and nucleus (top-p, arXiv 1904.09751).

Legend: N scores, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from omni.finite import NotFiniteError
from omni.pick import pick
from omni.rng import Key


def best_ids(score_NV: Tensor, numbers: Iterable[int]) -> Tensor:
    """(N,) int64: the (first) largest of each score. NotFiniteError unless that is a finite number, which it is not
    where any score of the N is NaN or infinite, nor where every one is -inf; and where all are 0, which is what the
    final norm makes of a hidden state too large for its square. numbers: of the N tokens in the reply, from 0, for the
    error."""
    top, ids = score_NV.max(-1)
    for n, (value, number) in enumerate(zip(top.tolist(), numbers, strict=True)):
        if value and math.isfinite(value):
            continue
        allowed = score_NV[n][score_NV[n].isfinite()]
        if value == 0 and (len(allowed) < 2 or bool(allowed.any())):
            continue
        found = "all 0" if value == 0 else f"not finite (the largest is {value})"
        raise NotFiniteError(
            f"the logits of token {number + 1} of the reply are {found}: the model's weights are damaged, or too large "
            "for its dtype; check its files with `omni verify`, or load it with dtype=torch.float32"
        )
    return ids


def token_law(score: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """(..., V) float64 log-probabilities of softmax(score / temperature) restricted to its top-p nucleus, the smallest
    set of most probable ids with at least that mass. Temperature 0: all mass on the (first) largest score."""
    if temperature == 0:
        law = torch.full(score.shape, -torch.inf, dtype=torch.float64, device=score.device)
        return law.scatter_(-1, score.argmax(-1, keepdim=True), 0.0)
    score = score.double()
    law = ((score - score.amax(-1, keepdim=True)) / temperature).log_softmax(-1)  # the largest never overflows
    if top_p >= 1:
        return law
    values, order = law.exp().sort(dim=-1, descending=True, stable=True)
    dropped = (values.cumsum(-1) - values) >= top_p
    law = law.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), -torch.inf)
    return law.log_softmax(-1)


def token_noise(key: Key) -> float:
    """The uniform that decides one token, whether it is drawn alone or in a block."""
    return key.python().random()


def draw_token(score_V: Tensor, temperature: float, top_p: float, key: Key) -> int:
    """A keyed draw from `token_law`."""
    return int(pick(token_law(score_V, temperature, top_p), torch.tensor(token_noise(key), dtype=torch.float64)))

"""Drawing one id from logits, by a key: temperature and nucleus (top-p, arXiv 1904.09751).

Legend: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni.pick import pick
from omni.rng import Key


def token_law(score: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """(..., V) float64 log-probabilities of softmax(score / temperature) restricted to its top-p nucleus, the smallest
    set of most probable ids with at least that mass. Temperature 0: all mass on the (first) largest score."""
    if temperature == 0:
        law = torch.full(score.shape, -torch.inf, dtype=torch.float64, device=score.device)
        return law.scatter_(-1, score.argmax(-1, keepdim=True), 0.0)
    law = (score.double() / temperature).log_softmax(-1)
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

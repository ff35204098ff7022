"""Drawing one id from logits, by a key: temperature and nucleus (top-p, arXiv 1904.09751)."""

from __future__ import annotations

from torch import Tensor

from omni.rng import Key


def draw_token(score_V: Tensor, temperature: float, top_p: float, key: Key) -> int:
    """A keyed draw from softmax(score / temperature) restricted to its top-p nucleus."""
    p = (score_V.double() / temperature).softmax(-1)
    values, order = p.sort(descending=True, stable=True)
    kept = values * ((values.cumsum(-1) - values) < top_p)
    u = key.python().random() * float(kept.sum())
    index = int((kept.cumsum(-1) <= u).sum())
    return int(order[min(index, int((kept > 0).sum()) - 1)])

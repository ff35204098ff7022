"""The tokens that each pass of a masked block reveals. A token's own uniform gives its id.

    ancestral   in uniformly random order. The schedule gives the number in each pass: as even as possible ("linear") or
                few at first ("cosine"). In absorbing diffusion the number is binomial; here it has no variance, and n
                passes reveal one token each. With exact conditionals the cost is the total correlation of every set
                given those before it, and zero in n passes
    confidence  the tokens whose sampled id is likeliest, as many as the schedule gives (MaskGIT, arXiv 2202.04200):
                log-probability plus gumbel_temperature (1 - i / N) times Gumbel noise in pass i of N. Other tokens are
                sampled again with the same uniform. The choice depends on the sampled ids: the distribution is sharper
                than the head's own, even in n passes
    entropy     the tokens of least entropy, while the bound sum H - max H on their total correlation is at or below
                entropy_bound (arXiv 2505.24857); more if the remaining passes would not suffice; no pass once all are
                revealed

Legend: B blocks of tokens, n tokens, V vocabulary, N passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.config import Frozen
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample
from omni.sequence.schedule import cosine_known

Schedule = Literal["linear", "cosine"]
# ids (B, n), shown (B, n) -> (B, n, V) float64 log-probabilities; one pass
Conditionals = Callable[[Tensor, Tensor], Tensor]


class Unmasking(Frozen):
    """See the module docstring. schedule: how many tokens are masked at a time ("entropy" uses its bound instead).
    gumbel_temperature: of "confidence" only. entropy_bound: of "entropy" only, in nats."""

    unmasking: Literal["ancestral", "confidence", "entropy"] = "ancestral"
    schedule: Schedule = "linear"
    gumbel_temperature: float = Field(default=4.5, ge=0)
    entropy_bound: float = Field(default=0.2, ge=0)

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> Unmasking:
        for option, needed in (("gumbel_temperature", "confidence"), ("entropy_bound", "entropy")):
            if option in self.model_fields_set and self.unmasking != needed:
                raise ValueError(f'{option} has no effect unless unmasking is "{needed}": leave it out')
        return self


def reveal_sizes(num: int, passes: int, schedule: Schedule) -> list[int]:
    """The number of tokens, at least one, that each of `passes` reveals of `num`. linear: equal; with a remainder the
    first ones are larger by one. cosine: num cos(pi i / 2 N), rounded down, are still masked after pass i."""
    if schedule == "linear":
        return [num // passes + (i < num % passes) for i in range(passes)]
    return [after - before for before, after in pairwise([0, *cosine_known(num, passes)])]


def draw_in_passes(conditionals: Conditionals, uniforms: Tensor, key: Key, passes: int, how: Unmasking) -> Tensor:
    """Ids (B, n) int64 for uniforms (B, n) from at most `passes` calls of `conditionals`."""
    ids, shown = torch.zeros_like(uniforms, dtype=torch.int64), torch.zeros_like(uniforms, dtype=torch.bool)
    order = _uniform(key.fold("order"), uniforms)
    sizes = reveal_sizes(uniforms.shape[1], passes, how.schedule)
    for i, size in enumerate(sizes):
        log_p = conditionals(ids, shown)
        drawn = inverse_cdf_sample(log_p, uniforms)
        if how.unmasking == "ancestral":
            now = highest_scores(order, shown, size)
        elif how.unmasking == "confidence":
            noise = -(-_uniform(key.fold("confidence", i), uniforms).clamp(min=2.0**-53).log()).log()
            sure = log_p.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            now = highest_scores(sure + how.gumbel_temperature * (1 - (i + 1) / passes) * noise, shown, size)
        else:
            now = least_entropy(log_p, shown, how.entropy_bound, passes - i)
        ids, shown = torch.where(now, drawn, ids), shown | now
        if how.unmasking == "entropy" and bool(shown.all()):
            break
    return ids


def highest_scores(score: Tensor, shown: Tensor, size: int | Tensor) -> Tensor:
    """(B, n) bool: the `size` (a number, or (B, 1)) tokens of highest score (B, n) that are not shown yet."""
    ranks = score.masked_fill(shown, -math.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return ~shown & (ranks < size)


def least_entropy(log_p: Tensor, shown: Tensor, bound: float, passes_left: int) -> Tensor:
    """(B, n) bool: tokens in order of entropy, while the sum over those before the last is at most `bound`. At least so
    many that each remaining pass reveals no more than its equal share."""
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    rising = entropy.masked_fill(shown, math.inf).sort(-1).values
    within = (rising.cumsum(-1) - rising).nan_to_num(math.inf) <= bound  # without the last, which is the largest
    left = (~shown).sum(-1, keepdim=True)
    least = (left + passes_left - 1) // passes_left
    size = torch.maximum(torch.minimum(within.sum(-1, keepdim=True), left), least)
    return highest_scores(-entropy, shown, size)


def _uniform(key: Key, like: Tensor) -> Tensor:
    """Keyed uniforms of the shape and on the device of `like`."""
    return key.uniform(tuple(like.shape), torch.float64).to(like.device)

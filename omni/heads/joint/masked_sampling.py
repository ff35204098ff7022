"""Which tokens of a masked block every pass reveals; what is revealed is drawn by the token's own uniform.

    ancestral   in uniformly random order. How many in each pass is the schedule's, as even as can be ("linear") or few
                at first ("cosine"), instead of binomial about it: the first steps of absorbing diffusion with the
                variance of their sizes taken out, so that n passes draw one token each. With exact conditionals the
                cost is the total correlation of every set given those before it, and none in n passes
    confidence  the tokens whose drawn id is likeliest, as many as the schedule says (MaskGIT, arXiv 2202.04200):
                log-probability plus gumbel_temperature (1 - i / N) times Gumbel noise in pass i of N. A token that is
                not kept is drawn again, by the same uniform. What is kept depends on what was drawn: a sharper law than
                the head's own, even in n passes
    entropy     the tokens of least entropy, as many as keep the bound sum H - max H on their total correlation at or
                below entropy_bound (arXiv 2505.24857); more of them where the passes that are left would not suffice,
                and no pass once everything is revealed

Legend: B blocks, n tokens, V vocabulary, N passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.config import Frozen
from omni.rng import Key
from omni.samplers.inverse_cdf import pick

Schedule = Literal["linear", "cosine"]
Laws = Callable[[Tensor, Tensor], Tensor]  # ids (B, n), shown (B, n) -> (B, n, V) float64 log-laws; one pass


class Unmasking(Frozen):
    """See above. schedule: how many tokens are masked at a time ("entropy" heeds its bound instead).
    gumbel_temperature: of "confidence" alone. entropy_bound: of "entropy" alone, in nats."""

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
    """How many of `num` tokens each of `passes` reveals, one or more. linear: equal, the first ones larger by one where
    a rest is left. cosine: num cos(pi i / 2 N) tokens are still masked after pass i, rounded down."""
    if schedule == "linear":
        return [num // passes + (i < num % passes) for i in range(passes)]
    left, sizes = num, []
    for i in range(1, passes + 1):
        kept = math.floor(num * math.cos(math.pi / 2 * i / passes))
        sizes.append(min(max(left - kept, 1), left - (passes - i)))
        left -= sizes[-1]
    return sizes


def draw_in_passes(laws: Laws, uniforms: Tensor, key: Key, passes: int, how: Unmasking) -> Tensor:
    """Ids (B, n) int64 for uniforms (B, n) from at most `passes` calls of `laws`."""
    ids, shown = torch.zeros_like(uniforms, dtype=torch.int64), torch.zeros_like(uniforms, dtype=torch.bool)
    order = _uniform(key.fold("order"), uniforms)
    sizes = reveal_sizes(uniforms.shape[1], passes, how.schedule)
    for i, size in enumerate(sizes):
        law = laws(ids, shown)
        drawn = pick(law, uniforms)
        if how.unmasking == "ancestral":
            now = most_wanted(order, shown, size)
        elif how.unmasking == "confidence":
            noise = -(-_uniform(key.fold("confidence", i), uniforms).clamp(min=2.0**-53).log()).log()
            sure = law.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            now = most_wanted(sure + how.gumbel_temperature * (1 - (i + 1) / passes) * noise, shown, size)
        else:
            now = least_entropy(law, shown, how.entropy_bound, passes - i)
        ids, shown = torch.where(now, drawn, ids), shown | now
        if how.unmasking == "entropy" and bool(shown.all()):
            break
    return ids


def most_wanted(score: Tensor, shown: Tensor, size: int | Tensor) -> Tensor:
    """(B, n) bool: the `size` (a number, or (B, 1)) tokens of highest score (B, n) that are not shown yet."""
    ranks = score.masked_fill(shown, -math.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return ~shown & (ranks < size)


def least_entropy(law: Tensor, shown: Tensor, bound: float, passes_left: int) -> Tensor:
    """(B, n) bool: tokens in the order of their entropies, until those before the last add up to more than `bound`.
    At least as many as leave no more than one pass's share for each of the others."""
    entropy = -torch.special.xlogy(law.exp(), law.exp()).sum(-1)
    rising = entropy.masked_fill(shown, math.inf).sort(-1).values
    within = (rising.cumsum(-1) - rising).nan_to_num(math.inf) <= bound  # without the last, which is the largest
    left = (~shown).sum(-1, keepdim=True)
    least = (left + passes_left - 1) // passes_left
    size = torch.maximum(torch.minimum(within.sum(-1, keepdim=True), left), least)
    return most_wanted(-entropy, shown, size)


def _uniform(key: Key, like: Tensor) -> Tensor:
    return key.uniform(tuple(like.shape), torch.float64).to(like.device)

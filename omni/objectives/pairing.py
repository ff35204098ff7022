"""Pairing of noise with data in a training batch: independent, or by minibatch optimal transport.

    independent   each item has the noise keyed by its own name: the default
    transport     the same noises, permuted among the items of equal size, GROUP of them at a time, to minimise the sum
                  over items of |eps - x0|^2 (OT-CFM, arXiv 2302.00482, section 3.2.4; the plan of equal weights is a
                  permutation)

Under transport, lines between noise and data cross less often: velocities are easier to fit and few steps lose less.
The noise of all items together is unchanged; the noise given one condition is not. Items of all captions of a batch are
permuted together, so a caption's noise depends on its data, while sampling starts from any noise. Use transport with
one condition, or to study that bias. Noise then depends on the whole batch.

Legend: R batch rows, S positions, C channels, I items of one size, N latents of an item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["independent", "transport"]
GROUP = 128  # the most items of one assignment; n items cost n^3


def transport(noise_RSC: Tensor, latents_RSC: Tensor, item_RS: Tensor, counts_I: Tensor) -> Tensor:
    """The noise of every item, exchanged between items of equal size; padding is unchanged.

    item (R, S) int64: the item of each position, -1 is padding; the positions of an item are in order. counts (I,): its
    positions. ValueError if scipy, which solves the assignment, is not installed.
    """
    solve, out = _solver(), noise_RSC.clone()
    sizes = counts_I.long().to(item_RS.device)
    for members in _groups(sizes):
        size = int(sizes[members[0]])
        where = torch.isin(item_RS, members)
        order = item_RS[where].argsort(stable=True)  # the mask is row-major: item by item, each in order
        noise, data = (value[where][order].unflatten(0, (len(members), size)) for value in (noise_RSC, latents_RSC))
        cost = torch.cdist(data.flatten(1).double(), noise.flatten(1).double()).pow(2)
        _, chosen = solve(cost.cpu().numpy())
        dealt = noise[torch.from_numpy(chosen).to(noise.device)].flatten(0, 1)
        out[where] = torch.empty_like(dealt).index_copy_(0, order, dealt)
    return out


def _groups(sizes_I: Tensor) -> list[Tensor]:
    """Items of equal size, in order, at most GROUP together."""
    return [group for size in sizes_I.unique().tolist() for group in (sizes_I == size).nonzero().flatten().split(GROUP)]


def _solver() -> Callable:
    """scipy's assignment of least cost. ValueError where it is missing."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ValueError("pairing = 'transport' needs scipy; pip install 'omni-flow[pairing]'") from None
    return linear_sum_assignment

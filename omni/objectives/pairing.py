"""How a training batch pairs noise with data: independently, or by minibatch optimal transport.

    independent   each item has the noise of its own name: the default
    transport     the same noises, dealt out to the items of equal size, GROUP of them at a time, so that the sum over
                  items of |eps - x0|^2 is least (OT-CFM, arXiv 2302.00482, section 3.2.4; the plan of equal weights
                  is a permutation)

Lines of noise and data cross less often under transport, so velocities are easier to fit and few steps lose less. The
noise of all items together is what it was. The noise of one condition is not: items of all captions of the batch are
dealt together, so a caption's noise depends on its data, while sampling starts from any noise. Use transport where
there is one condition, or where that bias is the subject. Noise depends on the whole batch then.

Legend: R rows, S positions, C channels, I items of one size, N latents of an item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["independent", "transport"]
GROUP = 128  # items that are paired with one another at most: the assignment of n items costs n^3


def transport(noise_RSC: Tensor, latents_RSC: Tensor, item_RS: Tensor, counts_I: Tensor) -> Tensor:
    """The noise of every item, exchanged between items of equal size; padding stays.

    item (R, S) int64: the item of each position, -1 is padding; the positions of an item are in order. counts (I,): its
    positions. ValueError where scipy, which solves the assignment, is not installed.
    """
    solve, out = _solver(), noise_RSC.clone()
    sizes = counts_I.long().to(item_RS.device)
    for members in _groups(sizes):
        size = int(sizes[members[0]])
        where = torch.isin(item_RS, members)
        order = item_RS[where].argsort(stable=True)  # of a row-major mask: item by item, each in its order
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
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ValueError("pairing = 'transport' needs scipy; pip install 'omni-flow[pairing]'") from None
    return linear_sum_assignment

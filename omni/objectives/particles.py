"""Particles: items in groups that share their times, for objectives that compare distributions.

    copies   M consecutive copies of one block: one context, one x0, M noises
    mixed    items of M consecutive documents (document // M), each with its own context and x0: its n-th supervised
             block, copy by copy. The group compares the distribution over all of its contexts together (as Algorithm 3
             of arXiv 2503.07565 does with labels)

A group's shared values are keyed by its name, (document, block, copy // M) or (document // M, n, copy). Copies of a
block stay together, so "copies" does not depend on packing. A "mixed" group consists of its members in the batch: with
documents in order, batches of whole runs of M documents give the same groups; a group cut by the edge of a batch is
smaller.

"copies" is biased. Given x0, the particles of time t and of time r have different distributions even at the exact flow
map, unless the context determines x0 (a caption of one picture). "mixed" has no such bias.

Legend: I items, G groups of one size, M particles in each, N latents of an item, C channels, D = N C.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.objectives.base import FlowCall, FlowObjective, Items, Trains
from omni.objectives.times import BatchNames, Name, PairDistribution, TimeDistribution
from omni.rng import Key

Grouping = Literal["copies", "mixed"]


@dataclass(frozen=True)
class Groups:
    """`members`: (G, M) item numbers, one tensor per kind (number of particles, latents of each, condition dropped).

    `names`: the keys of the values of each group; `index` (I,): the index in `names` of each item.
    """

    members: Sequence[Tensor]
    names: Sequence[Name]
    index: Tensor

    def spread(self, values_I: Tensor, found: Sequence[Tensor]) -> Tensor:
        """(I,): for each kind in `members` a tensor (G, M) or (G, 1), placed at its items; `values_I` elsewhere."""
        for members, value in zip(self.members, found, strict=True):
            values_I = values_I.index_put((members,), value.expand(members.shape).to(values_I.dtype))
        return values_I


def group_items(items: Items, num: int, how: Grouping, *, apart: bool = False) -> Groups:
    """Items in groups of `num`. Items of different size are never together; nor, if `apart`, items with and without
    their condition.

    Raises ValueError if `how` is "copies" and the copies of a block are not a multiple of `num`.
    """
    index, names = _batch_groups(items.names, num, how) if isinstance(items.names, BatchNames) else _named_groups(
        items.names, num, how
    )  # fmt: skip
    dropped = [False] * len(items) if items.is_null is None or not apart else items.is_null.tolist()
    found: dict[tuple[int, float, bool], list[int]] = {}
    for n, kind in enumerate(zip(index, items.counts.tolist(), dropped, strict=True)):
        if kind[1]:  # an item without latents (an absent block) has no group and no loss
            found.setdefault(kind, []).append(n)
    kinds: dict[tuple[int, float, bool], list[list[int]]] = {}
    for (_, size, is_null), members in found.items():
        kinds.setdefault((len(members), size, is_null), []).append(members)
    device = items.latents.device
    return Groups([torch.tensor(m, device=device) for m in kinds.values()], names, torch.tensor(index))


def _named_groups(names: Sequence[Name], num: int, how: Grouping) -> tuple[list[int], list[Name]]:
    """(group number of each item, name of each group)."""
    blocks: dict[tuple[int, int], int] = {}  # copies of each block, in order of the batch
    for document, block, _ in names:
        blocks[document, block] = blocks.get((document, block), 0) + 1
    if how == "copies":
        for copies in set(blocks.values()):
            check_copies(copies, num)
        wanted = [(document, block, copy // num) for document, block, copy in names]
    else:
        seen: dict[int, int] = {}
        place: dict[tuple[int, int], int] = {}  # the index of a block among its document's supervised ones
        for document, block in blocks:
            place[document, block] = seen.get(document, 0)
            seen[document] = place[document, block] + 1
        wanted = [(document // num, place[document, block], copy) for document, block, copy in names]
    numbers: dict[Name, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in wanted], list(numbers)


def _batch_groups(names: BatchNames, num: int, how: Grouping) -> tuple[list[int], BatchNames]:
    """The same for BatchNames."""
    if how == "copies":
        check_copies(names.copies, num)
        return [n // num for n in range(len(names))], BatchNames(-(-len(names) // num), names.copies // num)
    copies = names.copies
    index = [n // copies // num * copies + n % copies for n in range(len(names))]
    return index, BatchNames(1 + max(index, default=-1), copies)


def check_copies(copies: int, num: int) -> None:
    """ValueError unless the copies of a block fill whole groups."""
    if copies % num:
        raise ValueError(
            f"the batch has {copies} copies of a block, but the objective needs particles={num} of each; set "
            f"batch.copies to a multiple of {num}, or groups='mixed'"
        )


def gather(items: Items, value_RSC: Tensor, members_GM: Tensor) -> Tensor:
    """(R, S, C) -> (G, M, N, C): the latents of each particle, in order. All members must be of one size."""
    counts = items.counts.long()
    first = counts.cumsum(0) - counts  # items are in flat order (layout.pack)
    place = torch.arange(int(counts[members_GM[0, 0]]), device=counts.device)
    return value_RSC[items.mask][first[members_GM][..., None] + place]


def in_float32(items: Items) -> Items:
    """The same items in float32 or better: in half precision x_t and x_r round to the same values."""
    return replace(items, latents=items.latents.to(torch.promote_types(items.latents.dtype, torch.float32)))


def jump_in_float32(call: FlowCall, x: Tensor, t: Tensor, s: Tensor, items: Items) -> Tensor:
    """f(x, t, s) (R, S, C) in float32 or better; the network's input is x in the dtype of the batch."""
    wider = torch.promote_types(x.dtype, torch.float32)
    gap = (s - t).to(wider)[items.item.clamp(min=0)].unsqueeze(-1)
    return x.to(wider) + gap * call(x.to(items.latents.dtype), t, s).to(wider)


class ParticleObjective(FlowObjective, ABC):
    """An objective over groups of `particles` items (`groups`: see above) that share t and s.

    pairs    below      t from `time`, s uniform in [its low, t]
             zero       t from `time`, s = 0
             one_step   t = 1, s = 0; `time` is not used
    """

    time: TimeDistribution = TimeDistribution(kind="uniform", low=0.0, high=0.994)
    pairs: Literal["below", "zero", "one_step"] = "below"
    groups: Grouping = "mixed"
    particles: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check_time(self) -> ParticleObjective:
        if self.pairs == "one_step" and "time" in self.model_fields_set:
            raise ValueError("time has no effect with pairs='one_step' (t = 1, s = 0); leave it out, or pairs='below'")
        return self

    @property
    def trains(self) -> tuple[Trains, ...]:  # type: ignore[override]
        """Jumps to any time for "below"; else jumps to the data."""
        return ("jumps",) if self.pairs == "below" else ("data_jumps",)

    def group_times(self, groups: Groups, key: Key) -> tuple[Tensor, Tensor]:
        """(t, s) of each group, float64."""
        if self.pairs == "one_step":
            t = torch.ones(len(groups.names), dtype=torch.float64)
            return t, torch.zeros_like(t)
        return PairDistribution(kind=self.pairs, time=self.time).draw(groups.names, key)

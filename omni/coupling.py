"""Coupling: which noise belongs to which answer, where a request has many.

With noise and data paired at random, a map from noise to data learns its choice among many right answers last, and one
pass draws their mean. A coupling gives the choice to the noise: n equally good answers get n shares of it, of equal
mass, and an answer is only ever trained from noise in its own share. (In semidiscrete flow matching, arXiv 2509.25519,
the shares are cells of optimal transport.) All shares together are the standard normal noise that everybody draws, so
nothing changes for a sampler.

Here the shares are of numbers that the noise spells in signs. Along a direction of channels the mean of an item's noise
is as often above zero as below; b directions are a number of b bits, every one as likely, and answer i of n has the
numbers from 2^b i / n to 2^b (i + 1) / n (equal shares but for one number: 7 and 8 of 256 where n is 34). Noise enters
a share by changes of sign and stays as large as it was. The flow head reads the same signs
(heads.flow.ChoiceEmbedding): a map to separate answers jumps where two shares meet, which a smooth network learns
slowly and rounds off, and a row of a table is another row at once.

Numbers that begin alike should mean answers that are alike, for then what is learnt of one is of use for the others:
answers are put in order by halves that differ most along the first principal direction of what answers differ in, the
halves of halves along the second, and so on, with the same directions for all groups of a family. The orders are kept
with the model (choices.json): a network that knows them cannot be trained on with others.

An answer may be several choices at once, as a member of a class on a background: each family has a number of its own.

Legend: R rows, S positions, C channels, I items, n answers of a group, N positions of one, F families, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.document import Choice

Orders = dict[str, dict[str, list[int]]]  # family -> group -> its answers in the order of their numbers


@dataclass(frozen=True)
class Share:
    """The noise of the `place`-th of `count` answers, by the number of family `slot`."""

    slot: int
    place: int
    count: int

    def numbers(self, bits: int) -> range:
        """The answer's numbers. ValueError where there are fewer numbers than answers."""
        if self.count > 1 << bits:
            raise ValueError(f"{self.count} answers for {1 << bits} numbers; use more choice_bits in heads.flow")
        first, end = (-(-(place << bits) // self.count) for place in (self.place, self.place + 1))
        return range(first, end)


def place_of(number: int, count: int, bits: int) -> int:
    """Whose share a number is in, of `count` answers: the inverse of `Share.numbers`."""
    return number * count >> bits


def pooled(x_RSC: Tensor, item: Tensor | None, num_items: int) -> Tensor:
    """(I, C), float32 or better: the sum over an item's positions over the root of their number, which of standard
    noise has deviation 1. `item` (R, S) says whose a position is, -1 on padding; None: each row is one item."""
    x = x_RSC.to(torch.promote_types(x_RSC.dtype, torch.float32))
    if item is None:
        return x.sum(1) / x.shape[1] ** 0.5
    index = torch.where(item >= 0, item, num_items).flatten()
    total = x.new_zeros(num_items + 1, x.shape[-1]).index_add(0, index, x.flatten(0, 1))
    count = x.new_zeros(num_items + 1).index_add(0, index, x.new_ones(len(index)))
    return (total / count.clamp(min=1).sqrt().unsqueeze(-1))[:num_items]


def numbers(pooled_IC: Tensor, directions_FBC: Tensor) -> Tensor:
    """(I, F) int64 in [0, 2^b): the signs along a family's directions, the first is the highest bit."""
    F, b, C = directions_FBC.shape
    code_IFB = (pooled_IC @ directions_FBC.to(pooled_IC.dtype).view(F * b, C).T).view(-1, F, b)
    return ((code_IFB > 0).long() << _places(b, code_IFB.device)).sum(-1)


def into_shares(noise_RSC: Tensor, item: Tensor, wanted_IF: Tensor, directions_FBC: Tensor) -> Tensor:
    """Standard normal noise (R, S, C) whose items spell the wanted numbers (I, F); a negative number is any.

    Standard normal still, if all numbers are wanted equally often. In the noise's dtype; padding stays as it is.
    """
    F, b, C = directions_FBC.shape
    whole_IC = pooled(noise_RSC, item, len(wanted_IF))
    V = directions_FBC.to(whole_IC).view(F * b, C)
    code_IFB = (whole_IC @ V.T).view(-1, F, b)
    wanted = wanted_IF.to(code_IFB.device).unsqueeze(-1)
    sign = 2 * (wanted.clamp(min=0) >> _places(b, code_IFB.device) & 1) - 1
    change_IFB = torch.where(wanted >= 0, code_IFB.abs() * sign - code_IFB, 0)
    dual = torch.linalg.solve(V @ V.T, V)  # V itself, but for what rounding to a model's precision has left crooked
    count = torch.bincount(item[item >= 0], minlength=len(wanted_IF)).clamp(min=1).to(whole_IC).sqrt()
    shift_IC = change_IFB.flatten(1) @ dual / count.unsqueeze(-1)
    here = torch.where((item >= 0).unsqueeze(-1), shift_IC[item.clamp(min=0)], 0)
    return (noise_RSC.to(here.dtype) + here).to(noise_RSC.dtype)


def _places(bits: int, device: torch.device) -> Tensor:
    return torch.arange(bits - 1, -1, -1, device=device)


class Coupling:
    """The shares of all groups: `share(choice)` is that of one answer.

    families: name of a family -> name of a group -> its answers (n, N, C), all of one N and C. names: the families in
    the order of their numbers. orders: of groups that a model knows already; those of others are made and added to
    `orders`. Raises ValueError for a family without a number, sizes that differ, more answers than a number of `bits`
    tells apart, and an order of another number of answers.
    """

    def __init__(
        self,
        families: Mapping[str, Mapping[str, Tensor]],
        names: Sequence[str],
        bits: int,
        orders: Orders | None = None,
    ) -> None:
        sizes = sorted({tuple(answers.shape[1:]) for groups in families.values() for answers in groups.values()})
        if len(sizes) > 1:
            raise ValueError(f"answers of sizes {sizes} in one coupling; give pictures of one size")
        self.orders: Orders = {family: dict(groups) for family, groups in (orders or {}).items()}
        self._shares: dict[tuple[str, str], list[Share]] = {}
        for family, groups in families.items():
            if family not in names:
                known = ", ".join(names) or "none"
                raise ValueError(f"family {family!r} has no number in heads.flow.choices, which has: {known}")
            deviations = {group: (y - y.mean(0)).detach().cpu().float().flatten(1) for group, y in groups.items()}
            principal = principal_directions(torch.cat(list(deviations.values())), bits)
            known = self.orders.setdefault(family, {})
            for group, values in deviations.items():
                order = known.setdefault(group, by_halves(values @ principal.T))
                if sorted(order) != list(range(len(values))):
                    raise ValueError(
                        f"{group!r} of {family!r} has {len(values)} answers and the model knows an order of "
                        f"{len(order)}; give the source that it was trained with, or the group another name"
                    )
                shares = [Share(names.index(family), order.index(i), len(order)) for i in range(len(order))]
                shares[0].numbers(bits)
                self._shares[family, group] = shares

    def share(self, choice: Choice) -> Share:
        """Raises ValueError for a group that the coupling was not made of, or an index beyond it."""
        found = self._shares.get((choice.family, choice.group))
        if found is None:
            known = ", ".join(sorted(name for kind, name in self._shares if kind == choice.family))
            raise ValueError(
                f"no group {choice.group!r} of {choice.family!r} in the coupling; it has: {known or 'none'}"
            )
        if not 0 <= choice.index < len(found):
            raise ValueError(f"answer {choice.index} of {choice.group!r}, which has {len(found)}")
        return found[choice.index]


def quiet_directions(answers: Sequence[Tensor], num_families: int, bits: int) -> Tensor:
    """(F, b, C) orthonormal: the directions along which the wholes of answers (n, N, C) are smallest, so that what is
    left of the noise in x_t still spells its number; the quietest first. Rounded as weights in bfloat16."""
    whole = torch.cat([pooled(y, None, len(y)) for y in answers]).to("cpu", torch.float64)
    vectors = torch.linalg.eigh(whole.T @ whole / len(whole))[1].T[: num_families * bits]
    if len(vectors) < num_families * bits:
        raise ValueError(f"{num_families} numbers of {bits} bits want as many channels, latents have {whole.shape[1]}")
    return vectors.unflatten(0, (bits, num_families)).transpose(0, 1).bfloat16().float().contiguous()


def principal_directions(deviations: Tensor, count: int) -> Tensor:
    """(d, D) the first principal directions of deviations (n, D), d at most `count`."""
    wide = len(deviations) < deviations.shape[1]
    product = deviations @ deviations.T if wide else deviations.T @ deviations
    vectors = torch.linalg.eigh(product.double() / len(deviations))[1].flip(1)[:, :count].T
    return torch.nn.functional.normalize(vectors @ deviations.double(), dim=1).float() if wide else vectors.float()


def by_halves(points_ND: Tensor) -> list[int]:
    """The indices of points in an order whose halves differ along the first number, halves of these along the second,
    and so on."""

    def ordered(members: list[int], level: int) -> list[int]:
        if len(members) < 2 or level == points_ND.shape[1]:
            return members
        members = sorted(members, key=lambda i: float(points_ND[i, level]))
        half = len(members) // 2
        return ordered(members[:half], level + 1) + ordered(members[half:], level + 1)

    return ordered(list(range(len(points_ND))), 0)

"""Semidiscrete coupling: which noise belongs to which answer, where a request has many (arXiv 2509.25519).

With noise and data paired at random, a map from noise to data learns its choice among many right answers last, and one
pass draws their mean. A coupling gives the choice to the noise: the noise of n equally good answers is divided into n
cells of equal mass, and an answer is only ever trained from noise in its own cell. All cells together are the standard
normal noise that everybody draws, so nothing changes for a sampler.

A cell is where a score is highest, with the code c = V x of the noise x:

    cell_i = {x : i = argmax_j  c . p_j + g_j}            p_j = V (y_j - mean of the group), in units of its spread

With V the identity and g the dual potential this is the optimal transport of noise to the answers y. Here V are the
first few principal directions of what answers differ in, shared by all groups of a family: which of a thousand numbers
lean towards an answer a network is slow to find out, of twelve it is quick. And it reads best what is alike at all
positions, a mean over them. The potential makes the masses equal.

An answer may be several choices at once, as a member of a class on a background: one cell in each family. Families
have directions of their own, at right angles, so that their choices are independent and noise enters one cell after
the other.

Legend: n answers of a group, D numbers in an answer (positions times channels), d directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.document import Choice
from omni.rng import Key

SAMPLES = 1 << 14  # of the code, at least, which the masses of cells are measured with
STEPS = 200
AT_ONCE = 1 << 20  # scores that a step of the ascent looks at
NO_DIFFERENCE = 1e-3  # along the first direction, beside the largest difference of one number
DRAWS = 64  # of the code for each answer of the group, until one is in the cell


@dataclass(frozen=True, eq=False)
class Cell:
    """The noise of one answer: directions (d, D) orthonormal, points (n, d) and potentials (n,) of its group, its
    index. float32, on the CPU."""

    directions: Tensor
    points: Tensor
    potentials: Tensor
    index: int

    def holds(self, code: Tensor) -> Tensor:
        """Whether codes (..., d) are in the cell: bool (...)."""
        return _winner(code, self.points, self.potentials) == self.index

    def draw(self, key: Key) -> Tensor:
        """A standard normal code (d,), given that it is in the cell."""
        for attempt in range(1000):
            codes = key.fold(attempt).normal((DRAWS * len(self.points), self.points.shape[1]))
            inside = self.holds(codes).nonzero()
            if len(inside):
                return codes[inside[0, 0]]
        raise RuntimeError(f"the cell of answer {self.index} of {len(self.points)} is empty: its potential is too low")


def into_cells(noise_NC: Tensor, cells: Sequence[Cell], key: Key) -> Tensor:
    """Standard normal noise (N, C), given that it is in all the cells; what it is across their directions stays.

    Of its dtype and on its device. ValueError where N C is not the size of the answers.
    """
    moved = noise_NC.detach().to("cpu", torch.float32).flatten()
    for number, cell in enumerate(cells):
        if len(moved) != cell.directions.shape[1]:
            raise ValueError(
                f"noise of {len(moved)} numbers for answers of {cell.directions.shape[1]}: pictures with choices must "
                "have the size of the answers that their source gives"
            )
        code = cell.directions @ moved
        if not bool(cell.holds(code)):
            moved = moved + (cell.draw(key.fold("code", number)) - code) @ cell.directions
    return moved.view(noise_NC.shape).to(noise_NC)


class Coupling:
    """The cells of all groups: `cell(choice)` is that of one answer.

    families: name of a family -> name of a group -> its answers (n, N, C), n >= 2; all of one N and C. dims: directions
    of a family, at most. local: families whose directions may weigh every position by itself; those of others are one
    vector of channels, the same at all positions. Raises ValueError where a group has fewer than two answers, sizes
    differ, or answers do not.
    """

    def __init__(
        self, families: Mapping[str, Mapping[str, Tensor]], dims: int, key: Key, local: Sequence[str] = ()
    ) -> None:
        self._groups: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
        sizes = {tuple(answers.shape[1:]) for groups in families.values() for answers in groups.values()}
        if len(sizes) > 1:
            raise ValueError(f"answers of sizes {sorted(sizes)} in one coupling; give pictures of one size")
        taken = torch.zeros(0, math.prod(next(iter(sizes), (0,))))
        for family, groups in families.items():
            for group, answers in groups.items():
                if answers.ndim != 3 or len(answers) < 2:
                    shape = tuple(answers.shape)
                    raise ValueError(f"group {group!r} of {family!r} has answers {shape}; give (n, N, C), n at least 2")
            everywhere = family not in local
            deviations = {group: _deviations(answers, everywhere, taken) for group, answers in groups.items()}
            directions, spread = _principal(torch.cat(list(deviations.values())), dims)
            if float(spread.max()) < NO_DIFFERENCE * max(float(answers.std(0).max()) for answers in groups.values()):
                way_out = "; where they differ in places alone, make the family local" if everywhere else ""
                raise ValueError(f"the answers of {family!r} do not differ{way_out}")
            taken = torch.cat([taken, directions])
            for group, values in deviations.items():
                points = values @ directions.T / spread
                self._groups[family, group] = directions, points, potentials(points, key.fold(family, group))

    def cell(self, choice: Choice) -> Cell:
        """Raises ValueError for a group that the coupling was not made of, or an index beyond it."""
        found = self._group(choice.family, choice.group)
        if not 0 <= choice.index < len(found[1]):
            raise ValueError(f"answer {choice.index} of {choice.group!r}, which has {len(found[1])}")
        return Cell(*found, choice.index)

    def chosen(self, family: str, group: str, noise_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B,) int64: whose cell each noise is in. The other way to couple: noise first, then its answer.
        ValueError as of `cell`."""
        directions, points, found = self._group(family, group)
        return _winner(noise_BNC.flatten(1).float() @ directions.T, points, found)

    def _group(self, family: str, group: str) -> tuple[Tensor, Tensor, Tensor]:
        found = self._groups.get((family, group))
        if found is None:
            known = ", ".join(sorted(name for kind, name in self._groups if kind == family))
            raise ValueError(f"no group {group!r} of {family!r} in the coupling; it has: {known or 'none'}")
        return found


def _winner(code: Tensor, points: Tensor, potentials: Tensor) -> Tensor:
    """Codes (..., d) -> (...) int64: the answer with the highest score."""
    return (code @ points.T + potentials).argmax(-1)


def potentials(points: Tensor, key: Key) -> Tensor:
    """g (n,) with which each cell of `points` (n, d) has mass 1 / n: to a tenth of that for dozens of
    answers, to a half for hundreds in few directions.

    Mirror ascent on the semidual of entropic transport (arXiv 2509.25519, section 3), on one sample of codes, for many
    answers in parts; the mean of its second half.
    """
    n, d = points.shape
    scores = key.normal((max(SAMPLES, 64 * n), d)) @ points.T
    spread, found, mean = float(scores.std().clamp(min=1e-6)), torch.zeros(n), torch.zeros(n)
    parts = scores.split(max(16, AT_ONCE // n))
    for step in range(STEPS):
        shares = torch.softmax((parts[step % len(parts)] + found) * (16 / spread), 1).mean(0)
        found = found - spread / (4 + step / 4) * (shares * n).clamp(min=1e-2).log()
        if 2 * step >= STEPS:
            mean += found / (STEPS - STEPS // 2)
    return mean - mean.mean()


def _deviations(answers: Tensor, everywhere: bool, taken: Tensor) -> Tensor:
    """(n, D) from the mean of the group: with `everywhere` that of all positions, and without what lies along
    directions that are taken."""
    values = answers.detach().to("cpu", torch.float32)
    values = values - values.mean(0)
    if everywhere:
        values = values.mean(1, keepdim=True).expand_as(values)
    values = values.flatten(1)
    return values - values @ taken.T @ taken


def _principal(values: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """(d, D) orthonormal principal directions of the deviations, at most `dims`, without those along which nothing
    differs; and the spread along each (d,), not below a third of the largest."""
    wide = len(values) < values.shape[1]
    product = values @ values.T if wide else values.T @ values
    strength, vectors = torch.linalg.eigh(product.double() / len(values))
    strength, vectors = strength.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    d = max(1, min(dims, int((strength > 1e-3 * strength[0]).sum())))
    directions = vectors[:, :d].T
    if wide:
        directions = torch.nn.functional.normalize(directions @ values.double(), dim=1)
    spread = strength[:d].float()
    return directions.float().contiguous(), spread.clamp(min=float(spread[0]) / 3)

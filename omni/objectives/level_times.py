"""Distributions of level vectors: the times of all blocks of a clip at once. t = 1 is noise, t = 0 data.

A level vector has one rank in [0, 1] per block, 0 data and 1 noise; t = time.quantile(rank).

    independent     each block's rank is uniform (Diffusion Forcing, arXiv 2407.01392)
    same            one uniform rank for all blocks (full-sequence diffusion)
    nondecreasing   uniform over the nondecreasing sequences of levels 0..S; the rank is level / S (AR-Diffusion, arXiv
                    2503.07418)
    mid             a uniform block has a uniform level; the blocks on each side are uniform over the nondecreasing
                    sequences with it. Levels of one block are then closer to uniform than in `nondecreasing`
    rolling         block b has (b - i + t) / W, held inside [0, 1], for a uniform first block i of the window and
                    uniform t; with probability `startup` it has b / W + t (Rolling Diffusion, arXiv 2402.09470)
    autoregressive  a uniform block has a uniform rank, those before it 0, those after it 1
    masked          ceil(ratio B) blocks of a random order have t = 1, or a time of `mask_time`, the others 0; the ratio
                    is a truncated normal (MAR, arXiv 2406.11838, where blocks are tokens; the time is that of its head)

A vector has the blocks of one copy that follow one another without a token between them, such as those of a clip
(sequence.block_context.Neighbours). It depends on the key, its name and its number of blocks alone, not on the batch.

Legend: I items, V vectors, B the most blocks of a vector, S the level of noise, W blocks of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.config import Frozen
from omni.objectives.times import Name, TimeDistribution, stratified_I, uniform_I
from omni.rng import Key
from omni.sequence.block_context import Neighbours

Kind = Literal["independent", "same", "nondecreasing", "mid", "rolling", "autoregressive", "masked"]

# Options that only some kinds read.
READ_BY: dict[str, tuple[Kind, ...]] = {
    "time": ("independent", "same", "nondecreasing", "mid", "rolling", "autoregressive"),
    "num_levels": ("nondecreasing", "mid"),
    "window": ("rolling",),
    "startup": ("rolling",),
    "moves": ("independent", "same", "nondecreasing", "mid"),
    "mask_mean": ("masked",),
    "mask_std": ("masked",),
    "mask_low": ("masked",),
    "mask_time": ("masked",),
}


@dataclass(frozen=True)
class LevelTimes:
    """t, s: (I,) float64, the time of each item and the end of its jump. trained: (I,) bool, the items whose prediction
    belongs to the loss.

    Items that are not trained have t = 0, data, or t = 1, noise: a block after the window, or after the target, is
    independent of the others and may be left out.
    """

    t: Tensor
    s: Tensor
    trained: Tensor


class LevelTimeDistribution(Frozen):
    """The joint distribution of the times of neighbouring blocks: see the table at the head of the file.

    time: the time of a trained rank. num_levels: S of "nondecreasing" and "mid". AR-Diffusion's 1,000 levels are S =
    999; for large S, "nondecreasing" is the order statistics of independent ranks. window: W. startup: a probability.
    moves: the blocks that move in a jump: "all" of a vector, by one difference of rank (staggered), or "one" of them,
    while the others stay at their levels (schedule.level_major). Only objectives that train jumps read it.
    mask_time: the times of masked blocks; None: 1. mask_mean, mask_std, mask_low: of the mask ratio, which is normal,
    truncated to [mask_low, 1]. Here a vector has its own ratio; the published code has one for a batch.

    Raises ValueError for an option that the kind does not read.
    """

    kind: Kind = "independent"
    time: TimeDistribution = TimeDistribution(kind="uniform")
    num_levels: int = Field(default=1000, ge=1, le=100_000)
    window: int = Field(default=4, ge=1)
    startup: float = Field(default=0.1, ge=0, le=1)
    moves: Literal["all", "one"] = "all"
    mask_mean: float = 1.0
    mask_std: float = Field(default=0.25, gt=0)
    mask_low: float = Field(default=0.7, gt=0, lt=1)
    mask_time: TimeDistribution | None = None

    @model_validator(mode="after")
    def _check(self) -> LevelTimeDistribution:
        for option, kinds in READ_BY.items():
            if option in self.model_fields_set and self.kind not in kinds:
                raise ValueError(
                    f'{option} has no effect with kind "{self.kind}", only with {", ".join(kinds)}: leave it out'
                )
        low, high = self.mask_ends()
        if high - low < 1e-6:
            what = f"mask_mean = {self.mask_mean} and mask_std = {self.mask_std}"
            raise ValueError(f"{what} give the mask ratios in [{self.mask_low}, 1] no probability; move the mean there")
        return self

    def mask_ends(self) -> tuple[float, float]:
        """The probabilities that the normal mask ratio is below mask_low, and below 1."""
        ends = torch.tensor([self.mask_low, 1.0], dtype=torch.float64)
        low, high = torch.special.ndtr((ends - self.mask_mean) / self.mask_std).tolist()
        return low, high

    def draw(self, names: Sequence[Name], key: Key, purpose: str = "time") -> LevelTimes:
        """The level vectors of items, keyed by (key, purpose, document, block, copy), with s = t. The time of an
        "independent" item is that of TimeDistribution.draw. ValueError if two items have one name."""
        rank, trained = RANKS[self.kind](self, names, key, purpose)
        t = torch.where(trained, self._quantile(rank), rank)
        return LevelTimes(t, t, trained)

    def _quantile(self, rank: Tensor) -> Tensor:
        """The time of a rank."""
        if self.kind != "masked":
            return self.time.quantile(rank)
        return rank if self.mask_time is None else self.mask_time.quantile(rank)

    def draw_jumps(self, names: Sequence[Name], key: Key, diagonal: float) -> LevelTimes:
        """The same level vectors, and ends: the trained blocks of a vector, or a uniform one of them (`moves`), move by
        one uniform difference of rank, as in a pass of a schedule (sequence.schedule), at most to 0. A share `diagonal`
        of the vectors has s = t."""
        vectors = Neighbours.of(names)
        rank, trained = RANKS[self.kind](self, names, key, "time")
        gap = uniform_I(vectors.names, key, "gap")
        gap = torch.where(uniform_I(vectors.names, key, "diagonal") < diagonal, 0, gap)[vectors.group]
        if self.moves == "one":
            mover = _choice(vectors, vectors.count, key, "mover")[vectors.group]
            gap = torch.where(vectors.index == mover, gap, 0)
        t, s = (self._quantile(r.clamp(min=0)) for r in (rank, rank - gap))
        moves = trained & (gap > 0)
        t = torch.where(trained, t, rank)
        return LevelTimes(t, torch.where(moves, torch.minimum(s, t), t), trained)


# ---- ranks of each kind: (I,) float64 and whether they are trained, (I,) bool ----------------------------------------


def _independent(d: LevelTimeDistribution, names: Sequence[Name], key: Key, purpose: str) -> tuple[Tensor, Tensor]:
    return _all(stratified_I(names, key, purpose))


def _same(d: LevelTimeDistribution, names: Sequence[Name], key: Key, purpose: str) -> tuple[Tensor, Tensor]:
    vectors = Neighbours.of(names)
    return _all(stratified_I(vectors.names, key, purpose)[vectors.group])


def _nondecreasing(d: LevelTimeDistribution, names: Sequence[Name], key: Key, purpose: str) -> tuple[Tensor, Tensor]:
    vectors = Neighbours.of(names)
    uniform = vectors.padded(uniform_I(names, key, purpose))
    level = nondecreasing(torch.zeros_like(vectors.count), vectors.count, uniform, d.num_levels)
    return _all(vectors.items(level).double() / d.num_levels)


def _mid(d: LevelTimeDistribution, names: Sequence[Name], key: Key, purpose: str) -> tuple[Tensor, Tensor]:
    vectors = Neighbours.of(names)
    uniform = vectors.padded(uniform_I(names, key, purpose))
    middle = _choice(vectors, vectors.count, key, f"{purpose} middle")
    level = _choice(vectors, d.num_levels + 1, key, f"{purpose} level")
    levels = through_the_middle(middle, level, vectors.count, uniform, d.num_levels)
    return _all(vectors.items(levels).double() / d.num_levels)


def _rolling(d: LevelTimeDistribution, names: Sequence[Name], key: Key, purpose: str) -> tuple[Tensor, Tensor]:
    vectors = Neighbours.of(names)
    t = stratified_I(vectors.names, key, purpose)[vectors.group]
    first = _choice(vectors, vectors.count, key, f"{purpose} window")[vectors.group]
    startup = (uniform_I(vectors.names, key, f"{purpose} startup") < d.startup)[vectors.group]
    index = vectors.index.double()
    rank = torch.where(startup, index / d.window + t, (index - first + t) / d.window)
    return rank.clamp(0, 1), (rank >= 0) & (rank < 1)


def _autoregressive(d: LevelTimeDistribution, names: Sequence[Name], key: Key, purpose: str) -> tuple[Tensor, Tensor]:
    vectors = Neighbours.of(names)
    rank = stratified_I(vectors.names, key, purpose)[vectors.group]
    target = _choice(vectors, vectors.count, key, f"{purpose} target")[vectors.group]
    trained = vectors.index == target
    return torch.where(trained, rank, (vectors.index > target).double()), trained


def _masked(d: LevelTimeDistribution, names: Sequence[Name], key: Key, purpose: str) -> tuple[Tensor, Tensor]:
    vectors = Neighbours.of(names)
    order = vectors.padded(uniform_I(names, key, purpose), fill=2.0).argsort(dim=1).argsort(dim=1)
    low, high = d.mask_ends()
    u = low + (high - low) * uniform_I(vectors.names, key, f"{purpose} ratio")
    ratio = (d.mask_mean + d.mask_std * torch.special.ndtri(u)).clamp(d.mask_low, 1)
    masked = vectors.items(order < (ratio * vectors.count).ceil().unsqueeze(1))
    rank = torch.ones(len(masked), dtype=torch.float64) if d.mask_time is None else stratified_I(names, key, purpose)
    return torch.where(masked, rank, 0), masked


RANKS: dict[Kind, Callable[[LevelTimeDistribution, Sequence[Name], Key, str], tuple[Tensor, Tensor]]] = {
    "independent": _independent,
    "same": _same,
    "nondecreasing": _nondecreasing,
    "mid": _mid,
    "rolling": _rolling,
    "autoregressive": _autoregressive,
    "masked": _masked,
}


def _all(rank: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks that are all trained."""
    return rank, torch.ones_like(rank, dtype=torch.bool)


def _choice(vectors: Neighbours, num: Tensor | int, key: Key, purpose: str) -> Tensor:
    """(V,) int64: a uniform integer in 0..num-1 for each vector."""
    return (uniform_I(vectors.names, key, purpose) * num).long()


# ---- nondecreasing sequences ----------------------------------------------------------------------------------------


def log_counts(num_blocks: int, num_levels: int) -> Tensor:
    """(B + 1, S + 1) float64: entry [r, a] is the log of the number of nondecreasing sequences of r levels in a..S.

    The number is C(S - a + r, r): the counting table of AR-Diffusion's FoPP, M[a, f] = M[a + 1, f] + M[a, f + 1] with
    r = B - 1 - f blocks after frame f. Counts themselves overflow for long sequences.
    """
    r = torch.arange(1, num_blocks + 1, dtype=torch.float64).unsqueeze(1)
    steps = torch.log1p((num_levels - torch.arange(num_levels + 1, dtype=torch.float64)) / r)
    return torch.cat([torch.zeros(1, num_levels + 1, dtype=torch.float64), steps.cumsum(0)])


def nondecreasing(start: Tensor, count: Tensor, uniform: Tensor, num_levels: int) -> Tensor:
    """Uniform over nondecreasing sequences of `count` levels in start..S, by one inverse-CDF sample per block.

    start, count: (V,) int64. uniform: (V, B) float64 in [0, 1). Returns (V, B) int64, S after the last block. A level
    with r blocks from it on is at least a with probability N[r, a] / N[r, previous], N as in `log_counts`.
    """
    table, level, out = log_counts(uniform.shape[1], num_levels), start, torch.empty_like(uniform, dtype=torch.int64)
    for b in range(uniform.shape[1]):
        left = (count - b).clamp(min=0)  # blocks from this one on
        bound = table[left, level] + torch.log1p(-uniform[:, b])
        high = torch.full_like(level, num_levels)
        for _ in range(num_levels.bit_length()):  # bisection: the last level whose log count reaches the bound
            middle = (level + high + 1) // 2
            reached = table[left, middle] >= bound
            level, high = torch.where(reached, middle, level), torch.where(reached, high, middle - 1)
        out[:, b] = level
    return out


def through_the_middle(middle: Tensor, level: Tensor, count: Tensor, uniform: Tensor, num_levels: int) -> Tensor:
    """Block `middle` (V,) has `level` (V,). The blocks after it are uniform over the nondecreasing sequences above
    `level`, those before it over the ones below: the same, mirrored. Other arguments and result as `nondecreasing`."""
    place = torch.arange(uniform.shape[1]) - middle.unsqueeze(1)  # (V, B), relative to the middle
    distance = torch.arange(uniform.shape[1])
    after = _gathered(uniform, middle.unsqueeze(1) + 1 + distance)
    before = _gathered(uniform, middle.unsqueeze(1) - 1 - distance)
    above = nondecreasing(level, count - 1 - middle, after, num_levels)
    below = num_levels - nondecreasing(num_levels - level, middle, before, num_levels)
    sides = torch.where(place < 0, _gathered(below, -place - 1), _gathered(above, place - 1))
    return torch.where(place == 0, level.unsqueeze(1), sides)


def _gathered(value: Tensor, index: Tensor) -> Tensor:
    """value[v, index[v, b]], (V, B); an index outside of the vector gives some entry that is not used."""
    return value.gather(1, index.clamp(0, max(value.shape[1] - 1, 0)))

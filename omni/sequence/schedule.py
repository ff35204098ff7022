"""Schedules over (block, time): which blocks each refine pass moves, between which levels, and what they read.

A schedule is a matrix of integer levels: a row is a state, a column is a block. Level S is noise and level 0 is data.
Pass m computes row m + 1 from row m: it moves every block whose level falls, all at once. On a grid of S + 1 times
(samplers.schedule.time_grid), level l has the time grid[S - l].

One function gives most published schedules, `staggered(B, S, delay)`, in S + floor((B - 1) delay) passes:

    delay    the schedule
    0        full-sequence diffusion: all blocks at one level
    1        the pyramid of Diffusion Forcing (arXiv 2407.01392)
    d        AR-Diffusion: a block starts d passes after the one before it (arXiv 2503.07418)
    S / W    a rolling window of W blocks that shifts by one block every S / W passes, shorter at both ends. Its first S
             passes are the start-up of Rolling Diffusion (arXiv 2402.09470). Rolling Forcing (arXiv 2509.25161) has
             W = S: delay 1, and B + W - 1 passes
    S        block-autoregressive: one block after another, B S passes

`masked_order` and `level_major` are of another form. This module knows integers alone: no times, tensors or networks.

Legend: B blocks, S the level of noise, W blocks of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from omni.rng import Key

# What a moving block reads beside itself:
#   finished    all blocks at level 0
#   before      the blocks before it, each at its present level: causal
#   all         all blocks at their present levels: bidirectional
#   two_levels  all blocks at their present levels, and those before it also at the level that it leaves (level_major)
Reads = Literal["finished", "before", "all", "two_levels"]


class Move(NamedTuple):
    """A block falls from level `start` to level `end` in one pass."""

    block: int
    start: int
    end: int


@dataclass(frozen=True)
class Schedule:
    """A matrix of levels, and what moving blocks read.

    levels: num_passes + 1 rows of B integers in 0..num_levels. Levels never rise, every column ends at 0, and every
    pass moves at least one block. A column may begin below num_levels: at 0, its block is given. num_levels: S.

    Raises ValueError, naming row and column, for any other matrix; and for reads "two_levels" unless every pass moves
    one block, those before it are at the level that it reaches, and those after it at the level that it leaves.
    """

    levels: tuple[tuple[int, ...], ...]
    num_levels: int
    reads: Reads = "before"

    def __post_init__(self) -> None:
        _check_entries(self)
        _check_moves(self)
        if self.reads == "two_levels":
            _check_two_levels(self)

    @property
    def num_blocks(self) -> int:
        """B."""
        return len(self.levels[0])

    @property
    def num_passes(self) -> int:
        """The number of refine passes: rows - 1."""
        return len(self.levels) - 1

    def moves(self, m: int) -> tuple[Move, ...]:
        """The blocks that pass m in 0..num_passes-1 moves, in order. ValueError for another m."""
        if not 0 <= m < self.num_passes:
            raise ValueError(f"there is no pass {m}: the schedule has {self.num_passes} passes, from 0 on")
        rows = zip(self.levels[m], self.levels[m + 1], strict=True)
        return tuple(Move(b, start, end) for b, (start, end) in enumerate(rows) if end < start)

    def context(self, m: int, block: int) -> tuple[tuple[int, int], ...]:
        """The states that a moving block reads in pass m beside itself: sorted (block, level).

        A block visits a level at most once, so the pair names one state. A block that is still noise and does not move
        in the pass is left out: it is independent of all others. ValueError if `block` does not move in pass m.
        """
        moving = {move.block: move for move in self.moves(m)}
        if block not in moving:
            raise ValueError(f"pass {m} does not move block {block}; it moves {', '.join(map(str, moving))}")
        states = [(b, level) for b, level in enumerate(self.levels[m]) if b in moving or level < self.num_levels]
        if self.reads == "finished":
            states = [(b, level) for b, level in states if level == 0]
        elif self.reads == "before":
            states = states[: [b for b, _ in states].index(block)]
        elif self.reads == "two_levels":
            states += [(b, moving[block].start) for b in range(block)]
        return tuple(sorted(state for state in states if state[0] != block))

    def is_coupled(self, m: int) -> bool:
        """Whether a block that pass m moves reads another one that the pass moves.

        Then its context moves with it: the derivative of its F along the path has a term of the context too. Where no
        pass is coupled, each jump has a fixed context, as a jump after clean context has.
        """
        moving = {move.block for move in self.moves(m)}
        return any(moving & {b for b, _ in self.context(m, block)} for block in moving)


def staggered(
    num_blocks: int, num_levels: int, delay: int | Fraction | float | str, reads: Reads = "before"
) -> Schedule:
    """Block b starts after floor(b delay) passes and then falls by one level per pass.

    level[m, b] = clip(S + floor(b delay) - m, 0, S). See the table at the head of the file. At delay S a block reads
    finished blocks alone, whatever `reads` is, and no pass is coupled.

    Args:
        delay: in [0, S], exact. A float is the decimal that it prints as: 0.3 is 3/10. For thirds give Fraction(1, 3),
            or "1/3".

    Raises ValueError for other numbers. With a delay above S, some passes would move nothing.
    """
    _require_positive(blocks=num_blocks, levels=num_levels)
    step = _exact(delay)
    if not 0 <= step <= num_levels:
        raise ValueError(f"delay must be in [0, num_levels] = [0, {num_levels}], got {delay}; {num_levels} moves one "
                         "block after another")  # fmt: skip
    starts = [math.floor(b * step) for b in range(num_blocks)]
    rows = range(num_levels + starts[-1] + 1)
    levels = tuple(tuple(min(max(num_levels + start - m, 0), num_levels) for start in starts) for m in rows)
    return Schedule(levels, num_levels, reads)


def level_major(num_blocks: int, num_levels: int, reads: Reads = "two_levels") -> Schedule:
    """Refinement outside, sequence inside: for each level from noisy to clean, for each block in order.

    The general form of autoregressive distribution smoothing (arXiv 2103.15089, two levels): block b at level l is
    sampled given x^l of the blocks before it and x^(l+1) of all blocks. One block moves in each of B S passes. With
    S = 1 this is autoregressive; with B = 1 it is an ordinary sampler of S steps.

    reads: "two_levels" is the rule above. "all" leaves out x^(l+1) of the blocks before b. That is the same conditional
    distribution if x^(l+1) is x^l with independent noise added to each block (a Markov process of noise): given x^l of
    the blocks before b, their x^(l+1) adds no information. It is another one if levels share their noise, as on a path
    x_t = (1 - t) x0 + t eps.
    """
    _require_positive(blocks=num_blocks, levels=num_levels)
    last = (0,) * num_blocks
    sweeps = range(num_levels, 0, -1)
    rows = [(level - 1,) * b + (level,) * (num_blocks - b) for level in sweeps for b in range(num_blocks)]
    return Schedule((*rows, last), num_levels, reads)


def masked_order(
    num_tokens: int, rounds: int, order: Key | Sequence[int], reads: Literal["finished", "all"] = "finished"
) -> Schedule:
    """MAR (arXiv 2406.11838): tokens in random order, several per round; a token goes from unknown (1) to known (0).

    A column is a token, and `cosine_known` gives the number of known ones after each round. Tokens of one round are
    sampled independently given the known ones. The head's own chain inside a round has no levels here.

    Args:
        rounds: 1 to num_tokens; the paper has 64 (256 are best) for 256 tokens.
        order: the tokens in the order of becoming known, or a key of a uniformly random order.
    """
    known = cosine_known(num_tokens, rounds)
    if isinstance(order, Key):
        order = order.python().sample(range(num_tokens), num_tokens)
    if sorted(order) != list(range(num_tokens)):
        raise ValueError(f"order must have each of the tokens 0..{num_tokens - 1} once, got {list(order)}")
    place = {token: n for n, token in enumerate(order)}
    return Schedule(tuple(tuple(int(place[t] >= k) for t in range(num_tokens)) for k in (0, *known)), 1, reads)


def cosine_known(num_tokens: int, rounds: int) -> list[int]:
    """MAR's number of known tokens after each of n rounds (arXiv 2406.11838): L - floor(L cos(pi/2 (k + 1) / n)) after
    round k, and at least one more than before. All are known after the last round, and not before. ValueError unless
    1 <= n <= L."""
    _require_positive(tokens=num_tokens)
    if not 1 <= rounds <= num_tokens:
        raise ValueError(f"rounds must be in 1..{num_tokens}, the number of tokens, got {rounds}")
    known = [0]
    for k in range(rounds):
        masked = max(math.floor(num_tokens * math.cos(math.pi / 2 * (k + 1) / rounds)), 0)  # cos may round below 0
        known.append(max(num_tokens - masked, known[-1] + 1))
    return known[1:]


def linear_guidance(schedule: Schedule, scale: float) -> list[float]:
    """The guidance scale of each pass: 1 + (scale - 1) times the share of blocks that are data after it (MAR's "linear"
    schedule, arXiv 2406.11838). The last pass has `scale`; the published code counts one token as unknown there."""
    shares = [row.count(0) / schedule.num_blocks for row in schedule.levels[1:]]
    return [1 + (scale - 1) * share for share in shares]


def _exact(delay: int | Fraction | float | str) -> Fraction:
    """The delay as a fraction, a float by its shortest decimal."""
    try:
        return Fraction(str(delay))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"delay must be a finite number such as 1, 0.5 or '1/3', got {delay!r}") from None


def _require_positive(**counts: int) -> None:
    """ValueError for a count below 1."""
    for what, count in counts.items():
        if count < 1:
            raise ValueError(f"a schedule needs at least one of its {what}, got num_{what} = {count}")


def _check_entries(schedule: Schedule) -> None:
    """ValueError unless the matrix has rows of one length with integers in 0..S, and `reads` is known."""
    rows, S = schedule.levels, schedule.num_levels
    _require_positive(levels=S)
    if not rows or not rows[0]:
        raise ValueError("the matrix of levels is empty; a schedule has at least one row and one block")
    if schedule.reads not in get_args(Reads):
        raise ValueError(f"reads must be one of {', '.join(get_args(Reads))}, got {schedule.reads!r}")
    for m, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {m} has {len(row)} columns, but row 0 has {len(rows[0])}; give a level per block")
        for b, level in enumerate(row):
            if type(level) is not int or not 0 <= level <= S:
                raise ValueError(f"row {m}, column {b}: a level is an integer in 0..{S}, got {level!r}")


def _check_moves(schedule: Schedule) -> None:
    """ValueError unless levels never rise, every pass moves a block, and every block ends at 0."""
    for m, (row, following) in enumerate(pairwise(schedule.levels), 1):
        for b, (level, other) in enumerate(zip(row, following, strict=True)):
            if other > level:
                raise ValueError(f"row {m}, column {b}: the level rises from {level} to {other}; levels never rise")
        if row == following:
            raise ValueError(f"row {m} equals row {m - 1} in all columns; each pass must move a block: leave it out")
    for b, level in enumerate(schedule.levels[-1]):
        if level:
            raise ValueError(f"row {schedule.num_passes}, column {b}: the last level must be 0 (data), got {level}")


def _check_two_levels(schedule: Schedule) -> None:
    """ValueError unless the matrix is in level-major order."""
    for m, row in enumerate(schedule.levels[:-1]):
        b, start, end = schedule.moves(m)[0]
        if row != (end,) * b + (start,) * (len(row) - b) or len(schedule.moves(m)) > 1:
            raise ValueError(
                f"row {m}, column {b}: reads 'two_levels' needs level-major order, but pass {m} moves {start} -> {end} "
                f"at levels {row}; see level_major"
            )

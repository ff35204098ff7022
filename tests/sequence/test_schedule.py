"""Schedules over (block, time): published matrices built by loops, numbers of passes, what blocks read, bad input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product
from typing import get_args

import pytest

from omni.heads.joint.masked_sampling import reveal_sizes
from omni.rng import Key
from omni.sequence.schedule import (
    Move,
    Reads,
    Schedule,
    cosine_known,
    level_major,
    linear_guidance,
    masked_order,
    staggered,
)

Rows = list[tuple[int, ...]]
DELAYS = (0, 1, 2, Fraction(1, 3), Fraction(5, 2), 0.3, 0.7, "3/2", 1.0)
SIZES = list(product((1, 2, 3, 5, 12), (1, 2, 3, 4, 6)))


def rows_of_passes(levels: list[int], passes: Sequence[Sequence[int]]) -> Rows:
    """The states from `levels` on, where each pass lowers the levels of its blocks by one."""
    rows = [tuple(levels)]
    for blocks in passes:
        for block in blocks:
            levels[block] -= 1
        rows.append(tuple(levels))
    return rows


def waiting(B: int, S: int, delay: Fraction) -> Rows:
    """Block by block: wait, then fall by one level per pass."""
    columns = []
    for b in range(B):
        wait = int(b * delay)
        columns.append([S] * wait + list(range(S, -1, -1)))
    length = max(map(len, columns))
    return list(zip(*(column + [0] * (length - len(column)) for column in columns), strict=True))


def rolling(B: int, W: int, steps: int) -> Rows:
    """A window of W blocks stays for `steps` passes, each of which moves all its blocks, and then shifts by one.
    Windows at both ends are shorter: the first one has the first block alone, the last one the last block."""
    windows = [range(max(0, first), min(B, first + W)) for first in range(1 - W, B)]
    return rows_of_passes([W * steps] * B, [window for window in windows for _ in range(steps)])


def start_up_and_shifts(B: int, W: int, steps: int) -> Rows:
    """Rolling Diffusion: S passes take block w from clip(w / W + 1) to clip(w / W), then the window shifts."""
    S = W * steps
    rows = [tuple(min(w * steps + S - m, S) for w in range(B)) for m in range(S + 1)]
    for first in range(1, B):
        rows += [tuple(min(max((b - first + 1) * steps - m, 0), S) for b in range(B)) for m in range(1, steps + 1)]
    return rows


# ---- staggered ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", DELAYS)
def test_staggered_equals_a_loop_over_blocks(delay: Fraction | float | str) -> None:
    exact = Fraction(str(delay))
    for B, S in SIZES:
        if exact > S:
            continue
        schedule = staggered(B, S, delay)
        assert list(schedule.levels) == waiting(B, S, exact)
        assert schedule.num_passes == S + math.floor((B - 1) * exact)
        assert schedule.num_blocks == B and set(schedule.levels[-1]) == {0} and set(schedule.levels[0]) == {S}
        for row, following in pairwise(schedule.levels):
            assert all(0 <= a - b <= 1 for a, b in zip(row, following, strict=True)) and row != following


def test_counts_of_passes() -> None:
    """AR-Diffusion's generator has the same counts."""
    assert [staggered(3, 4, u).num_passes for u in (0, 1, 2, 4)] == [4, 6, 8, 12]
    assert [staggered(7, 4, u).num_passes for u in ("1/2", "1/3", 0.3, 0.9)] == [7, 6, 5, 9]


def test_floats_are_their_decimals() -> None:
    """The binary value of 0.3 is below 3/10: its floor at block 10 would be 2."""
    assert math.floor(10 * Fraction(0.3)) == 2
    assert staggered(11, 1, 0.3) == staggered(11, 1, Fraction(3, 10))
    assert staggered(11, 1, 0.3).num_passes == 4


def test_the_ends_are_full_sequence_and_block_autoregressive() -> None:
    for B, S in SIZES:
        full = rows_of_passes([S] * B, [range(B)] * S)
        one_by_one = rows_of_passes([S] * B, [[b] for b in range(B) for _ in range(S)])
        assert list(staggered(B, S, 0).levels) == full
        assert list(staggered(B, S, S).levels) == one_by_one


def test_rolling_windows_are_staggered() -> None:
    """Windows as long as the levels are the pyramid of delay 1; longer stays are larger delays; the start-up of Rolling
    Diffusion is the same matrix too. So there is no function for windows."""
    for B, W in product((1, 2, 3, 5, 9), (1, 2, 3, 4)):
        assert list(staggered(B, W, 1).levels) == rolling(B, W, 1)
        assert staggered(B, W, 1).num_passes == B + W - 1
        for steps in (1, 2, 5):
            S = W * steps
            window = staggered(B, S, Fraction(S, W), reads="all")
            assert list(window.levels) == rolling(B, W, steps) == start_up_and_shifts(B, W, steps)
            moving = [len(window.moves(m)) for m in range(window.num_passes)]
            assert max(moving) == min(B, W) and moving[0] == 1


def test_orders_with_one_level_are_autoregressive() -> None:
    for B in (1, 2, 5):
        rows = staggered(B, 1, 1).levels
        assert level_major(B, 1).levels == masked_order(B, B, range(B)).levels == rows
    assert level_major(1, 6).levels == staggered(1, 6, 0).levels


# ---- level-major ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "S"), SIZES)
def test_level_major_equals_two_loops(B: int, S: int) -> None:
    schedule = level_major(B, S)
    assert list(schedule.levels) == rows_of_passes([S] * B, [[b] for _ in range(S) for b in range(B)])
    assert schedule.num_passes == B * S
    seen = set()
    m = 0
    for level in reversed(range(S)):  # the new level
        for block in range(B):
            assert schedule.moves(m) == (Move(block, level + 1, level),)
            new = {(b, level) for b in range(block)}
            old = {(b, level + 1) for b in range(B) if b != block and (level + 1 < S or b < block)}
            assert set(schedule.context(m, block)) == new | old
            assert {state for state in old | new if state[1] < S} <= seen, "states that exist"
            one = level_major(B, S, reads="all")
            assert set(one.context(m, block)) == new | {state for state in old if state[0] > block}
            assert not schedule.is_coupled(m)
            seen.add((block, level))
            m += 1


# ---- masked order ---------------------------------------------------------------------------------------------------


def test_known_counts_equal_the_formula() -> None:
    L, n = 256, 64
    known, formula = cosine_known(L, n), [L - math.floor(L * math.cos(math.pi / 2 * (k + 1) / n)) for k in range(n)]
    assert formula[:10] == [1, 1, 1, 2, 2, 3, 4, 5, 7, 8], "its first rounds reveal too few"
    assert known[:10] == list(range(1, 11)) and known[-1] == L
    first = next(k for k in range(n) if formula[k] > k + 1)
    assert first == 13 and known[:first] == list(range(1, first + 1)) and known[first:] == formula[first:]


def test_every_round_reveals_a_token_and_the_last_one_all() -> None:
    """Against the published loop over the masked ones, which keeps one for the next round and takes all in the last."""
    for L in range(1, 40):
        for n in range(1, L + 1):
            masked, wanted = L, []
            for k in range(n):
                keep = math.floor(L * math.cos(math.pi / 2 * (k + 1) / n))
                masked = max(1, min(masked - 1, keep)) if k < n - 1 else 0
                wanted.append(L - masked)
            assert cosine_known(L, n) == wanted and wanted[-1] == L
            assert [0, *wanted] == sorted({0, *wanted})
            assert [b - a for a, b in pairwise([0, *wanted])] == reveal_sizes(L, n, "cosine")


def test_masked_order_reveals_in_order() -> None:
    order = [3, 0, 4, 2, 1, 5]
    schedule = masked_order(6, 3, order)
    known = cosine_known(6, 3)
    for m in range(3):
        revealed = sorted(order[([0, *known])[m] : known[m]])
        assert [move.block for move in schedule.moves(m)] == revealed
        before = {(token, 0) for token in order[: ([0, *known])[m]]}
        assert all(set(schedule.context(m, token)) == before for token in revealed)
        assert not schedule.is_coupled(m)
    assert schedule.num_levels == 1 and schedule.reads == "finished"


def test_masked_order_is_keyed() -> None:
    one, again, other = (masked_order(40, 8, Key(n).fold("order")) for n in (0, 0, 1))
    assert one == again and one != other
    assert [row.count(0) for row in one.levels] == [row.count(0) for row in other.levels] == [0, *cosine_known(40, 8)]
    first = [masked_order(4, 4, Key(n)).moves(0)[0].block for n in range(400)]
    assert all(70 < first.count(token) < 130 for token in range(4))  # 100, deviation 8.7


def test_linear_guidance() -> None:
    schedule = masked_order(256, 64, Key(0))
    masked = [256 - known for known in cosine_known(256, 64)]
    scales = linear_guidance(schedule, 3.0)
    assert scales == pytest.approx([1 + 2 * (256 - m) / 256 for m in masked], abs=1e-12)
    assert scales == sorted(scales) and scales[-1] == 3.0 and len(scales) == schedule.num_passes
    assert linear_guidance(staggered(2, 2, 2), 5.0) == [1.0, 3.0, 3.0, 5.0]


# ---- what a block reads ---------------------------------------------------------------------------------------------


def test_contexts_equal_a_slow_rule() -> None:
    for B, S, delay in product((1, 2, 4), (1, 2, 3), (0, "1/2", 1, 2)):
        if Fraction(str(delay)) > S:
            continue
        for reads in ("finished", "before", "all"):
            schedule = staggered(B, S, delay, reads)
            for m in range(schedule.num_passes):
                row, after = schedule.levels[m : m + 2]
                for block in range(B):
                    if row[block] == after[block]:
                        continue
                    wanted = []
                    for b in range(B):
                        present = row[b] < S or after[b] < S  # has left noise, or leaves it now
                        allowed = {"finished": row[b] == 0, "before": b < block, "all": b != block}[reads]
                        if present and allowed:
                            wanted.append((b, row[b]))
                    assert schedule.context(m, block) == tuple(wanted)


def test_block_autoregressive_reads_finished_blocks_alone() -> None:
    schedules = [staggered(4, 3, 3, reads) for reads in ("finished", "before", "all")]
    for m in range(schedules[0].num_passes):
        [move] = schedules[0].moves(m)
        contexts = {schedule.context(m, move.block) for schedule in schedules}
        assert contexts == {tuple((b, 0) for b in range(move.block))}
        assert not any(schedule.is_coupled(m) for schedule in schedules)


def test_coupled_passes() -> None:
    """Blocks that move together are coupled where one reads the other."""
    pyramid = [staggered(3, 2, 1, reads) for reads in ("finished", "before", "all")]
    moving = [len(pyramid[0].moves(m)) for m in range(4)]
    assert moving == [1, 2, 2, 1]
    coupled = [[schedule.is_coupled(m) for m in range(4)] for schedule in pyramid]
    assert coupled == [[False] * 4, [False, True, True, False], [False, True, True, False]]


def test_given_blocks_are_read_and_do_not_move() -> None:
    schedule = Schedule(((0, 2, 2), (0, 1, 2), (0, 0, 1), (0, 0, 0)), 2)
    assert [tuple(move.block for move in schedule.moves(m)) for m in range(3)] == [(1,), (1, 2), (2,)]
    assert schedule.context(1, 2) == ((0, 0), (1, 1)) and schedule.is_coupled(1)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "S", "words"),
    [
        ((), 2, "empty"),
        (((),), 2, "empty"),
        (((2, 2), (1,)), 2, "row 1 has 1 columns"),
        (((2, 3), (0, 0)), 2, "row 0, column 1.*0..2, got 3"),
        (((2, -1), (0, 0)), 2, "row 0, column 1.*got -1"),
        (((2.0,), (0,)), 2, "row 0, column 0.*got 2.0"),
        (((True,), (0,)), 2, "row 0, column 0.*got True"),
        (((2, 2), (1, 1), (0, 2), (0, 0)), 2, "row 2, column 1.*rises from 1 to 2"),
        (((2, 1), (2, 1), (0, 0)), 2, "row 1 equals row 0"),
        (((2, 2), (0, 1)), 2, "row 1, column 1.*must be 0"),
        (((1,), (0,)), 0, "num_levels = 0"),
    ],
)
def test_bad_matrices_name_row_and_column(levels: tuple, S: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(levels, S)


def test_two_levels_need_level_major_order() -> None:
    levels = staggered(3, 2, 1).levels
    with pytest.raises(ValueError, match="row 1, column 0.*level-major.*pass 1 moves 1 -> 0"):
        Schedule(levels, 2, "two_levels")
    with pytest.raises(ValueError, match="row 0, column 0"):
        Schedule(staggered(3, 2, 0).levels, 2, "two_levels")
    jumps = Schedule(((4, 4), (1, 4), (1, 1), (0, 1), (0, 0)), 4, "two_levels")  # levels may be left out
    assert jumps.context(3, 1) == ((0, 0), (0, 1))
    assert Schedule(level_major(3, 2).levels, 2, "two_levels") == level_major(3, 2)


def test_other_bad_input() -> None:
    for delay in (-1, 4.5, "9/2", -0.1):
        with pytest.raises(ValueError, match=r"delay must be in \[0, num_levels\] = \[0, 4\]"):
            staggered(3, 4, delay)
    for delay in (math.nan, math.inf, "soon", "1/0"):
        with pytest.raises(ValueError, match="finite number such as"):
            staggered(3, 4, delay)
    for blocks, levels in ((0, 1), (1, 0)):
        for build in (lambda B, S: staggered(B, S, 0), level_major):
            with pytest.raises(ValueError, match="at least one"):
                build(blocks, levels)
    for rounds in (0, 5, -1):
        with pytest.raises(ValueError, match=r"rounds must be in 1\.\.4"):
            cosine_known(4, rounds)
    for order in ([0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=r"each of the tokens 0\.\.3 once"):
            masked_order(4, 2, order)
    schedule = staggered(3, 4, 4)
    with pytest.raises(ValueError, match="no pass 12"):
        schedule.moves(12)
    with pytest.raises(ValueError, match="no pass -1"):
        schedule.moves(-1)
    with pytest.raises(ValueError, match="pass 0 does not move block 1; it moves 0"):
        schedule.context(0, 1)
    with pytest.raises(ValueError, match="reads must be one of finished"):
        staggered(3, 4, 4, reads="nothing")  # type: ignore[arg-type]
    assert set(get_args(Reads)) == {"finished", "before", "all", "two_levels"}

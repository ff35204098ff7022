"""Level vectors: exact distributions by enumeration, keys, ranks of each kind, bad options; fused SNR weights."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import product
from statistics import NormalDist
from typing import get_args

import pytest
import torch
from torch import Tensor

from omni.config import build
from omni.objectives.level_times import (
    RANKS,
    READ_BY,
    Kind,
    LevelTimeDistribution,
    log_counts,
    nondecreasing,
    through_the_middle,
)
from omni.objectives.times import BatchNames, Name, TimeDistribution
from omni.objectives.weighting import Prediction, fused_snr
from omni.rng import Key
from omni.sequence.block_context import Neighbours
from omni.sequence.schedule import staggered

F, T = 3, 5  # blocks and levels of the enumerations
SEQUENCES = [s for s in product(range(T), repeat=F) if list(s) == sorted(s)]
KINDS = get_args(Kind)


def of_size(blocks: int, documents: int, copies: int = 1) -> list[Name]:
    return [(d, b, c) for d in range(documents) for b in range(blocks) for c in range(copies)]


def ragged(documents: int = 40, copies: int = 2) -> list[Name]:
    """Documents of 1 to 6 neighbouring blocks, whose numbers do not start at 0."""
    return [(7 * d, 3 + b, c) for d in range(documents) for b in range(1 + d % 6) for c in range(copies)]


def drawn(kind: Kind, blocks: int, documents: int, key: int = 0, **options: object) -> Tensor:
    """(documents, blocks) times."""
    names = of_size(blocks, documents)
    return LevelTimeDistribution.model_validate({"kind": kind, **options}).draw(names, Key(key)).t.view(-1, blocks)


def midpoints(*sizes: int) -> Tensor:
    """(product of sizes, len(sizes)): the midpoints of a grid of the unit cube, all equally likely."""
    axes = [(torch.arange(size, dtype=torch.float64) + 0.5) / size for size in sizes]
    return torch.cartesian_prod(*axes)


# ---- nondecreasing sequences ----------------------------------------------------------------------------------------


def test_counts_are_those_of_the_published_table() -> None:
    table = log_counts(F, T - 1).exp()
    M = [[1] * F for _ in range(T)]  # M[t][f]: the sequences that go on from level t of frame f
    for t in reversed(range(T - 1)):
        for f in reversed(range(F - 1)):
            M[t][f] = M[t + 1][f] + M[t][f + 1]
    for t, f in product(range(T), range(F)):
        assert float(table[F - 1 - f, t]) == pytest.approx(M[t][f], rel=1e-14)
    assert len(SEQUENCES) == 35 == round(float(table[F, 0]))
    large = log_counts(40, 300)
    exact = [[math.log(math.comb(300 - a + r, r)) for a in range(301)] for r in range(41)]
    torch.testing.assert_close(large, torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=1e-12)


def test_nondecreasing_is_uniform_by_enumeration() -> None:
    """The sampler is a function of one uniform per block. Its conditional probabilities have denominators 35; 1, 3, 6,
    10, 15; and 1 to 5. So on a grid of 35 x 30 x 60 midpoints every sequence must appear equally often."""
    u = midpoints(35, 30, 60)
    zero, three = torch.zeros(len(u), dtype=torch.int64), torch.full((len(u),), F)
    found = Counter(map(tuple, nondecreasing(zero, three, u, T - 1).tolist()))
    assert found == dict.fromkeys(SEQUENCES, len(u) // 35)


def test_nondecreasing_samples_are_uniform() -> None:
    t = drawn("nondecreasing", F, 7000, num_levels=T - 1)
    levels = (t * (T - 1)).round().long()
    torch.testing.assert_close(t, levels.double() / (T - 1), rtol=0, atol=0)
    found = Counter(map(tuple, levels.tolist()))
    assert set(found) == set(SEQUENCES)
    chi2 = sum((n - 200) ** 2 / 200 for n in found.values())
    assert 15 < chi2 < 61  # 34 degrees of freedom: .3 % on each side
    for block, wanted in ((0, (0.43, 0.29, 0.17, 0.09, 0.03)), (1, (0.14, 0.23, 0.26, 0.23, 0.14))):
        exact = [sum(s[block] == level for s in SEQUENCES) / 35 for level in range(T)]
        assert exact == pytest.approx(wanted, abs=0.005)
        share = torch.bincount(levels[:, block], minlength=T) / 7000
        assert share.tolist() == pytest.approx(exact, abs=4 * (0.25 / 7000) ** 0.5)


def mid_probabilities() -> dict[tuple[int, ...], Fraction]:
    """Uniform block, uniform level, and uniform over the sequences with it: the sides are independent."""
    found = dict.fromkeys(SEQUENCES, Fraction(0))
    for block, level in product(range(F), range(T)):
        through = [s for s in SEQUENCES if s[block] == level]
        for s in through:
            found[s] += Fraction(1, F * T * len(through))
    return found


def test_mid_equals_its_enumeration() -> None:
    """Exactly, as above: with the middle and its level given, the other two uniforms run over a grid of 60 x 60."""
    exact = mid_probabilities()
    found: Counter[tuple[int, ...]] = Counter()
    grid = midpoints(60, 60)
    for middle, level in product(range(F), range(T)):
        u = torch.cat([grid[:, :middle], torch.full((len(grid), 1), 0.123, dtype=torch.float64), grid[:, middle:]], 1)
        full = [torch.full((len(grid),), value) for value in (middle, level, F)]
        found.update(map(tuple, through_the_middle(*full, u, T - 1).tolist()))
    assert {s: Fraction(n, F * T * len(grid)) for s, n in found.items()} == exact
    marginal = [[sum(p for s, p in exact.items() if s[b] == level) for level in range(T)] for b in range(F)]
    assert marginal[1] == [Fraction(1, 5)] * 5
    assert [float(p) for p in marginal[0]] == pytest.approx([0.41, 0.23, 0.16, 0.11, 0.08], abs=0.005)
    assert marginal[2] == marginal[0][::-1]
    levels = (drawn("mid", F, 7000, num_levels=T - 1) * (T - 1)).round().long()
    samples = Counter(map(tuple, levels.tolist()))
    chi2 = sum((samples[s] - 7000 * float(p)) ** 2 / (7000 * float(p)) for s, p in exact.items())
    assert 15 < chi2 < 61 and set(samples) <= set(exact)


def test_many_levels_are_order_statistics() -> None:
    """The median of the least of B uniforms is 1 - .5^(1/B); counts beyond float64 do not overflow."""
    for B in (1, 4, 20):
        u = torch.full((1, B), 0.5, dtype=torch.float64)
        start, count = torch.zeros(1, dtype=torch.int64), torch.tensor([B])
        level = nondecreasing(start, count, u, 10_000)[0]
        assert float(level[0]) / 10_000 == pytest.approx(1 - 0.5 ** (1 / B), abs=2e-3)
    assert float(log_counts(600, 1000).max()) > math.log(1e308)
    for kind in ("nondecreasing", "mid"):
        long = drawn(kind, 600, 5, num_levels=1000)
        assert bool((long.diff(dim=1) >= 0).all()) and float(long.min()) >= 0 and float(long.max()) <= 1
        assert len(long.unique()) > 300


@pytest.mark.parametrize("kind", ["nondecreasing", "mid"])
def test_documents_of_different_lengths_have_their_own_distribution(kind: Kind) -> None:
    """Short documents beside long ones: the marginals of enumeration for each number of blocks."""
    names = [(d, b, 0) for d in range(6000) for b in range(1 + d % 3)]
    times = LevelTimeDistribution(kind=kind, num_levels=T - 1).draw(names, Key(3)).t
    vectors = Neighbours.of(names)
    levels = (vectors.padded(times, -1.0) * (T - 1)).round().long()
    for blocks in (1, 2):
        mine = levels[vectors.count == blocks][:, :blocks]
        all_ = [s for s in product(range(T), repeat=blocks) if list(s) == sorted(s)]
        if kind == "nondecreasing" or blocks == 1:
            exact = dict.fromkeys(all_, 1 / len(all_))
        else:
            exact = {s: 0.5 / T * (1 / (T - s[0]) + 1 / (1 + s[1])) for s in all_}
        found = Counter(map(tuple, mine.tolist()))
        for s, p in exact.items():
            assert found[s] / len(mine) == pytest.approx(p, abs=4.5 * (p * (1 - p) / len(mine)) ** 0.5)


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_has_the_same_times_alone_and_in_any_batch(kind: Kind) -> None:
    names, distribution = ragged(), LevelTimeDistribution(kind=kind)
    whole = distribution.draw(names, Key(5))
    assert whole.t.dtype == torch.float64 and whole.trained.dtype == torch.bool and len(whole.t) == len(names)
    assert bool(((whole.t >= 0) & (whole.t <= 1)).all())
    for document in (0, 35, 7 * 17):
        mine = [n for n, name in enumerate(names) if name[0] == document]
        alone = distribution.draw([names[n] for n in mine], Key(5))
        assert torch.equal(alone.t, whole.t[mine]) and torch.equal(alone.trained, whole.trained[mine])
    order = torch.randperm(len(names), generator=Key(0).generator()).tolist()
    mixed = distribution.draw([names[n] for n in order], Key(5))
    assert torch.equal(mixed.t, whole.t[order]) and torch.equal(mixed.trained, whole.trained[order])
    for other in (distribution.draw(names, Key(6)), distribution.draw(names, Key(5), "another")):
        assert not torch.equal(other.t, whole.t)
    assert len(distribution.draw([], Key(5)).t) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_copies_have_vectors_of_their_own(kind: Kind) -> None:
    names, distribution = of_size(6, 30, copies=2), LevelTimeDistribution(kind=kind)
    both = distribution.draw(names, Key(1))
    t = both.t.view(30, 6, 2)
    assert not torch.equal(t[..., 0], t[..., 1])
    if kind in ("independent", "same"):  # one offset, evenly spaced copies
        apart = (t[..., 0] - t[..., 1]).abs()
        torch.testing.assert_close(apart, torch.full_like(apart, 0.5), rtol=0, atol=1e-12)


def test_vectors_group_and_order_items() -> None:
    """A gap in the numbers of blocks is a token between them: another vector begins."""
    names = [(9, 5, 1), (2, 0, 0), (9, 4, 0), (9, 5, 0), (9, 4, 1), (9, 7, 0)]
    vectors = Neighbours.of(names)
    assert vectors.names == [(2, 0, 0), (9, 4, 0), (9, 7, 0), (9, 4, 1)] and vectors.count.tolist() == [1, 2, 1, 2]
    value = torch.arange(6.0)
    assert vectors.padded(value, -1).tolist() == [[1, -1], [2, 3], [5, -1], [4, 0]]
    assert torch.equal(vectors.items(vectors.padded(value)), value)
    with pytest.raises(ValueError, match=r"two items have the name \(2, 0, 0\)"):
        Neighbours.of([*names, (2, 0, 0)])


# ---- the other kinds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", [TimeDistribution(), TimeDistribution(kind="uniform", shift=3.0, low=0.1)])
def test_independent_equals_the_distribution_of_one_time(time: TimeDistribution) -> None:
    for names in (ragged(), BatchNames(50, 2)):
        found = LevelTimeDistribution(kind="independent", time=time).draw(names, Key(2))
        assert torch.equal(found.t, time.draw(names, Key(2))) and bool(found.trained.all())


def test_same_is_one_time_per_document() -> None:
    t = drawn("same", 4, 2000)
    assert bool((t == t[:, :1]).all())
    ranks = t[:, 0].sort().values
    assert float((ranks - torch.arange(2000) / 2000).abs().max()) < 2 / 2000**0.5  # uniform: Kolmogorov and Smirnov


def test_times_are_quantiles_of_ranks() -> None:
    time = TimeDistribution(kind="logit_normal", mean=0.3, shift=2.0)
    names = of_size(5, 50)
    for kind in KINDS:
        if kind == "masked":
            continue
        rank = LevelTimeDistribution(kind=kind).draw(names, Key(4))
        found = LevelTimeDistribution(kind=kind, time=time).draw(names, Key(4))
        assert torch.equal(found.trained, rank.trained)
        assert torch.equal(found.t[rank.trained], time.quantile(rank.t)[rank.trained])
        assert torch.equal(found.t[~rank.trained], rank.t[~rank.trained])
        assert set(rank.t[~rank.trained].tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(("B", "W"), [(1, 3), (4, 4), (9, 3), (3, 5)])
def test_rolling_vectors_lie_on_the_path_of_the_sampler(B: int, W: int) -> None:
    """Every vector is clip(b / W + r, 0, 1): the rows of staggered(B, S, S / W) have the same form with r = 1 - m / S.
    Steady windows have r in [-(B - 1) / W, 1 / W], the start-up r in [0, 1]; both are uniform there."""
    S, b = 2 * W, torch.arange(B, dtype=torch.float64)
    for m, row in enumerate(staggered(B, S, Fraction(S, W)).levels):
        torch.testing.assert_close(torch.tensor(row).double() / S, (b / W + 1 - m / S).clamp(0, 1))
    for startup, low, high in ((0.0, -(B - 1) / W, 1 / W), (1.0, 0.0, 1.0)):
        options = LevelTimeDistribution(kind="rolling", window=W, startup=startup)
        drawn = options.draw(of_size(B, 1500), Key(7))
        t, trained = drawn.t.view(-1, B), drawn.trained.view(-1, B)
        assert bool(trained.any(1).all())
        first = trained.long().argmax(1)
        r = t.gather(1, first.unsqueeze(1)) - (first / W).unsqueeze(1).double()
        torch.testing.assert_close(t, (b / W + r).clamp(0, 1), rtol=0, atol=1e-6)
        assert torch.equal(trained, (t > 0) & (t < 1))
        ranks = ((r.flatten().sort().values - low) / (high - low)) - torch.arange(1500) / 1500
        assert float(ranks.abs().max()) < 2 / 1500**0.5


def test_rolling_starts_up_with_its_probability() -> None:
    """Window and document have two blocks. Only the start-up has the second at noise and the first at t > 1/2."""
    t = drawn("rolling", 2, 4000, window=2, startup=0.3)
    share = float(((t[:, 0] > 0.5) & (t[:, 1] == 1)).double().mean())
    assert share == pytest.approx(0.3 / 2, abs=4 * (0.15 * 0.85 / 4000) ** 0.5)


def test_autoregressive_has_one_target() -> None:
    names = of_size(4, 4000)
    found = LevelTimeDistribution(kind="autoregressive").draw(names, Key(8))
    t, trained = found.t.view(-1, 4), found.trained.view(-1, 4)
    assert bool((trained.sum(1) == 1).all())
    target = trained.long().argmax(1)
    for block in range(4):
        mine = t[target == block]
        assert len(mine) / 4000 == pytest.approx(0.25, abs=4 * (0.1875 / 4000) ** 0.5)
        assert bool((mine[:, :block] == 0).all()) and bool((mine[:, block + 1 :] == 1).all())
        assert float(mine[:, block].mean()) == pytest.approx(0.5, abs=4 / (12 * len(mine)) ** 0.5)


def test_masked_ratios_are_a_truncated_normal() -> None:
    L, D = 50, 1200
    found = LevelTimeDistribution(kind="masked").draw(of_size(L, D), Key(9))
    t = found.t.view(D, L)
    assert torch.equal(found.trained.view(D, L), t == 1) and set(t.unique().tolist()) == {0.0, 1.0}
    num = t.sum(1)
    assert float(num.min()) >= 35 and float(num.max()) == L
    normal = NormalDist(1.0, 0.25)
    for n in range(35, L + 1):  # ceil(ratio L) <= n
        exact = (normal.cdf(n / L) - normal.cdf(0.7)) / (normal.cdf(1.0) - normal.cdf(0.7))
        assert float((num <= n).double().mean()) == pytest.approx(exact, abs=2 / D**0.5)
    share = t.mean(0)
    assert float((share - num.mean() / L).abs().max()) < 4.5 * (0.13 * 0.87 / D) ** 0.5, "no token is preferred"
    few = drawn("masked", L, 200, mask_mean=0.3, mask_std=0.01, mask_low=0.2)
    assert float(few.mean()) == pytest.approx(0.31, abs=0.01)
    assert drawn("masked", 1, 20).tolist() == [[1.0]] * 20, "at least one"
    times = drawn("masked", L, 200, mask_time={"kind": "uniform", "low": 0.5})
    masked = drawn("masked", L, 200) == 1
    assert bool((times[~masked] == 0).all()) and 0.5 <= float(times[masked].min()) < 0.51 < float(times[masked].max())


# ---- options --------------------------------------------------------------------------------------------------------


def test_every_kind_is_drawn_and_has_its_options() -> None:
    assert set(RANKS) == set(KINDS) == {kind for kinds in READ_BY.values() for kind in kinds}
    assert set(READ_BY) == set(LevelTimeDistribution.model_fields) - {"kind"}
    values = {
        "time": {},
        "num_levels": 7,
        "window": 3,
        "startup": 0.2,
        "moves": "one",
        "mask_mean": 0.9,
        "mask_std": 0.1,
        "mask_low": 0.5,
        "mask_time": {"kind": "uniform"},
    }
    for option, kind in product(READ_BY, KINDS):
        table = {"kind": kind, option: values[option]}
        if kind in READ_BY[option]:
            one = build(table, LevelTimeDistribution, "a recipe")
            assert build(one.model_dump(exclude_unset=True), LevelTimeDistribution, "again") == one
        else:
            with pytest.raises(ValueError, match=f'{option} has no effect with kind "{kind}"'):
                build(table, LevelTimeDistribution, "a recipe")


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "random"},
        {"kind": "mid", "num_levels": 0},
        {"kind": "rolling", "window": 0},
        {"kind": "rolling", "startup": 1.1},
        {"kind": "mid", "moves": "two"},
        {"kind": "masked", "mask_low": 0.0},
        {"kind": "masked", "mask_std": 0.0},
        {"kind": "masked", "mask_mean": -5.0},
        {"kind": "masked", "mask_mean": 9.0},
        {"levels": 3},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="|".join(options.keys() - {"kind"}) or "kind"):
        LevelTimeDistribution(**options)


# ---- fused SNR ------------------------------------------------------------------------------------------------------


def slow_fused_snr(t: list[float], prediction: str, g: float, clip: float) -> list[float]:
    """One block after another."""
    weights, c = [], 0.0
    for b, time in enumerate(t):
        snr = ((1 - time) / time) ** 2
        s = min(snr, clip) / clip
        f = 1 - (1 - g * c) * (1 - s)
        f_ = 1 - (1 - g * c) * (1 - snr / clip)
        c = s if b == 0 else g * c + (1 - g) * s
        v = clip * f / (clip * f_ + 1)
        weights.append(
            {"data": clip * f, "noise": f / f_, "v": v, "velocity": v * ((1 - time) ** 2 + time**2)}[prediction]
        )
    return weights


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_fused_snr_equals_a_loop(prediction: Prediction) -> None:
    t = 0.02 + 0.97 * Key(0).uniform((30, 7), torch.float64)
    for decay, clip in ((0.96, 5.0), (0.5, 2.0), (0.0, 5.0)):
        found = fused_snr(t, prediction, decay, clip)
        wanted = [slow_fused_snr(row, prediction, decay, clip) for row in t.tolist()]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_fused_snr_by_hand() -> None:
    """t = 1/2 has snr 1 and s = 1/5; the second block, at t = 2/3, has snr 1/4 and s = 1/20."""
    t = torch.tensor([0.5, 2 / 3], dtype=torch.float64)
    f = [0.2, 1 - (1 - 0.96 * 0.2) * (1 - 0.05)]
    assert fused_snr(t, "data").tolist() == pytest.approx([1.0, 5 * f[1]])
    assert fused_snr(t, "v").tolist() == pytest.approx([1 / 2, 5 * f[1] / (5 * f[1] + 1)])
    assert fused_snr(t, "noise").tolist() == pytest.approx([1.0, 1.0])


def test_weights_of_one_error_agree_without_fusion() -> None:
    """x0 = x - t F: the square error of x0 is t^2 that of F, and (t / (1 - t))^2 that of eps. The same min-SNR loss."""
    t = torch.linspace(0.02, 0.98, 40, dtype=torch.float64).unsqueeze(1)
    data, noise, velocity = (fused_snr(t, prediction, 0.0) for prediction in ("data", "noise", "velocity"))
    torch.testing.assert_close(velocity, data * t**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(noise, data * (t / (1 - t)) ** 2, rtol=1e-12, atol=0)


def test_fused_snr_is_causal_and_rises_after_clean_blocks() -> None:
    t = Key(1).uniform((20, 5), torch.float64) * 0.6 + 0.35  # snr below the clip
    changed = t.clone()
    changed[:, 3:] = 0.5
    assert torch.equal(fused_snr(changed, "data")[:, :3], fused_snr(t, "data")[:, :3])
    clean = torch.cat([torch.full_like(t[:, :4], 0.05), t[:, 4:]], 1)
    noisy = torch.cat([torch.full_like(t[:, :4], 0.95), t[:, 4:]], 1)
    assert bool((fused_snr(clean, "data")[:, 4] > fused_snr(noisy, "data")[:, 4]).all())


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_fused_snr_is_finite_at_both_ends(prediction: Prediction) -> None:
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor(list(product((0.0, 1e-30, 0.5, 1.0), repeat=3)), dtype=dtype)
        weights = fused_snr(ends, prediction)
        assert weights.dtype == dtype and bool(torch.isfinite(weights).all()) and float(weights.min()) >= 0
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay must be in"):
            fused_snr(ends, prediction, decay)
    assert fused_snr(ends[:0], prediction).shape == (0, 3)


def test_padded_vectors_give_weights_to_items() -> None:
    names = ragged(10)
    vectors, t = Neighbours.of(names), LevelTimeDistribution(kind="mid").draw(names, Key(0)).t.clamp(0.01, 0.99)
    weights = vectors.items(fused_snr(vectors.padded(t, 1.0), "velocity"))
    for document, copy in {(d, c) for d, _, c in names}:
        mine = sorted(n for n, (d, _, c) in enumerate(names) if (d, c) == (document, copy))
        wanted = slow_fused_snr(t[mine].tolist(), "velocity", 0.96, 5.0)
        assert weights[mine].tolist() == pytest.approx(wanted, rel=1e-12)

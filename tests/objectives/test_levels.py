"""Objectives on blocks that read one another: which blocks are in the loss, what they read, and the average velocity of
blocks that move together, against a Gaussian whose velocities are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from layouts import CHANNELS, PAD, random_batch, small_model
from scripted import enliven
from torch import Tensor

from omni.objectives import build_objective
from omni.objectives.base import WITHOUT_FINISHED, FlowObjective, Items, check_blocks
from omni.objectives.level_times import RANKS, LevelTimeDistribution
from omni.objectives.weighting import fused_snr
from omni.rng import Key
from omni.sequence.block_context import BlockContext, Neighbours, joined
from omni.sequence.layout import Batch, LatentSpan, Shape, TokenSpan, pack
from omni.sequence.mask import dense, oracle

GRID, N, B = (1, 1, 2), 2, 3


def clip_batch(copies: int = 1) -> Batch:
    """Text, a clip of three blocks, text, a picture."""
    blocks = [LatentSpan(Key(n).normal((N, CHANNELS)), GRID, True) for n in range(B + 1)]
    spans = [TokenSpan([1, 2], [True] * 2), *blocks[:B], TokenSpan([3], [True]), blocks[B]]
    shape = [Shape(1, 40, 80)]
    [batch], _ = pack([spans], shape, channels=CHANNELS, pad_id=PAD, copies=copies, uids=[7], fixed_shape=False)
    return batch


# ---- what blocks read -----------------------------------------------------------------------------------------------


def read_by(batch: Batch, context: BlockContext, **masks: Tensor) -> list[set[str]]:
    """What each item reads: "x0", "x1", .. the noisy blocks, "c0", ... the clean ones, and "text"."""
    stream = joined(batch.refine, batch.item, batch.item_names, context, **masks)
    keys = batch.context.fields.then(stream.fields)
    seen, num = dense(stream.fields, keys)[0], batch.context.block.shape[1]
    blocks = sorted({name[1] for name in batch.item_names})
    found: list[set[str]] = []
    for item in range(batch.num_items):
        row = seen[batch.item[0] == item]
        assert bool((row == row[0]).all())  # one rule for a block's positions
        of_context = {
            f"c{blocks.index(int(batch.context.block[0, k]))}" if batch.is_latent[0, k] else "text"
            for k in range(num) if row[0, k]
        }  # fmt: skip
        noisy = {f"x{int(n)}" for n in batch.item[0][row[0, num:]]}
        found.append(of_context | noisy)
    return found


def test_what_the_blocks_of_a_clip_read() -> None:
    """By hand. The picture behind the text is a group of its own: it reads the clip as context."""
    batch, last = clip_batch(), {"text", "c0", "c1", "c2", "x3"}
    assert read_by(batch, BlockContext()) == [{"text", "x0"}, {"text", "c0", "x1"}, {"text", "c0", "c1", "x2"}, last]
    before = [{"text", "x0"}, {"text", "x0", "x1"}, {"text", "x0", "x1", "x2"}, last]
    assert read_by(batch, BlockContext(reads="before")) == before
    everything = {"text", "x0", "x1", "x2"}
    assert read_by(batch, BlockContext(reads="all")) == [everything] * 3 + [last]
    done, noise = torch.tensor([True, False, False, False]), torch.tensor([False, False, True, False])
    window = read_by(batch, BlockContext(reads="all"), is_finished=done, is_noise=noise)
    assert window == [{"text", "c0", "x0"}, {"text", "c0", "x1"}, {"text", "c0", "x2"}, last]
    stays = BlockContext(reads="all", finished="refine")
    assert read_by(batch, stays, is_finished=done) == [everything] * 3 + [last]
    later = torch.tensor([False, True, False, False])  # finished, but not at the head: it stays noisy context
    assert read_by(batch, BlockContext(reads="all"), is_finished=later) == [everything] * 3 + [last]


@pytest.mark.parametrize("reads", ["before", "all"])
def test_copies_do_not_read_one_another(reads: Any) -> None:
    batch = clip_batch(copies=2)
    stream = joined(batch.refine, batch.item, batch.item_names, BlockContext(reads=reads))
    seen = dense(stream.fields, stream.fields)[0]
    copies = torch.tensor([batch.item_names[int(n)][2] for n in batch.item[0]])
    assert not bool(seen[copies[:, None] != copies[None]].any())
    assert bool((seen.sum(1) >= N).all())


@pytest.mark.parametrize("seed", range(5))
def test_the_mask_of_joined_blocks_equals_the_oracle(seed: int) -> None:
    batch = random_batch(Key(seed))
    masks = [Key(seed).fold(n).uniform((batch.num_items,)) < 0.4 for n in range(2)]
    for reads in ("before", "all"):
        stream = joined(batch.refine, batch.item, batch.item_names, BlockContext(reads=reads), *masks)
        keys = batch.context.fields.then(stream.fields)
        seen = dense(stream.fields, keys)
        assert torch.equal(seen, oracle(stream.fields, keys))
        there = batch.item[0] >= 0
        assert not bool(seen[0, there][:, -batch.item.shape[1] :][:, ~there].any())  # padding is not read


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"), [("flow_matching", {}), ("flow_matching", {"fused_snr": True}), ("improved_mean_flow", {})]
)
def test_blocks_that_are_not_trained_are_not_in_the_loss(name: str, options: dict[str, Any]) -> None:
    model, batch = small_model(), clip_batch(copies=3)
    model.config = model.config.model_copy(update={"blocks": BlockContext(reads="before")})
    objective = build_objective(name, levels={"kind": "autoregressive"}, **options)
    [terms] = model(batch, [objective], Key(1)).values()
    assert terms.count == 2 * 3 * N  # one block of the clip and the picture, of every copy


@pytest.mark.parametrize("reads", ["before", "all"])
def test_the_loss_shows_finished_blocks_as_context_and_hides_noise(reads: Any) -> None:
    """One target block, finished ones before it and noise after it: the loss is that of a model on finished blocks with
    the same times, whatever noisy blocks read."""
    model, batch = enliven(cast(Any, small_model())), clip_batch(copies=3)
    objective = build_objective("flow_matching", levels={"kind": "autoregressive"})
    found = []
    for context in (BlockContext(), BlockContext(reads=reads)):
        model.config = model.config.model_copy(update={"blocks": context})
        found.append(float(model(batch, [objective], Key(1))["FlowMatching"].sum.detach()))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("name", ["flow_matching", "mean_flow", "improved_mean_flow"])
@pytest.mark.parametrize("kind", ["independent", "nondecreasing", "rolling", "masked"])
def test_losses_of_blocks_that_move_together_have_gradients(name: str, kind: str) -> None:
    model, batch = small_model(), clip_batch(copies=2)
    finished = "refine" if kind in WITHOUT_FINISHED else "context"
    model.config = model.config.model_copy(update={"blocks": BlockContext(reads="all", finished=finished)})
    terms = model(batch, [build_objective(name, levels={"kind": kind})], Key(3))
    [one] = terms.values()
    assert one.count > 0 and one.sum.isfinite()
    one.sum.backward()  # type: ignore[operator]
    weight = model.flow.noisy.weight
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0


def test_fused_weights_are_those_of_the_neighbours() -> None:
    """The weighted loss equals a sum over items by hand, and the raw loss has no weights."""

    class Zero:
        def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return torch.zeros_like(x)

    batch = clip_batch()
    items = Items(batch.refine_latents, batch.item, batch.item_names)
    objective = cast(FlowObjective, build_objective("flow_matching", fused_snr=True, levels={"kind": "independent"}))
    draw = objective.draw(items, Key(2))
    found = objective.loss(cast(Any, Zero()), draw)
    error = [float(draw.v[0, batch.item[0] == n].square().mean()) for n in range(4)]
    weights = [
        *fused_snr(draw.t[:3].double(), "velocity").tolist(),
        *fused_snr(draw.t[3:].double(), "velocity").tolist(),
    ]
    wanted = sum(N * w * e for w, e in zip(weights, error, strict=True))
    assert float(found.sum) == pytest.approx(wanted, rel=1e-4)
    assert found.raw is not None and float(found.raw) == pytest.approx(N * sum(error), rel=1e-4)


def test_jumps_of_neighbours_have_one_difference_of_rank() -> None:
    names = [(d, b, 0) for d in range(300) for b in range(3)]
    uniform = {"kind": "independent", "time": {"kind": "uniform"}}
    drawn = LevelTimeDistribution.model_validate(uniform).draw_jumps(names, Key(0), diagonal=0.25)
    t, s = drawn.t.view(-1, 3), drawn.s.view(-1, 3)
    same = (t == s).all(1)
    assert float(same.double().mean()) == pytest.approx(0.25, abs=0.08)
    assert bool(((t == s).any(1) == same).all())
    gap = (t - s)[~same]
    ends = s[~same]
    longest = gap.amax(1, keepdim=True)
    assert bool(((gap - longest).abs() < 1e-12).logical_or(ends == 0).all())  # equal, or cut at 0
    assert bool((ends >= 0).all())
    plain = LevelTimeDistribution.model_validate(uniform).draw(names, Key(0))
    assert torch.equal(plain.t, drawn.t) and torch.equal(plain.s, plain.t)


def test_one_block_of_a_clip_moves() -> None:
    names = [(d, b, 0) for d in range(600) for b in range(3)]
    together = LevelTimeDistribution(kind="independent").draw_jumps(names, Key(0), diagonal=0.25)
    drawn = LevelTimeDistribution(kind="independent", moves="one").draw_jumps(names, Key(0), diagonal=0.25)
    assert torch.equal(drawn.t, together.t) and bool(drawn.trained.all())
    moves = (drawn.s < drawn.t).view(-1, 3)
    assert moves.sum(1).unique().tolist() == [0, 1]
    assert float(moves.any(1).double().mean()) == pytest.approx(0.75, abs=0.06)
    assert moves.double().mean(0).tolist() == pytest.approx([0.25] * 3, abs=0.06)
    moved = moves.flatten()
    assert torch.equal(drawn.s[moved], together.s[moved])


# ---- average velocities of blocks that move together ----------------------------------------------------------------

RHO = 0.8  # correlation of two blocks of one number each


def velocities(reads: str, t: Tensor) -> Tensor:
    """(2, 2): the matrix A of u = A x, the velocity E[eps - x0 | what each block reads] at times t (2,)."""
    a, b = torch.diag(1 - t), torch.diag(t)
    data = torch.tensor([[1, RHO], [RHO, 1]], dtype=torch.float64)
    both = a @ data @ a + b @ b  # covariance of x
    cross = b - data @ a  # of eps - x0 with x
    if reads == "all":
        return cross @ torch.linalg.inv(both)
    found = torch.zeros(2, 2, dtype=torch.float64)
    for n in (1, 2):
        found[n - 1, :n] = cross[n - 1, :n] @ torch.linalg.inv(both[:n, :n])
    return found


@dataclass
class Exact:
    """The average velocity of both blocks on the path from t to s, by Runge-Kutta steps of the exact velocities."""

    reads: str
    steps: int = 200

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x (1, 2, 1); t, s (2,)."""
        speed, y = t - s, x[0, :, 0]
        rate = lambda h, y: speed * (velocities(self.reads, s + h * speed) @ y)  # noqa: E731
        d = -1 / self.steps
        for n in range(self.steps):
            h = 1 + n * d
            k1 = rate(h, y)
            k2 = rate(h + d / 2, y + d / 2 * k1)
            k3 = rate(h + d / 2, y + d / 2 * k2)
            y = y + d / 6 * (k1 + 2 * k2 + 2 * k3 + rate(h + d, y + d * k3))
        slow = velocities(self.reads, t) @ x[0, :, 0]
        return torch.where(speed > 0, (x[0, :, 0] - y) / speed.clamp(min=1e-9), slow)[None, :, None]

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        h = 1e-4
        return (self(x + h * dx, t + h * dt, s + h * ds) - self(x - h * dx, t - h * dt, s - h * ds)) / (2 * h)


@pytest.mark.parametrize("reads", ["before", "all"])
@pytest.mark.parametrize(("t", "s"), [((0.6, 0.9), (0.3, 0.6)), ((0.2, 0.7), (0.0, 0.3)), ((0.5, 0.8), (0.5, 0.4))])
def test_the_map_of_the_sampler_is_the_fixed_point(reads: str, t: tuple[float, ...], s: tuple[float, ...]) -> None:
    """u = F + (t - s) d/dt F for blocks at equal and at different speeds, and where one block does not move. With the
    sample's own velocity in the tangent this holds only where every block reads all others."""
    items = Items(torch.zeros(1, 2, 1, dtype=torch.float64), torch.tensor([[0, 1]]), [(0, 0, 0), (0, 1, 0)])
    objective = cast(FlowObjective, build_objective("improved_mean_flow", levels={"kind": "independent"}))
    draw = objective.draw(items, Key(0))
    x = torch.tensor([[[0.7], [-1.1]]], dtype=torch.float64)
    end = [torch.tensor(time, dtype=torch.float64) for time in (t, s)]
    draw = type(draw)(**{**vars(draw), "x": x, "t": end[0], "s": end[1]})
    call = cast(Any, Exact(reads))
    u = (velocities(reads, draw.t) @ x[0, :, 0])[None, :, None]
    F = call(x, draw.t, draw.s)
    assert float((F + objective.turn(call, draw, u) - u).abs().max()) < 1e-6
    of_sample = (velocities("all", draw.t) @ x[0, :, 0])[None, :, None]  # E[eps - x0 | both blocks]
    wrong = (F + objective.turn(call, draw, of_sample) - of_sample)[0, 1].abs()
    moves_both = t[0] > s[0]
    assert (float(wrong) > 1e-3) is (reads == "before" and moves_both)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "reads", "words"),
    [
        ("flow_matching", {}, "before", "FlowMatching: .*give levels"),
        ("flow_matching", {"levels": {"kind": "same"}}, "finished", "noisy blocks read finished blocks alone"),
        ("mean_flow", {"levels": {}}, "before", "MeanFlow cannot train .*take improved_mean_flow"),
        (
            "improved_mean_flow",
            {"levels": {}, "guidance": {"scale": 2.0}},
            "all",
            "ImprovedMeanFlow: guidance in training",
        ),
    ],
)
def test_an_objective_that_cannot_train_the_regime_is_refused(
    name: str, options: dict[str, Any], reads: Any, words: str
) -> None:
    objective = build_objective(name, **options)
    context = BlockContext() if reads == "finished" else BlockContext(reads=reads, finished="refine")
    with pytest.raises(ValueError, match=words):
        check_blocks(objective, context)
    model = small_model()
    model.config = model.config.model_copy(update={"blocks": context})
    with pytest.raises(ValueError, match=words):
        model(clip_batch(), [objective], Key(0))


@pytest.mark.parametrize("reads", ["before", "all"])
@pytest.mark.parametrize("kind", RANKS)
def test_levels_without_a_finished_block_do_not_train_it_as_context(kind: Any, reads: Any) -> None:
    """Levels of a kind leave blocks untrained at 0, which are read as context, or are refused; "same" is for all blocks
    together, where no block is finished first."""
    names = [(d, b, 0) for d in range(100) for b in range(10)]
    objective = build_objective("flow_matching", levels={"kind": kind})
    drawn = LevelTimeDistribution(kind=kind).draw(names, Key(0))
    if not bool((~drawn.trained & (drawn.t == 0)).any()) and kind != "same":
        with pytest.raises(ValueError, match=f"{kind}.* no finished block as context.*give blocks.finished = 'refine'"):
            check_blocks(objective, BlockContext(reads=reads))
    else:
        check_blocks(objective, BlockContext(reads=reads))
    check_blocks(objective, BlockContext(reads=reads, finished="refine"))


@pytest.mark.parametrize("kind", RANKS)
def test_levels_that_show_no_block_at_the_context_time_are_refused(kind: Any) -> None:
    """A sampler shows finished blocks at context_time. Levels of a kind give a first block such a time while a noisy
    last one is trained, or are refused."""
    names = [(d, b, 0) for d in range(300) for b in range(3)]
    drawn = LevelTimeDistribution(kind=kind).draw(names, Key(0))
    t, trained = drawn.t.view(-1, 3), drawn.trained.view(-1, 3)
    shown = bool(((t[:, 0] > 0) & (t[:, 0] < 0.2) & (t[:, 2] > 0.8) & trained[:, 2]).any())
    objective = build_objective("flow_matching", levels={"kind": kind})
    context = BlockContext(reads="before", finished="refine", context_time=0.1)
    if shown:
        check_blocks(objective, context)
    else:
        with pytest.raises(ValueError, match=f"{kind}.* no finished block at blocks.context_time = 0.1, but a sampler"):
            check_blocks(objective, context)
    check_blocks(objective, BlockContext(reads="before", finished="refine"))


def test_a_head_of_each_latent_needs_latents_of_their_own() -> None:
    objective = build_objective("flow_matching")
    check_blocks(objective, BlockContext())
    with pytest.raises(ValueError, match="flow.head_depth needs blocks.unit = 'latent'"):
        check_blocks(objective, BlockContext(), has_head=True)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("consistency", {"levels": {}}, "Consistency.* has no rule for levels"),
        ("flow_matching", {"levels": {}, "time": {}}, "time has no effect with levels; give levels.time"),
        ("flow_matching", {"fused_snr": True}, "fused_snr needs levels"),
        ("flow_matching", {"levels": {"moves": "one"}}, "levels.moves = 'one' has no effect: FlowMatching trains no"),
    ],
)
def test_options_without_a_rule_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_objective(name, **options)


def test_a_regime_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="finished = 'refine' has no effect"):
        BlockContext(finished="refine")
    with pytest.raises(ValueError, match="context_noise has an effect with finished = 'refine'"):
        BlockContext(context_time=0.1, context_noise=True)


def test_groups_of_items() -> None:
    batch = clip_batch(copies=2)
    groups = Neighbours.of(batch.item_names)
    assert groups.count.tolist() == [3, 1, 3, 1] and {name[0] for name in groups.names} == {7}


def test_clean_context_is_shown_at_its_time() -> None:
    """With context_time the clean copy is scaled in training as in sampling; text without latents is unchanged."""
    model, batch = small_model(), clip_batch()
    plain = model.embed(batch)
    model.config = model.config.model_copy(update={"blocks": BlockContext(context_time=0.25)})
    scaled = model.embed(batch)
    assert torch.equal(scaled[~batch.is_latent], plain[~batch.is_latent])
    wanted = model.flow.embed_clean(0.75 * batch.latents[batch.is_latent])
    torch.testing.assert_close(scaled[batch.is_latent], wanted)

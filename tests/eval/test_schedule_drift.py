"""The walk on a circle: its layout, its distances from the truth, and the task of drift."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from eval.experiments.schedules.drift import MODELS, CircleWalk, DriftOptions, Laboratory, drift_rows
from eval.experiments.schedules.walk import PAD, RADIUS, START, points, turn
from eval.suite import main
from omni.rng import Key
from omni.sequence.layout import LatentSpan, TokenSpan, lay_rows

SUITE = str(Path(__file__).parents[2] / "eval" / "suites" / "schedules_drift.toml")
WALK = CircleWalk(4)
SMALL = (
    "pictures=3 steps=3 on_policy_steps=2 on_policy_pictures=3 longer_steps=2 batch=4 measured=32 seeds=1 width=16 "
    "sampling=[1]"
)


def test_the_batch_is_the_layout_of_its_documents() -> None:
    pictures = WALK.sample(Key(0), 3)
    spans = [
        [s for x in one for s in (TokenSpan([START], [False]), LatentSpan(x[None], (1, 1, 1), True))]
        for one in pictures
    ]
    wanted = lay_rows(spans, channels=2, pad_id=PAD, copies=1, uids=[7, 8, 9])
    for _ in range(2):
        found = WALK.batch(pictures, first=7)
        for name in ("ids", "latents", "is_latent", "refine_latents", "item", "item_first"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        assert found.item_names == wanted.item_names and found.documents == wanted.documents


def test_the_walk_is_as_defined() -> None:
    x = WALK.sample(Key(1), 20000).double()
    assert torch.allclose(x.norm(dim=-1), torch.tensor(RADIUS).double(), atol=1e-6)
    angle = torch.atan2(x[..., 1], x[..., 0])
    step = (angle[:, 1:] - angle[:, :-1] + math.pi) % (2 * math.pi) - math.pi
    assert abs(float(step.mean()) - 0.8) < 0.01 and abs(float(step.std()) - 0.3) < 0.01
    assert float(x.mean((0, 1)).abs().max()) < 0.05
    assert torch.allclose(turn(points(angle[:, 0]), -angle[:, 0]), points(0 * angle[:, 0]), atol=1e-12)


def test_distances_equal_the_transport_of_points_on_a_line() -> None:
    """Shifted by d along one direction, the distance is d times the root mean square of the directions' cosines."""
    place = (torch.arange(5000).double() + 0.5) / 5000
    exact = points(0.8 + 0.3 * torch.special.ndtri(place))
    assert float(WALK.distance(exact, 1)) < 1e-12
    assert float(WALK.distance(exact + torch.tensor([0.1, 0.0]).double(), 1)) == pytest.approx(
        0.1 / RADIUS / 2**0.5, rel=1e-6
    )


def test_an_error_of_each_step_adds_up_after_the_own_past_alone() -> None:
    """A walk of another mean: `far` grows with every picture, `next` does not; after the true past neither grows."""
    walk, wrong = CircleWalk(6), CircleWalk(6, mean=0.9)
    own = wrong.sample(Key(2), 8000)
    near, far = walk.distances(own, own)
    assert bool((far.diff() > 0.03).all()) and float(near.std()) < 0.01
    true = walk.sample(Key(2), 8000)  # the same noise, so that picture n follows the true one with the wrong step
    angle = torch.atan2(true[..., 1], true[..., 0]).double()
    after_true = points(torch.cat([angle[:, :1], angle[:, 1:] + 0.1], 1))
    near, far = walk.distances(after_true, true)
    assert float(near.std()) < 0.01 and float(far.max()) < 1.2 * float(near.max())
    near, far = walk.distances(true, true)
    assert float(far.max()) < 0.03


def test_bad_walks_raise() -> None:
    with pytest.raises(ValueError, match="2 pictures or more"):
        CircleWalk(1)


def test_an_untrained_model_is_far_from_the_truth_after_any_past() -> None:
    """An untrained model is F = 0: its pictures are noise after any past."""
    laboratory = Laboratory(WALK, DriftOptions(width=16, measured=64), Key(0))
    model = laboratory.model()
    own, true = (laboratory.distances(model, 2, past) for past in ("own", "true"))
    assert own.shape == true.shape == (2, 3) and float(own.min()) > 0.2 and float(true.min()) > 0.2


def test_the_task_reports_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "drift.json"
    options = [f"schedule_drift.{one}" for one in SMALL.split()]
    main([SUITE, *options, "schedule_drift.bars={}", "--json", str(file), "--html", str(tmp_path / "r.html")])
    rows = {row["name"].partition(".")[2]: row["value"] for row in json.loads(file.read_text())}
    small = DriftOptions(pictures=3, sampling=(1,))
    assert set(drift_rows(small)) <= set(rows)
    for model in MODELS:
        for steps in small.sampling:
            own, true = (rows[f"far_{model}_{steps}_{past}"] for past in ("own", "true"))
            assert rows[f"drift_{model}_{steps}"] == pytest.approx(own - true)
            mean = sum(rows[f"far_{model}_{steps}_own_{n}"] for n in (2, 3)) / 2
            assert own == pytest.approx(mean)
    assert rows["far_before_1_own"] != rows["far_after_1_own"] and "seed 0, after" in "".join(capsys.readouterr())

"""The map of both axes: cells equal the sampler's own result, and the best cell of a budget is that of a search by
hand."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from eval.experiments.schedules.gaussian import BlockGaussian
from eval.experiments.schedules.sampling import output_covariance
from eval.experiments.schedules.two_axes import AxesOptions, axes_rows, best, divergences, draw, schedule_axes
from omni.sequence.schedule import staggered

SMALL = AxesOptions(blocks=3, steps=(2, 4), lags=(0.0, 0.5, 1.0), budgets=(4, 8, 12))


def test_cells_and_the_best_of_a_budget() -> None:
    cells = divergences(SMALL)
    assert set(cells) == set(product(("all", "before"), SMALL.lags, SMALL.steps))
    gaussian = BlockGaussian(3, SMALL.correlation)
    wanted = gaussian.divergence(output_covariance(gaussian, staggered(3, 4, 2, "before"), "euler"))
    assert cells["before", 0.5, 4] == pytest.approx(wanted, rel=1e-12)
    # passes: S + floor(2 lag S): 2, 4, 4, 8, 6, 12
    assert best(SMALL, cells, "all", 4) == min(
        (cells["all", 0, 2], 0), (cells["all", 0, 4], 0), (cells["all", 0.5, 2], 0.5)
    )
    assert best(SMALL, cells, "before", 12)[0] == min(kl for (reads, _, _), kl in cells.items() if reads == "before")


def test_causal_reading_wants_a_lag_and_full_reading_none() -> None:
    """With many steps the bias of causal reading is all that remains; where blocks read all, passes are better spent on
    steps."""
    options = AxesOptions(blocks=3, steps=(4, 16), budgets=(48,), lags=(0.0, 0.5, 1.0))
    cells = divergences(options)
    assert best(options, cells, "before", 48)[1] >= 0.5 and cells["before", 0, 16] > 5 * cells["before", 1, 16]
    assert best(options, cells, "all", 16) == (cells["all", 0, 16], 0.0)


def test_rows_and_picture(tmp_path: Path) -> None:
    options = SMALL.model_copy(update={"folder": str(tmp_path)})
    run = getattr(schedule_axes, "function", schedule_axes)
    outcome = run(None, options)
    assert sorted(measure.name for measure in outcome.measures) == sorted(axes_rows(options))
    assert (tmp_path / "schedule_axes.png").stat().st_size > 5000
    assert draw(options, divergences(options)).size == (1000, 380)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lags": [0.3]}, "lag 0.3"),
        ({"lags": [2]}, "lag 2"),
        ({"budgets": [2]}, "a budget of 2 passes allows no cell; give at least 4"),
        ({"lags": [1], "budgets": [16]}, "a budget of 16 passes allows no cell; give at least 32"),
    ],
)
def test_bad_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AxesOptions(**options)

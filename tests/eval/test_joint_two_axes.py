"""The map of both axes on the bundled model, at small size: every row, and drafts that change no id."""

from __future__ import annotations

import pytest

from eval.experiments.joint.two_axes import BundledAxesOptions, axes_rows, bundled_axes
from eval.metrics.emoji_judge import Judge
from eval.task import Context

SMALL = BundledAxesOptions(requests=1, pictures=(2,), picture_steps=(1, 2), texts=2, drafts=(4,), sweeps=(0, 1))


def test_rows_and_equal_ids(judge: Judge) -> None:
    outcome = bundled_axes(Context(shared={"atlas": judge.atlas, "judge": judge}), SMALL)
    found = {measure.name: measure.value for measure in outcome.measures}
    assert sorted(found) == sorted(axes_rows(SMALL))
    assert found["identical"] == 100 and found["text_1_0"] == 1
    assert found["text_4_0"] > 1 and found["text_4_1"] < found["text_4_0"] * 1.5
    assert [len(curve.lines) for curve in outcome.curves] == [1, 2]


def test_a_model_without_a_head_is_refused(tiny_model) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="needs a model with a joint-token head"):
        bundled_axes(Context(str(tiny_model)), SMALL)

"""The few-step task: lines define the rows, a wrong reference raises, and the bundled model is measured."""

from __future__ import annotations

import math
from functools import partial

import pytest

from eval import requests
from eval.metrics.emoji_judge import Judge, calibrate
from eval.task import TASKS, Context
from eval.tasks.few_step import FewStepOptions, Line


def test_rows_follow_from_lines() -> None:
    lines = {"a": Line(steps=(1, 4)), "b": Line(steps=(2,))}
    plain = TASKS.get("few_step").rows_of(FewStepOptions(lines=lines, draws=0, scenes=0))
    assert plain == ("a_1_open", "a_1_seconds", "a_4_open", "a_4_seconds", "b_2_open", "b_2_seconds")
    compared = TASKS.get("few_step").rows_of(FewStepOptions(lines=lines, reference=("a", 4)))
    assert {"b_2_open_share", "b_2_coverage_share", "b_2_speedup", "b_2_scenes"} <= set(compared)


@pytest.mark.parametrize("reference", [("c", 4), ("a", 3)])
def test_a_reference_must_be_a_line_at_its_steps(reference: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="is no line of"):
        FewStepOptions(lines={"a": Line(steps=(1, 4))}, reference=reference)


def test_the_bundled_model_is_measured_at_every_number_of_steps(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a judge that is calibrated on 16 pictures of each size, instead of 256."""
    monkeypatch.setattr(requests, "calibrate", partial(calibrate, num=16))
    options = FewStepOptions(
        requests=2,
        scenes=1,
        draws=0,
        timed=1,
        lines={"m": Line(steps=(1, 3)), "outside": Line(steps=(2,), guidance=2.0, guidance_embedding=1.0)},
        reference=("m", 3),
    )
    outcome = TASKS.get("few_step").run(Context(report=lambda _: None, shared={"atlas": judge.atlas}), options)
    values = {measure.name: measure.value for measure in outcome.measures}
    assert tuple(values) == TASKS.get("few_step").rows_of(options)
    assert values["m_3_speedup"] == 1.0 and values["m_1_seconds"] > 0 and values["m_3_seconds"] > 0
    assert values["m_1_speedup"] == values["m_3_seconds"] / values["m_1_seconds"]
    assert values["m_3_open_share"] == 100.0 or math.isnan(values["m_3_open_share"])
    assert len(outcome.panels) == 6
    cost = next(curve for curve in outcome.curves if curve.title == "open against evaluations")
    assert [x for x, _ in cost.lines["m"]] == [1.0, 3.0]  # the model's own guidance is in its weights
    assert [x for x, _ in cost.lines["outside"]] == [4.0]  # else a step is two evaluations

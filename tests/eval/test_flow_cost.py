"""The cost task runs, its rows are ratios to flow matching, and documents that cannot be packed raise."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from eval.task import Context
from eval.tasks.flow_cost import METHODS, ROWS, FlowCostOptions, build_batch, build_model, flow_cost, train_step
from omni.rng import Key

SMALL = FlowCostOptions(repeats=1, width=64, depth=1, channels=4, documents=4, rows=2, text=3, side=2)


def test_every_row_is_measured() -> None:
    outcome = flow_cost(Context(), SMALL)
    values = {measure.name: measure.value for measure in outcome.measures}
    assert values.keys() == {*ROWS, "flow_matching_step"} and all(value > 0 for value in values.values())


def test_every_method_trains_the_same_batch() -> None:
    batch = build_batch(SMALL, Key(0))
    assert batch.num_items == 8 and dataclasses.is_dataclass(batch)
    for name, options in METHODS.values():
        model = build_model(SMALL, Key(0))
        before = model.flow.velocity.weight.detach().clone()
        train_step(model, batch, name, options, Key(0))()
        assert not torch.equal(before, model.flow.velocity.weight)


def test_uneven_rows_raise() -> None:
    with pytest.raises(ValueError, match=r"documents \(5\) must be a multiple of rows \(2\)"):
        build_batch(SMALL.model_copy(update={"documents": 5}), Key(0))

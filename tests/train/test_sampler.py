"""A trained model names a sampler whose inputs its objectives train; the log has the unweighted losses."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from gaussian import PLANE, GaussianCall, gaussian_items

from omni.config import load_json, load_toml
from omni.model import OmniConfig
from omni.objectives import OBJECTIVES, FlowObjective, build_objective
from omni.objectives.base import Trains
from omni.rng import Key
from omni.samplers import SAMPLERS
from omni.samplers.base import Reads
from train import loop
from train.__main__ import main
from train.build import build_objectives
from train.loop import Run
from train.metrics import Tracker, read_metrics
from train.recipe import Recipe
from train.sampler import USUAL_SAMPLER, choose_sampler, reads_trained_values

MakeRun = Callable[..., Run]
FLOW = [name for name in OBJECTIVES.names() if issubclass(OBJECTIVES.get(name), FlowObjective)]
FIRST = {
    "flow_matching": "euler",
    **dict.fromkeys(("consistency", "continuous_consistency"), "restart"),
    **dict.fromkeys(
        ("mean_flow", "improved_mean_flow", "alpha_flow", "terminal_velocity", "rectified_jumps"), "flow_map"
    ),
    **dict.fromkeys(("shortcut", "progressive_distillation", "consistency_trajectory"), "flow_map"),
    **{"moment_matching": "flow_map", "drifting": "restart"},
}


def only(name: str, **options: str) -> tuple[str, ...]:
    """A recipe with one flow objective."""
    inside = ", ".join(f"{key} = {value}" for key, value in options.items())
    objectives = f'[{{name="next_token"}}, {{name="{name}", options={{{inside}}}}}]'
    return (f"objectives={objectives}",)


def sampler_of(recipe_file: Path, *overrides: str) -> str:
    recipe = load_toml(recipe_file, overrides, Recipe)
    return choose_sampler(recipe, build_objectives(recipe))


@pytest.mark.parametrize("name", FLOW)
def test_a_one_line_change_of_objective_brings_its_sampler(name: str, recipe_file: Path) -> None:
    found = sampler_of(recipe_file, *only(name))
    assert found == FIRST.get(name, found) and reads_trained_values(found, OBJECTIVES.get(name)().trains)


def test_values_have_one_set_of_names() -> None:
    assert get_args(Trains) == get_args(Reads) and set(SAMPLERS.reads.values()) == set(get_args(Reads)) == set(
        USUAL_SAMPLER
    )


def test_a_new_sampler_of_the_velocity_is_taken(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS._items, "another", SAMPLERS.get("euler"))
    monkeypatch.setitem(SAMPLERS.reads, "another", "velocity")
    assert sampler_of(recipe_file, *only("flow_matching"), "heads.sampler=another") == "another"


def test_the_published_model_has_the_sampler(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(recipe_file), *only("mean_flow"), "max_steps=1", "--out", str(out)]) == 0
    assert load_json(out / "model/config.json", OmniConfig).sampler == "flow_map"


@pytest.mark.parametrize("where", ["heads.sampler", "generation.sampler"])
def test_a_sampler_that_does_not_fit_raises_and_is_named(
    where: str, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(recipe_file), *only("flow_matching"), f"{where}=flow_map", "--out", str(out)]) == 2
    output = capsys.readouterr().err
    wrong, _, known = output.partition("; use ")
    assert f"{where} = 'flow_map' reads what flow_matching does not train" in wrong
    assert known.startswith("euler, ") and {"ddim", "heun"} < set(known.strip().split(", "))
    assert output.count("\n") == 1 and not out.exists()


def test_an_objective_of_jumps_to_data_excludes_jumps_between(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match="use restart$"):
        sampler_of(recipe_file, *only("consistency"), "heads.sampler=flow_map")
    with pytest.raises(ValueError, match="use restart$"):
        sampler_of(recipe_file, *only("moment_matching", pairs='"one_step"'), "heads.sampler=flow_map")
    with pytest.raises(ValueError, match="did you mean 'flow_map'"):
        sampler_of(recipe_file, *only("mean_flow"), "heads.sampler=flowmap")


def test_of_several_objectives_the_largest_decides_and_all_fit(recipe_file: Path) -> None:
    """The recipe of these tests has flow matching and MeanFlow."""
    assert sampler_of(recipe_file) == "euler"
    assert sampler_of(recipe_file, "objectives.2.weight=2") == "flow_map"
    assert sampler_of(recipe_file, "heads.sampler=flow_map") == "flow_map"
    assert sampler_of(recipe_file, "heads.sampler=gamma") == "gamma"


def test_a_run_from_a_model_of_jumps_may_keep_its_sampler(recipe_file: Path, tmp_path: Path) -> None:
    """Flow matching, and a joint-token head, on a model that is trained for jumps."""
    config = OmniConfig(vocab_size=300, sampler="flow_map").model_dump_json()
    (tmp_path / "config.json").write_text(config)
    start = f"init_from={tmp_path}"
    assert sampler_of(recipe_file, start, *only("flow_matching"), "heads.sampler=flow_map") == "flow_map"
    assert sampler_of(recipe_file, start, *only("flow_matching")) == "euler"
    assert sampler_of(recipe_file, start, 'objectives=[{name="joint_tokens"}]') == "flow_map"
    with pytest.raises(ValueError, match="use euler"):
        sampler_of(recipe_file, start, *only("flow_matching"), "heads.sampler=restart")
    saved_state = f"init_from={tmp_path / 'state/step-00000001'}"
    assert sampler_of(recipe_file, saved_state, *only("flow_matching"), "heads.sampler=flow_map") == "flow_map"


def test_the_loss_without_its_weight_is_logged_beside_it(make_run: MakeRun) -> None:
    """MeanFlow's loss is e / (e + 0.001), always near 1; the mean of e falls."""
    run = make_run("max_steps=2", *only("mean_flow"), "autocast=none")
    stream = io.StringIO()
    tracker = Tracker(run.out, 0, stream=stream)
    loop.train(run, tracker, lambda: False)
    tracker.close()
    rows = read_metrics(run.out / "metrics.jsonl")
    for row in rows:
        assert 0.99 < row["loss/MeanFlow"] <= 1 and row["unweighted/MeanFlow"] > 0.1
        assert "unweighted/NextToken" not in row
    assert f"MeanFlow {rows[0]['loss/MeanFlow']:.4f} (unweighted {rows[0]['unweighted/MeanFlow']:.4f})" in (
        stream.getvalue()
    )
    plain = make_run("max_steps=2", *only("mean_flow", power="0.0"), "autocast=none")
    metrics = loop.train_step(plain, plain.next())
    assert metrics["loss/MeanFlow"] == pytest.approx(rows[0]["unweighted/MeanFlow"], rel=1e-6)


WEIGHTED = {
    "mean_flow": {"power": 0.0},
    "improved_mean_flow": {"power": 0.0},
    "alpha_flow": {"power": 0.0},
    "rectified_jumps": {"power": 0.0},
    "moment_matching": {"weighting": "one"},
    "consistency_trajectory": {"distance": "l2"},
}
AS_WEIGHTED = {
    "alpha_flow": {"alpha": 1.0},
    "rectified_jumps": {"power": 1.0},
    "consistency_trajectory": {"distance": "norm"},
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_unweighted_is_the_loss_of_the_plain_form(name: str) -> None:
    items = gaussian_items(PLANE, num=8)
    options = {"alpha_flow": {"alpha": 1.0}}.get(name, {})
    weighted = build_objective(name, **{**options, **AS_WEIGHTED.get(name, {})})
    one, other = (
        o.loss(GaussianCall(items, PLANE, 0.3), o.draw(items, Key(1)))
        for o in (weighted, build_objective(name, **{**options, **WEIGHTED[name]}))
    )
    assert float(one.raw) == pytest.approx(float(other.sum), rel=1e-9)
    assert float(one.sum) != pytest.approx(float(other.sum), rel=1e-3)


def test_a_batch_without_pictures_does_not_hide_the_others(make_run: MakeRun) -> None:
    from torch import tensor

    from omni.objectives.terms import Terms

    parts = [{"a": Terms(tensor(1.0), 2.0, raw=tensor(6.0))}, {"a": Terms(tensor(0.0), 0.0)}]
    assert loop.unweighted(parts) == {"unweighted/a": 3.0}
    assert loop.unweighted([{"a": Terms(tensor(1.0), 2.0)}]) == {}

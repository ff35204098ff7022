"""The comparison of orders of generation: its distances, its passes, and a small run from recipes to rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.experiments.schedules_systems.clips import coherent, energy_distance, shuffled_blocks
from eval.experiments.schedules_systems.systems import System, SystemsOptions, held_out_loss, systems_rows
from eval.suite import load_suite, main
from omni.rng import Key

SUITE = str(Path(__file__).parents[2] / "eval" / "suites" / "schedules_systems.toml")
SMALL = [
    *("model.width=32", "model.depth=1", "model.num_heads=1", "model.num_kv_heads=1", "data.0.options.num_clips=12"),
    *("validation.documents=2", "validation.steps=20", "batch.shapes.0.rows=1", "max_steps=40", "ema_decay=0.9"),
    *("objectives.1.weight=1.0", "optimiser.decay=none"),
]


def test_energy_distance_is_the_double_sum_without_equal_samples() -> None:
    x, y = Key(0).fold("x").normal((5, 3)).double(), Key(0).fold("y").normal((4, 3)).double()
    between = sum(float((a - b).norm()) for a in x for b in y) / 20
    within = sum(float((x[i] - x[j]).norm()) for i in range(5) for j in range(5) if i != j) / 20
    of_data = sum(float((a - b).norm()) for a in y for b in y) / 16
    assert energy_distance(x, y) == pytest.approx(2 * between - within - of_data, abs=1e-9)
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        energy_distance(x[:1], y)


def test_energy_distance_has_no_bias_and_detects_means_and_lost_modes() -> None:
    data = 3 * Key(1).normal((20, 6)).double()
    picks = (Key(2).uniform((400, 16)) * 20).long()
    found = torch.tensor([energy_distance(data[row], data) for row in picks])
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20
    for wrong in (data.mean(0).expand(16, -1), data[:3].repeat(5, 1)):
        assert energy_distance(wrong, data) > float(found.max())


def test_clips_are_coherent_if_their_frames_are_of_one_clip() -> None:
    data = (Key(3).uniform((10, 4, 2, 2, 3)) * 256).to(torch.uint8)
    noisy = (data.float() + 4 * Key(4).normal(tuple(data.shape))).clamp(0, 255).to(torch.uint8)
    assert coherent(noisy, data) == 100
    mixed = shuffled_blocks(data, 500, Key(5))
    same = torch.stack([(mixed[:, t, None] == data[None, :, t]).flatten(2).all(2) for t in range(4)]).all(0).any(1)
    assert coherent(mixed, data) == pytest.approx(100 * float(same.double().mean())) and coherent(mixed, data) < 5
    twins = torch.cat([data[:1], data[:1]])  # frames of two equal clips count for both
    twins[1, 2:] = data[1, 2:]
    assert coherent(twins, twins) == 100


def test_options_are_checked() -> None:
    for wrong in ({}, {"recipe": "full", "weights_of": "full"}):
        with pytest.raises(ValueError, match="give a recipe, or weights_of"):
            System.model_validate(wrong)
    with pytest.raises(ValueError, match="there is no system 'ful'; did you mean 'full'"):
        SystemsOptions.model_validate({"systems": {"full": {"recipe": "full"}}, "only": ["ful"]})
    assert System(recipe="full", generation={"gamma": 0.5}, delay_of_steps=0.25, steps=(4,)).options(6) == {
        "gamma": 0.5, "delay": 1.5, "steps": 6,
    }  # fmt: skip
    row = {"validation/loss/MeanFlow": 1.0, "validation/unweighted/MeanFlow": 3.0}
    assert (
        held_out_loss(row, "mean_flow") == 3.0 and held_out_loss({"validation/loss/MeanFlow": 1.0}, "mean_flow") == 1.0
    )


def test_bars_are_those_of_the_chosen_systems() -> None:
    bars = {"one_shot_passes_1": "== 1", "one_shot_restart_fall_1_8": ">= 1", "data_energy": "<= 1"}
    systems = {"one_shot": {"recipe": "one_shot"}, "one_shot_restart": {"weights_of": "one_shot", "steps": [1, 8]}}
    for name, other in (("one_shot", "one_shot_restart_fall_1_8"), ("one_shot_restart", "one_shot_passes_1")):
        found = SystemsOptions.model_validate({"systems": systems, "bars": bars, "only": [name]})
        assert set(found.bars) == set(bars) - {other}
    assert SystemsOptions.model_validate({"systems": systems, "bars": bars}).bars == bars


def test_the_suite_has_every_recipe() -> None:
    options = load_suite(SUITE, []).schedules_systems  # type: ignore[attr-defined]
    folder = Path(__file__).parents[2] / "train" / "recipes" / "examples" / "schedules"
    assert {one.recipe for one in options.systems.values() if one.recipe} == {
        path.stem for path in folder.glob("*.toml")
    }


def test_a_small_run(tmp_path: Path) -> None:
    """Passes are those of the schedules, two systems share their weights, and a second run trains nothing."""
    given = [
        'schedules_systems.only=["diffusion_forcing", "diffusion_forcing_in_turn"]', "schedules_systems.seeds=1",
        f"schedules_systems.changes={json.dumps(SMALL)}", "schedules_systems.samples=4",
        "schedules_systems.repeats=1", "schedules_systems.systems.diffusion_forcing_in_turn.steps=[2]",
        f"schedules_systems.keep={tmp_path / 'keep'}", f"schedules_systems.folder={tmp_path}",
        "schedules_systems.systems.diffusion_forcing.steps=[2, 4]", "schedules_systems.bars={}",
    ]  # fmt: skip
    found = []
    for n in range(2):
        assert main([SUITE, *given, "--json", str(tmp_path / f"{n}.json"), "--html", str(tmp_path / "a.html")]) in (
            0,
            1,
        )
        rows = json.loads((tmp_path / f"{n}.json").read_text())
        found.append({row["name"].partition(".")[2]: row["value"] for row in rows})
    values = found[0]
    assert values["diffusion_forcing_passes_2"] == 5 and values["diffusion_forcing_passes_4"] == 7
    assert values["diffusion_forcing_in_turn_passes_2"] == 8
    assert values["diffusion_forcing_loss"] < values["diffusion_forcing_loss_start"]
    assert "diffusion_forcing_in_turn_loss" not in values
    assert values["diffusion_forcing_fall_2_4"] == pytest.approx(
        values["diffusion_forcing_energy_4"] / values["diffusion_forcing_energy_2"]
    )
    times = {name for name in values if "_seconds_" in name}
    assert {k: v for k, v in found[1].items() if k not in times} == {k: v for k, v in values.items() if k not in times}
    assert set(values) <= set(systems_rows(load_suite(SUITE, given).schedules_systems))  # type: ignore[attr-defined]
    assert (tmp_path / "schedules_systems.png").is_file()
    changed = [*given, f"schedules_systems.changes={json.dumps([*SMALL, 'ema_decay=0.8'])}"]
    assert main([SUITE, *changed, "--json", str(tmp_path / "no.json")]) != 0
    assert not (tmp_path / "no.json").exists()

"""The recipes of train/recipes/examples/schedules: equal but for the order of generation; each trains, and samples a
clip in the refine passes of its schedule. Slow: the held-out loss falls, and samples are nearer to the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import follow
from torch import Tensor

from eval.experiments.schedules_systems.clips import clip_data, counted, energy_distance, flat, sample_clips
from omni.document import Document, Role, Video
from omni.generation.engine import Engine
from omni.model import Omni
from omni.sequence.layout import TokenSpan
from omni.sequence.schedule import level_major, staggered
from train.build import build_run
from train.loop import Run, train_step
from train.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "train" / "recipes" / "examples" / "schedules"
BLOCKS = 4
PASSES = {
    "full": staggered(BLOCKS, 8, 0), "transfusion": staggered(BLOCKS, 8, 8),
    "diffusion_forcing": staggered(BLOCKS, 8, 1), "ar_diffusion": staggered(BLOCKS, 8, 2),
    "rolling_diffusion": staggered(BLOCKS, 8, 2), "level_major": level_major(BLOCKS, 2),
    "one_shot": staggered(BLOCKS, 1, 0),
}  # fmt: skip
MASKED = {"mar": BLOCKS * 4, "masked": BLOCKS * 4 * 8}  # rounds of every block; without a head also steps
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
SMALL = (
    *("model.width=32", "model.depth=1", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=32"),
    *("data.0.options.num_clips=12", "validation.documents=2", "batch.shapes.0.rows=1"),
)


def run_of(name: str, folder: Path, *overrides: str) -> Run:
    return build_run(load_recipe(FOLDER / f"{name}.toml", overrides), folder / "run")


def clips_of(model: Omni, num: int = 1, **options: Any) -> Tensor:
    """Clips of four frames, also from a model that has not learnt where a clip comes."""
    model.eval()
    engine = Engine(model)
    clip = Video(torch.zeros(BLOCKS, 16, 16, 3, dtype=torch.uint8), 8.0, Role.ASSISTANT, supervise=True)
    [ids] = [span.ids for span in model.spans(Document((clip,)))[:1] if isinstance(span, TokenSpan)]
    script = ids[ids.index(engine.control.video) :]
    follow(engine, lambda request: script)
    return sample_clips(engine, "a clip", num, options)


def test_every_recipe_has_a_schedule_here() -> None:
    assert sorted(PASSES | MASKED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipes_differ_in_the_order_of_generation_alone(name: str) -> None:
    ours, first = (load_recipe(FOLDER / f"{one}.toml").model_dump() for one in (name, NAMES[0]))
    assert {key for key in ours if ours[key] != first[key]} <= {"heads", "objectives", "generation"}
    ours["heads"]["flow"].pop("head_depth", None)
    assert ours["heads"]["flow"] == first["heads"]["flow"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_samples_in_the_passes_of_its_schedule(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path, *SMALL)
    losses = [train_step(run, run.next())["loss"] for _ in range(2)]
    assert all(torch.tensor(losses).isfinite()) and losses[0] != losses[1]
    with counted(run.model) as passes:
        frames = clips_of(run.model)
    assert frames.shape == (1, BLOCKS, 16, 16, 3)
    if name in MASKED:
        assert passes == [4] * MASKED[name]
        return
    schedule = PASSES[name]
    moved = sum(len(schedule.moves(m)) for m in range(schedule.num_passes))
    assert len(passes) == schedule.num_passes and sum(passes) >= 4 * moved  # four latents a block


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("transfusion", "generation.delay=1", "this model's noisy blocks read finished blocks alone"),
        ("full", "generation.rounds=4", "rounds = 4 has no effect"),
        ("mar", "generation.delay=1", "this model's noisy blocks read finished blocks alone"),
    ],
)
def test_an_order_that_the_model_does_not_have_is_refused_before_training(
    name: str, option: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"\[generation\] with heads.blocks: .*{words}"):
        run_of(name, tmp_path, *SMALL, option)


def test_rolling_forcing_is_a_window_of_as_many_blocks_as_steps(tmp_path: Path) -> None:
    run = run_of("rolling_diffusion", tmp_path, *SMALL)
    with counted(run.model) as passes:
        clips_of(run.model, steps=4, delay=1)
    assert [num // 4 for num in passes] == [1, 2, 3, 4, 3, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_held_out_loss_and_improves_samples(name: str, tmp_path: Path) -> None:
    """In 150 steps of the recipe: the flow loss on held-out clips falls below three quarters of what it is before, and
    the energy distance of 32 samples to the clips below a half."""
    run = run_of(name, tmp_path, "max_steps=150")
    clips = flat(clip_data(run.recipe).frames)

    def measures() -> tuple[float, float]:
        assert run.validation is not None
        losses = run.validation(run)
        [loss] = [v for k, v in losses.items() if k.startswith("loss/") and k != "loss/NextToken"]
        with run.ema.applied():
            return loss, energy_distance(flat(clips_of(run.model, 32)), clips)

    before = measures()
    run.model.train()
    while run.fraction() < 1:
        train_step(run, run.next())
    loss, distance = measures()
    assert loss < 0.75 * before[0] and distance < 0.5 * before[1], (before, loss, distance)

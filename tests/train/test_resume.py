"""Exact resume: a stop at any step and a resume change no bit of losses, weights, optimiser or averages."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import exit_code, forked, wait_until

from omni.checkpoint import publish
from omni.config import load_json
from omni.objectives import OBJECTIVES
from train import checkpoint as state
from train import loop
from train.__main__ import main
from train.data.batch import PIECES
from train.loop import Run
from train.metrics import Tracker, read_metrics
from train.optim.optimiser import multiplier
from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
MakeRun = Callable[..., Run]
TIMES = {"seconds", "load_seconds"}


def go(run: Run, until: int) -> None:
    """Train to step `until`, then save: the same path that a stop signal takes."""
    tracker = Tracker(run.out, run.progress.step, stream=io.StringIO())
    loop.train(run, tracker, lambda: run.progress.step >= until)
    tracker.close()


def numbers(out: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(out / "metrics.jsonl")]


def final_bytes(out: Path, step: int) -> dict[str, bytes]:
    folder = out / "state" / f"step-{step:08d}"
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in ("model", "ema", "optimiser")}


def test_8_steps_equal_3_and_5_in_a_new_process(make_run: MakeRun, recipe_file: Path, tmp_path: Path) -> None:
    """The warmup of five steps ends after the stop."""
    go(make_run("max_steps=8", out="straight"), 8)
    go(make_run("max_steps=8", out="broken"), 3)
    more = ["max_steps=8", "--out", str(tmp_path / "broken"), "--resume"]
    command = [sys.executable, "-m", "train", str(recipe_file), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 3" in done.stderr
    assert [row["step"] for row in numbers(tmp_path / "broken")] == list(range(8))
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "straight")
    assert final_bytes(tmp_path / "broken", 8) == final_bytes(tmp_path / "straight", 8)
    assert (tmp_path / "broken" / "model" / "manifest.json").is_file()


def test_resume_at_every_step_and_twice(make_run: MakeRun, tmp_path: Path) -> None:
    total = 4
    go(make_run(out="straight"), total)
    for stop in range(total):
        out = f"stop{stop}"
        go(make_run(out=out), stop)
        for until in (stop, total):  # the first resume trains no step
            run = make_run(out=out)
            loop.resume(run, lambda line: None)
            go(run, until)
        assert numbers(tmp_path / out) == numbers(tmp_path / "straight"), stop
        assert final_bytes(tmp_path / out, total) == final_bytes(tmp_path / "straight", total), stop


TESTED = ("next_token", "flow_matching", "mean_flow")  # by the tests above
CLIPS = tuple(f"data.{n}.{part}" for n in (0, 1) for part in ("name=moving_emoji", "options={num_frames=2}"))
NEEDS = {"joint_tokens": ("heads.joint.length=4",)}
NEEDS |= {name: ("batch.copies=4",) for name in ("drifting", "moment_matching")}


@pytest.mark.parametrize("name", [name for name in OBJECTIVES.names() if name not in TESTED])
def test_every_objective_resumes_exactly(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    recipe = (f"objectives.2.name={name}", *CLIPS, *NEEDS.get(name, ()))
    go(make_run(*recipe, out="straight"), 2)
    go(make_run(*recipe, out="broken"), 1)
    run = make_run(*recipe, out="broken")
    loop.resume(run, lambda line: None)
    go(run, 2)
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "straight")
    assert final_bytes(tmp_path / "broken", 2) == final_bytes(tmp_path / "straight", 2)


def test_resume_with_a_target_network(make_run: MakeRun, tmp_path: Path) -> None:
    """The averaged weights of terminal velocity matching are restored; without them the losses differ."""
    recipe = ("objectives.2.name=terminal_velocity", "objectives.2.options.target_decay=0.5")
    go(make_run(*recipe, out="straight"), 4)
    for out, forgets in (("broken", False), ("forgetful", True)):
        go(make_run(*recipe, out=out), 2)
        run = make_run(*recipe, out=out)
        assert run.target is not None
        loop.resume(run, lambda line: None)
        if forgets:
            run.target.model.load_state_dict(run.model.state_dict())
        go(run, 4)
        files = [tmp_path / name / "state" / "step-00000004" / "target.safetensors" for name in ("straight", out)]
        exact = [
            numbers(tmp_path / out) == numbers(tmp_path / "straight"),
            final_bytes(tmp_path / out, 4) == final_bytes(tmp_path / "straight", 4),
            files[0].read_bytes() == files[1].read_bytes(),
        ]
        assert exact == [not forgets] * 3


def test_a_checkpoint_of_another_device_loads(make_run: MakeRun) -> None:
    """A checkpoint from a GPU resumes, and publishes, on a machine without one."""
    run = make_run("max_steps=1")
    loop.train_step(run, run.next())
    identity = {**run.identity, "recipe": {**run.identity["recipe"], "device": "cuda"}}
    state.save(run.out / "state", run.progress, run.model, run.ema, run.optimiser, identity, keep=2)
    other, output = make_run("max_steps=1"), []
    loop.resume(other, output.append)
    assert "changed: device was 'cuda', now 'cpu'" in output and other.progress.step == 1
    for mine, theirs in (
        (dict(other.model.named_parameters()), dict(run.model.named_parameters())),
        (other.ema.averages, run.ema.averages),
        (other.optimiser.state_tensors(), run.optimiser.state_tensors()),
    ):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_of_other_data_is_published_and_not_resumed(recipe_file: Path, tmp_path: Path) -> None:
    """After a change of the corpus's code, finished weights can still be published."""
    out = ["--out", str(tmp_path / "out")]
    assert main([str(recipe_file), "max_steps=1", *out]) == 0
    directory = tmp_path / "out/state/step-00000001"
    scalars = json.loads((directory / "state.json").read_text())
    scalars["identity"]["data"] = ["another"]
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix == ".safetensors"}
    publish(directory, {**files, "state.json": json.dumps(scalars)}, replace=True)
    assert main([str(recipe_file), "max_steps=2", "--resume", *out]) == 2
    assert main([str(recipe_file), "--publish", str(tmp_path / "model"), *out]) == 0


def test_the_comparison_can_fail(make_run: MakeRun, tmp_path: Path) -> None:
    go(make_run(out="straight"), 1)
    go(make_run("seed=4", out="other"), 1)
    assert numbers(tmp_path / "other") != numbers(tmp_path / "straight")
    assert final_bytes(tmp_path / "other", 1) != final_bytes(tmp_path / "straight", 1)


def test_metrics_of_lost_steps_are_written_again(make_run: MakeRun, tmp_path: Path) -> None:
    """Killed after step 3, with a checkpoint of step 1: the file has every step once."""
    go(make_run(out="straight"), 4)
    run = make_run(out="killed")
    go(run, 1)
    go(run, 3)
    (tmp_path / "killed" / "state" / "step-00000003" / "manifest.json").unlink()
    run = make_run(out="killed")
    loop.resume(run, lambda line: None)
    assert run.progress.step == 1
    go(run, 4)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")


REFUSED = {
    "seed=4": "recipe.seed was 3, now 4; the saved weights or the order of the documents depend on it: ",
    "batch.copies=1": "recipe.batch.copies was 2, now 1",
    "data.1.options.num_frames=2": "recipe.data was .* now ",
    "optimiser.name=adamw": "recipe.optimiser.name was 'muon', now 'adamw'",
    "batch.too_long=drop": "recipe.batch.too_long was 'split', now 'drop'",
}


def test_another_recipe_raises_and_names_the_key(make_run: MakeRun) -> None:
    go(make_run(), 0)
    for change, output in REFUSED.items():
        with pytest.raises(ValueError, match=output):
            loop.resume(make_run(change), lambda line: None)


def test_allowed_changes_are_printed_and_recorded(
    make_run: MakeRun, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(make_run("max_steps=3", "threads=2"), 3)
    changes = ["max_steps=4", "optimiser.rate=1e-4", "report.save_steps=7", "threads=1", "ema_decay=0.5", "workers=1"]
    out = ["--out", str(tmp_path / "run")]
    assert main([str(recipe_file), *changes, *out, "--resume"]) == 0
    output = capsys.readouterr().err
    for line in (
        *("max_steps was 3, now 4", "optimiser.rate was 0.002, now 0.0001", "report.save_steps was 1000, now 7"),
        *("threads was 2, now 1", "ema_decay was 0.9, now 0.5", "workers was 0, now 1"),
    ):
        assert f"changed: {line}\n" in output
    fall = 0.5 * (1 + math.cos(math.pi * 3 / 4))
    assert f"the learning rate of step 3 is {0.8 * 1e-4 * fall:.3g}, by the saved recipe it was 0; " in output
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    changed = {
        row["key"]: (row["step"], row["was"], row["now"]) for row in events if row.get("event") == "recipe changed"
    }
    assert changed["optimiser.rate"] == (3, 0.002, 0.0001) and len(changed) == 6
    assert load_json(tmp_path / "run/recipe.json", Recipe).optimiser.rate == 1e-4
    rates = {row["step"]: row["rate"] for row in read_metrics(tmp_path / "run/metrics.jsonl")}
    assert rates[3] == pytest.approx(0.8 * fall)


def test_nothing_is_printed_without_a_change(make_run: MakeRun) -> None:
    go(make_run(), 1)
    output: list[str] = []
    loop.resume(make_run(), output.append)
    assert len(output) == 1 and output[0].endswith("at step 1, document " + str(make_run().loader.next(0).cursor))


def test_a_longer_run_keeps_schedule_steps(make_run: MakeRun) -> None:
    schedule = ("optimiser.schedule_steps=4", "optimiser.min_factor=0.25", "max_steps=4")
    go(make_run(*schedule), 0)
    output: list[str] = []
    run = make_run(*schedule[:2], "max_steps=40")
    loop.resume(run, output.append)
    assert not any("learning rate" in line for line in output) and any(
        "max_steps was 4, now 40" in line for line in output
    )
    config = run.recipe.optimiser
    assert multiplier(config, 400, run.fraction()) == pytest.approx(0.25)
    assert multiplier(config, 2, 0.0) == pytest.approx(0.6 * (0.25 + 0.75 * 0.5))


def test_a_checkpoint_of_an_earlier_version_loads(make_run: MakeRun) -> None:
    """Its recipe lacks later keys."""
    run = make_run()
    recipe = {k: v for k, v in run.identity["recipe"].items() if k not in ("workers", "max_steps", "device")}
    recipe["batch"] = {k: v for k, v in recipe["batch"].items() if k != "too_long"}
    recipe["coupling"] = False  # a retired key
    identity = {**run.identity, "recipe": recipe}
    state.save(run.out / "state", run.progress, run.model, run.ema, run.optimiser, identity, keep=2)
    again = make_run("max_steps=7", "batch.too_long=drop")
    loop.resume(again, lambda line: None)
    assert not again.changes


@pytest.mark.parametrize(("before", "after"), [(0, 3), (2, 0)])
def test_other_numbers_of_workers_train_on_no_document_twice(make_run: MakeRun, before: int, after: int) -> None:
    recipe = ("drop.text=0", "drop.images=0", "drop.all=0")

    def steps(run: Run, count: int) -> list[int]:
        found = []
        for _ in range(count):
            packed = run.next()
            run.progress.advance(packed.cursor, packed.worker)
            found += packed.documents
        return found

    run = make_run(f"workers={before}", *recipe)
    seen = steps(run, 3)
    loop.save(run)
    output: list[str] = []
    run = make_run(f"workers={after}", *recipe)
    loop.resume(run, output.append)
    assert any("documents are in another order" in line for line in output)
    more = steps(run, 4)
    assert not set(seen) & set(more) and len(set(more)) == len(more)
    assert min(more) <= max(seen) + max(before, 1)


def test_no_worker_and_one_worker_are_equivalent(make_run: MakeRun) -> None:
    whole = state.Progress(step=5, cursor=17 + 2 * PIECES)
    assert not whole.use_workers(1) and whole.cursors == [17 + 2 * PIECES]
    assert not whole.use_workers(0) and (whole.cursor, whole.cursors) == (17 + 2 * PIECES, [])
    assert whole.use_workers(2) and whole.cursors == [18, 19]
    assert not state.Progress(cursor=4).use_workers(3)  # no step is done


def test_sigterm_saves_and_exits_75(recipe_file: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "run", tmp_path / "output.txt"
    metrics = out / "metrics.jsonl"
    with forked(lambda: main([str(recipe_file), "max_steps=100000", "--out", str(out)]), output) as process:
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
        os.kill(process, signal.SIGTERM)
        code, errors = exit_code(process), output.read_text()
    assert code == 75, errors
    assert "SIGTERM" in errors and "--resume" in errors
    (state,) = (out / "state").iterdir()
    step = json.loads((state / "state.json").read_text())["progress"]["step"]
    assert len(numbers(out)) == step >= 1
    assert not (out / "model").exists()


def test_a_second_run_does_not_overwrite_the_first(
    make_run: MakeRun, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(make_run(), 1)
    assert main([str(recipe_file), "--out", str(tmp_path / "run")]) == 2
    assert "--resume" in capsys.readouterr().err

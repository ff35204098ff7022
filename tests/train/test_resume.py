"""Exact resume: stopping anywhere and going on changes no bit of losses, weights, optimiser or averages."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from omni.checkpoint import publish
from train import loop, state
from train.__main__ import main
from train.loop import Run
from train.track import Tracker, read_metrics

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


def test_20_straight_equal_7_and_13_in_a_new_process(make_run: MakeRun, recipe_file: Path, tmp_path: Path) -> None:
    go(make_run(out="straight"), 20)
    go(make_run(out="broken"), 7)
    command = [sys.executable, "-m", "train", str(recipe_file), "--out", str(tmp_path / "broken"), "--resume"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 7" in done.stderr
    assert [row["step"] for row in numbers(tmp_path / "broken")] == list(range(20))
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "straight")
    assert final_bytes(tmp_path / "broken", 20) == final_bytes(tmp_path / "straight", 20)
    assert (tmp_path / "broken" / "model" / "manifest.json").is_file()


def test_resume_at_every_step_and_twice(make_run: MakeRun, tmp_path: Path) -> None:
    total = 6
    go(make_run(out="straight"), total)
    for stop in range(total):
        out = f"stop{stop}"
        go(make_run(out=out), stop)
        for until in (stop, total):  # the first resume makes no step at all
            run = make_run(out=out)
            loop.resume(run, lambda line: None)
            go(run, until)
        assert numbers(tmp_path / out) == numbers(tmp_path / "straight"), stop
        assert final_bytes(tmp_path / out, total) == final_bytes(tmp_path / "straight", total), stop


def test_resume_with_a_target_network(make_run: MakeRun, tmp_path: Path) -> None:
    """The averaged weights of terminal velocity matching go on where they were; without them the losses differ."""
    recipe = ("objectives.2.name=terminal_velocity", "objectives.2.options.target_decay=0.5")
    go(make_run(*recipe, out="straight"), 6)
    for out, forgets in (("broken", False), ("forgetful", True)):
        go(make_run(*recipe, out=out), 3)
        run = make_run(*recipe, out=out)
        assert run.target is not None
        loop.resume(run, lambda line: None)
        if forgets:
            run.target.model.load_state_dict(run.model.state_dict())
        go(run, 6)
        files = [tmp_path / name / "state" / "step-00000006" / "target.safetensors" for name in ("straight", out)]
        exact = [
            numbers(tmp_path / out) == numbers(tmp_path / "straight"),
            final_bytes(tmp_path / out, 6) == final_bytes(tmp_path / "straight", 6),
            files[0].read_bytes() == files[1].read_bytes(),
        ]
        assert exact == [not forgets] * 3


def test_a_state_of_another_device_is_taken(make_run: MakeRun) -> None:
    """What a GPU has trained can be gone on with, or published, where there is none."""
    run = make_run()
    identity = {**run.identity, "recipe": {**run.identity["recipe"], "device": "cuda"}}
    state.save(run.out / "state", run.progress, run.model, run.ema, run.optimiser, identity, keep=2)
    loop.resume(make_run(), print)


def test_a_state_of_other_data_can_be_published_and_not_resumed(recipe_file: Path, tmp_path: Path) -> None:
    """A change of the corpus's code must not lock finished weights up."""
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
    go(make_run(out="straight"), 3)
    go(make_run("seed=4", out="other"), 3)
    assert numbers(tmp_path / "other") != numbers(tmp_path / "straight")
    assert final_bytes(tmp_path / "other", 3) != final_bytes(tmp_path / "straight", 3)


def test_metrics_of_lost_steps_are_made_again(make_run: MakeRun, tmp_path: Path) -> None:
    """Killed without warning after step 5, with a state of step 3: the file has every step once."""
    go(make_run(out="straight"), 6)
    run = make_run(out="killed")
    go(run, 3)
    go(run, 5)
    (tmp_path / "killed" / "state" / "step-00000005" / "manifest.json").unlink()
    run = make_run(out="killed")
    loop.resume(run, lambda line: None)
    assert run.progress.step == 3
    go(run, 6)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")


@pytest.mark.parametrize("change", ["seed=4", "optimiser.rate=1e-3", "batch.copies=1", "data.1.options.num_frames=2"])
def test_another_recipe_is_refused_by_name(make_run: MakeRun, change: str) -> None:
    go(make_run(), 0)
    with pytest.raises(ValueError, match=change.split("=")[0].split(".")[-1]):
        loop.resume(make_run(change), lambda line: None)
    loop.resume(make_run("max_steps=30", "report.save_steps=7", "threads=2"), lambda line: None)


def test_sigterm_saves_and_exits_75(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "train", str(recipe_file), "max_steps=100000", "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        metrics = out / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
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

"""Checkpoints: half-written and damaged ones are skipped, old ones removed, tensors restored by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from omni import checkpoint
from train import checkpoint as state
from train import loop
from train.loop import Run

MakeRun = Callable[..., Run]


def save_steps(run: Run, steps: list[int]) -> None:
    for step in steps:
        run.progress.step = step
        loop.save(run)


def test_half_written_and_damaged_checkpoints_are_skipped(make_run: MakeRun) -> None:
    run = make_run("report.keep=10")
    save_steps(run, [1, 2, 3, 4])
    folder = run.out / "state"
    (folder / "step-00000004" / "manifest.json").unlink()
    weights = folder / "step-00000003" / "optimiser.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00") if weights.read_bytes()[-1] else weights.write_bytes(b"")
    (folder / ".step-00000009.tmp-abcd").mkdir()
    (folder / "step-5").mkdir()
    output: list[str] = []
    assert state.newest(folder, output.append).name == "step-00000002"
    assert len(output) == 2 and "step-00000004" in output[0] and "step-00000003" in output[1]


def test_only_the_newest_are_kept(make_run: MakeRun) -> None:
    run = make_run("report.keep=2")
    save_steps(run, [1, 5, 9])
    assert [step for step, _ in state.saved_steps(run.out / "state")] == [5, 9]


def test_a_checkpoint_saved_after_a_damaged_later_one_is_kept(make_run: MakeRun) -> None:
    run = make_run("report.keep=1")
    save_steps(run, [4])
    (run.out / "state" / "step-00000004" / "manifest.json").unlink()
    save_steps(run, [2, 3])
    assert state.newest(run.out / "state", lambda line: None).name == "step-00000003"
    assert [step for step, _ in state.saved_steps(run.out / "state")] == [3, 4]


def test_nothing_to_resume_raises(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no intact checkpoint"):
        loop.resume(make_run(out="empty"), print)


@pytest.mark.parametrize("operation", range(9))
def test_a_failed_save_keeps_the_last_checkpoint(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    """The disk is full at the n-th file operation of saving: five writes, a sync, the rename, a last sync."""
    run = make_run()
    save_steps(run, [1])
    count = iter(range(100))

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if next(count) == operation:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        return call

    for name in ("_write_content", "_write", "sync_directory", "_move_into_place"):
        monkeypatch.setattr(checkpoint, name, failing(getattr(checkpoint, name)))
    if operation <= 7:
        with pytest.raises(OSError, match="No space"):
            save_steps(run, [2])
    else:
        save_steps(run, [2])
    monkeypatch.undo()
    newest = 1 if operation <= 6 else 2  # 7 is the sync after the rename
    assert state.newest(run.out / "state").name == f"step-{newest:08d}"
    assert not [p for p in (run.out / "state").iterdir() if p.name.startswith(".")]


def test_a_checkpoint_of_another_model_raises(make_run: MakeRun) -> None:
    run = make_run()
    directory = loop.save(run)
    other = make_run("model.depth=2")
    with pytest.raises(ValueError, match="depth"):
        state.load(directory, other.model, other.ema, other.optimiser, other.identity)
    with pytest.raises(ValueError, match="blocks.1"):
        state.load(directory, other.model, other.ema, other.optimiser, run.identity)

"""Guard, averages and checkpoints by hand: no run, a model of a few numbers."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from omni import checkpoint
from omni.config import build
from omni.objectives import build_objective
from train import checkpoint as state
from train.checkpoint import Change, Progress
from train.data.batch import PIECES
from train.guard import Guard, TooManyNonFinite
from train.optim.ema import Ema
from train.optim.optimiser import Optimiser, OptimiserConfig, build_optimiser
from train.optim.target import Target
from train.recipe import without_retired

# ---- the guard -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "norm", "accepted"),
    [
        (1.0, 2.0, True), (-1e30, 0.0, True), (math.nan, 1.0, False), (1.0, math.nan, False), (math.inf, 1.0, False),
        (1.0, math.inf, False), (-math.inf, 1.0, False), (math.nan, math.nan, False),
    ],
)  # fmt: skip
def test_loss_and_gradient_must_both_be_finite(loss: float, norm: float, accepted: bool) -> None:
    guard = Guard()
    assert guard.accepts(0, loss, norm, [3]) is accepted
    assert (guard.num_skipped, guard.num_in_row) == ((0, 0) if accepted else (1, 1))


def test_ten_skipped_steps_in_a_row_are_the_default_limit() -> None:
    guard = Guard()
    assert [guard.accepts(n, math.nan, 1.0, []) for n in range(9)] == [False] * 9
    with pytest.raises(TooManyNonFinite):
        guard.accepts(9, math.nan, 1.0, [])
    assert (guard.num_skipped, guard.num_in_row) == (10, 10)


def test_the_last_skipped_step_names_step_values_and_documents() -> None:
    guard = Guard(limit=3)
    steps = [math.nan, math.nan, 1.0, math.nan, math.nan]
    assert [guard.accepts(n, loss, 1.0, [n]) for n, loss in enumerate(steps)] == [False, False, True, False, False]
    message = "^3 steps in a row were not finite; the last is step 5: loss 2.5, gradient norm inf, documents 7..9; "
    with pytest.raises(TooManyNonFinite, match=message):
        guard.accepts(5, 2.5, math.inf, [7, 8, 9])
    with pytest.raises(TooManyNonFinite, match="documents none; "):
        guard.accepts(6, math.nan, math.inf, [])


# ---- averages ------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two parameters, one of them with two names, and a buffer of either kind."""

    def __init__(self, value: float = 0.0, width: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(width, 1, bias=False)
        self.again = self.first
        self.scale = nn.Parameter(torch.full((1,), value, dtype=torch.bfloat16))
        self.register_buffer("kept", torch.full((2,), value))
        self.register_buffer("made", torch.full((3,), value), persistent=False)
        nn.init.constant_(self.first.weight, value)


def test_averages_are_float32_copies_of_the_parameters_alone() -> None:
    model = Small(3.0)
    ema = Ema(model, decay=0.5)
    assert set(ema.averages) == {"first.weight", "scale"} and ema.num_updates == 0
    assert all(v.dtype == torch.float32 and (v == 3).all() and not v.requires_grad for v in ema.averages.values())
    with torch.no_grad():
        model.first.weight.fill_(5.0)
    assert (ema.averages["first.weight"] == 3).all()


def test_the_decay_warms_up_to_its_value() -> None:
    """1/10, 2/11, 3/12 = .25, then .25 for ever: weights 0 then 10, 20, 30, 40."""
    model = Small(0.0)
    ema, expected = Ema(model, decay=0.25), 0.0
    for number, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.25, 0.25, 0.25), 1):
        with torch.no_grad():
            model.first.weight.fill_(10.0 * number)
        ema.update()
        expected = decay * expected + (1 - decay) * 10.0 * number
        assert ema.num_updates == number
        assert ema.averages["first.weight"].tolist()[0] == pytest.approx([expected] * 2, rel=1e-6)


def test_averages_are_applied_and_undone_also_after_an_error() -> None:
    model = Small(1.0)
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model.first.weight.fill_(4.0), model.kept.fill_(4.0)
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert (model.first.weight == 1).all() and (model.kept == 4).all() and model.first.weight.requires_grad
        raise RuntimeError("inside")
    assert (model.first.weight == 4).all() and (ema.averages["first.weight"] == 1).all()


def test_saved_averages_must_fit() -> None:
    ema = Ema(Small(1.0), decay=0.5)
    ema.load({"first.weight": torch.full((1, 2), 2.0), "scale": torch.full((1,), 3.0), "more": torch.zeros(1)}, 7)
    assert ema.num_updates == 7 and (ema.averages["first.weight"] == 2).all() and (ema.averages["scale"] == 3).all()
    for wrong in ({"first.weight": torch.zeros(1, 2)}, {"first.weight": torch.zeros(2), "scale": torch.zeros(1)}):
        with pytest.raises(ValueError, match="average of '(scale|first.weight)' is missing or of another shape"):
            ema.load(wrong, 1)


# ---- checkpoints ---------------------------------------------------------------------------------------------------

IDENTITY: dict[str, Any] = {"recipe": {"seed": 3, "model": {"depth": 2}, "workers": 0}, "data": "abc", "draws": 1}


def parts(value: float, width: int = 2) -> tuple[Small, Ema, Optimiser]:
    model = Small(value, width)
    optimiser = build_optimiser(model.named_parameters(), build({"name": "adamw"}, OptimiserConfig, "test"))
    return model, Ema(model, 0.9), optimiser


def trained(value: float = 1.0) -> tuple[Small, Ema, Optimiser]:
    model, ema, optimiser = parts(value)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step(1.0)
    ema.update()
    return model, ema, optimiser


def save(folder: Path, step: int, identity: dict[str, Any] = IDENTITY, keep: int = 2) -> Path:
    return state.save(folder, Progress(step), *trained(), identity, keep)


def test_a_checkpoint_restores_everything(tmp_path: Path) -> None:
    model, ema, optimiser = trained(1.0)
    progress = Progress(12, 34, 5.5, 6, 2, {"a": 7}, [8, 9])
    target = Target(model, 0.5)
    target.model.scale.fill_(0.25)
    directory = state.save(tmp_path, progress, model, ema, optimiser, IDENTITY, 1, target)
    assert directory == tmp_path / "step-00000012"
    info = checkpoint.read_manifest(directory)["info"]
    assert info == {"kind": "training state", "step": 12, "torch": torch.__version__}
    fresh, averages, other = parts(0.0)
    follower = Target(fresh, 0.5)
    assert state.load(directory, fresh, averages, other, IDENTITY, follower) == progress
    assert torch.equal(fresh.first.weight, model.first.weight) and (fresh.first.weight < 1).all()
    assert torch.equal(fresh.scale, model.scale) and fresh.scale.dtype == torch.bfloat16
    assert (fresh.kept == 1).all() and (fresh.made == 0).all()  # a buffer that is not persistent is not saved
    assert averages.num_updates == 1
    assert all(torch.equal(averages.averages[n], v) for n, v in ema.averages.items())
    found, wanted = other.state_tensors(), optimiser.state_tensors()
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert follower.model.scale == 0.25 and (follower.model.first.weight == target.model.first.weight).all()


def test_progress_counts_steps_and_the_next_document_of_a_worker() -> None:
    progress = Progress(cursors=[0, 0])
    progress.advance(5, None)
    progress.advance(7, 1)
    assert progress == Progress(2, 5, cursors=[0, 7])


@pytest.mark.parametrize(
    ("cursor", "cursors", "number", "after", "changed"),
    [
        (6, [], 0, (6, []), False),  # as many as before
        (0, [4, 9], 2, (0, [4, 9]), False),
        (6, [], 1, (0, [6]), False),  # one worker reads the same as none
        (0, [6], 0, (6, []), False),
        (6, [], 2, (0, [6, 7]), True),
        (0, [4, 9], 0, (9, []), True),  # from the first document that no worker has reached
        (0, [4, 9], 3, (0, [9, 10, 11]), True),
        (PIECES + 4, [], 2, (0, [5, 6]), True),  # not in the middle of a document
        (PIECES + 4, [], 1, (0, [PIECES + 4]), False),  # but where the order is the same
    ],
)
def test_another_number_of_workers(
    cursor: int, cursors: list[int], number: int, after: tuple[int, list[int]], changed: bool
) -> None:
    progress = Progress(3, cursor, cursors=cursors)
    assert progress.use_workers(number) is changed and (progress.cursor, progress.cursors) == after
    fresh = Progress(0, cursor, cursors=list(cursors))
    assert not fresh.use_workers(number + 1) and (fresh.cursor, fresh.cursors) == (cursor, cursors)
    assert Progress() == Progress(0, 0, 0.0, 0, 0, {}, [])


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])])
def test_the_requested_number_is_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(4):
        save(tmp_path, step, keep=keep)
    assert [step for step, _ in state.saved_steps(tmp_path)] == left
    assert state.newest(tmp_path) == tmp_path / "step-00000003"
    save(tmp_path, 3, keep=keep)  # the same step again replaces it
    assert [step for step, _ in state.saved_steps(tmp_path)] == left


def test_no_folder_has_no_steps(tmp_path: Path) -> None:
    (tmp_path / "step-12").mkdir(), (tmp_path / "step-000000012").mkdir(), (tmp_path / "x-step-00000012").mkdir()
    assert state.saved_steps(tmp_path) == [] == state.saved_steps(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no intact checkpoint"):
        state.newest(tmp_path)


def test_damaged_checkpoints_are_skipped_and_not_counted(tmp_path: Path) -> None:
    for step in (1, 2, 5):
        save(tmp_path, step, keep=9)
    (tmp_path / "step-00000005" / "manifest.json").unlink()
    weights = tmp_path / "step-00000002" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    output: list[str] = []
    assert state.newest(tmp_path, output.append) == tmp_path / "step-00000001"
    assert [line.startswith("skipping a damaged checkpoint: ") for line in output] == [True] * 2
    assert "step-00000005" in output[0] and "step-00000002" in output[1]
    save(tmp_path, 3, keep=1)  # 5 is later than the saved step, so it is damaged and does not count against `keep`
    assert [step for step, _ in state.saved_steps(tmp_path)] == [3, 5]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({**IDENTITY, "recipe": {"seed": 3, "model": {"depth": 4}, "workers": 0}}, "recipe.model.depth was 2, now 4;"),
        ({**IDENTITY, "data": "xyz", "draws": 2}, "data was 'abc', now 'xyz';"),
        ({**IDENTITY, "data": "xyz", "recipe": 5}, "recipe was {.*}, now 5;"),  # the recipe explains most
        ({**IDENTITY, "recipe": {"seed": 3, "workers": 0}}, "recipe.model was {'depth': 2}, now None;"),
        ({"recipe": IDENTITY["recipe"], "new": 1}, "new was None, now 1;"),
        ({"draws": 3}, "draws was 1, now 3;"),
    ],
)
def test_another_run_raises_with_its_first_difference(tmp_path: Path, identity: dict, message: str) -> None:
    directory = save(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        state.load(directory, *parts(0.0), identity)


def test_parts_that_are_left_out_and_keys_that_are_free_are_not_compared(tmp_path: Path) -> None:
    saved = {**IDENTITY, "recipe": {**IDENTITY["recipe"], "device": "cuda", "max_steps": 5}}
    directory = save(tmp_path, 1, saved)
    for identity in (IDENTITY, {"data": "abc"}, {}, {"recipe": IDENTITY["recipe"]}):
        assert state.load(directory, *parts(0.0), identity).step == 1
    old = save(tmp_path, 2, {"recipe": {"seed": 3, "model": {"depth": 2}}, "data": "abc"})  # early format: no `workers`
    assert state.load(old, *parts(0.0), IDENTITY).step == 2


def test_weights_of_another_model_raise(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    model, ema, optimiser = parts(0.0, width=3)
    with pytest.raises(ValueError, match=r"saved 'first.weight' has shape \(1, 2\), this model \(1, 3\)"):
        state.load(directory, model, ema, optimiser, IDENTITY)
    model.register_parameter("more", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"differ in 'more' \(1 names in all\)"):
        state.load(directory, model, ema, optimiser, IDENTITY)
    _, ema, optimiser = parts(0.0)
    with pytest.raises(ValueError, match=r"differ in 'first.weight' \(4 names in all\)"):
        state.load(directory, nn.Linear(1, 1, bias=False), ema, optimiser, IDENTITY)


def test_the_scalars_are_json(tmp_path: Path) -> None:
    directory = save(tmp_path, 4)
    text = (directory / "state.json").read_text()
    scalars = json.loads(text)
    assert text == json.dumps(scalars, sort_keys=True, indent=1)  # equal checkpoints are equal files
    assert scalars["progress"]["step"] == 4 and scalars["ema_updates"] == 1 and scalars["identity"] == IDENTITY


def test_a_change_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        Change("seed", 1, 2).key = "x"  # type: ignore[misc]


def test_an_old_value_of_an_option_is_read_under_its_new_name() -> None:
    options = {"clock": "house", "huber_c": 0.1}
    saved = {"objectives": [{"name": "consistency", "options": options}, {"name": "drifting"}]}
    [first, second] = without_retired(saved)["objectives"]
    assert first["options"] == {"clock": "flow", "huber_c": 0.1} and second == {"name": "drifting"}
    assert build_objective(first["name"], **first["options"]).clock == "flow"  # type: ignore[attr-defined]

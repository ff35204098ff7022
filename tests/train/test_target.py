"""The target network follows by its formula, is used in the loss, and exists only where an objective needs it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from omni.objectives import build_objective
from omni.rng import Key
from train import loop
from train.loop import Run

MakeRun = Callable[..., Run]
TVM = "objectives.2.name=terminal_velocity"


def test_the_target_follows_each_step_and_shares_tokenizer_and_codec(make_run: MakeRun) -> None:
    run = make_run(TVM, "objectives.2.options.target_decay=0.75")
    target = run.target
    assert target is not None and target.model.codec is run.model.codec and target.decay == 0.75
    expected = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    assert all(torch.equal(p, expected[n]) for n, p in target.model.named_parameters())
    for _ in range(3):
        loop.train_step(run, run.loader.next(run.progress.cursor))
        expected = {n: 0.75 * expected[n] + 0.25 * p.detach() for n, p in run.model.named_parameters()}
    for name, parameter in target.model.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-7) and not parameter.requires_grad
    assert any(not torch.equal(p, q) for p, q in zip(target.model.parameters(), run.model.parameters(), strict=True))


def test_the_loss_reads_it(make_run: MakeRun) -> None:
    run = make_run(TVM, "autocast=none")
    assert run.target is not None
    batch = next(b for b in run.loader.next(0).batches if b.num_items)
    with torch.no_grad():
        for model in (run.model, run.target.model):
            model.flow.velocity.weight.normal_(generator=torch.Generator().manual_seed(0))
    own, same = (run.model(batch, run.objectives, run.key, a) for a in (None, run.target.model))
    with torch.no_grad():
        run.target.model.flow.velocity.weight.mul_(2)
    other = run.model(batch, run.objectives, run.key, run.target.model)
    values = [float(terms["TerminalVelocity"].sum.detach()) for terms in (own, same, other)]
    assert values[0] == pytest.approx(values[1], rel=1e-6) and abs(values[2] - values[0]) > 1e-3 * values[0]


def test_a_skipped_step_does_not_change_the_target(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(TVM)
    assert run.target is not None
    loop.train_step(run, run.loader.next(0))
    before = {n: v.clone() for n, v in run.target.tensors().items()}
    monkeypatch.setattr(run.guard, "accepts", lambda *arguments: False)
    loop.train_step(run, run.loader.next(run.progress.cursor))
    assert all(torch.equal(v, before[n]) for n, v in run.target.tensors().items())


def test_no_target_is_kept_by_default(make_run: MakeRun) -> None:
    assert make_run().target is None
    assert make_run(TVM, "objectives.2.options.target_decay=0").target is None


@pytest.mark.parametrize("name", ["shortcut", "terminal_velocity", "consistency_trajectory", "moment_matching"])
def test_an_average_for_another_objective_is_not_used(make_run: MakeRun, name: str) -> None:
    """With target_decay None or 0 the current weights are the target, also where the trainer keeps averages."""
    run = make_run(TVM)
    assert run.target is not None
    with torch.no_grad():
        for parameter in run.target.model.parameters():
            parameter.add_(0.05)
    [batch, *_] = run.loader.next(0).batches
    options = {"moment_matching": {"particles": 2, "groups": "copies"}, "shortcut": {"bootstrap": 1.0}}.get(name, {})
    for decay, same in ((None, True), (0.0, True), (0.5, False)):
        objective = build_objective(name, target_decay=decay, **options)
        with torch.no_grad() if name != "consistency_trajectory" else torch.enable_grad():
            losses = [
                float(run.model(batch, [objective], Key(1), averages)[type(objective).__name__].sum.detach())
                for averages in (None, run.target.model)
            ]
        assert (losses[0] == losses[1]) == same, (decay, losses)


def test_averaged_guidance_uses_its_average(make_run: MakeRun) -> None:
    guidance = "objectives.2.options.guidance={scale=2.0,averaged=true,average_decay=0.9}"  # of MeanFlow
    assert make_run(guidance).target is not None
    assert make_run(guidance.replace("averaged=true", "averaged=false")).target is None


def test_two_decays_raise(make_run: MakeRun) -> None:
    both = ("objectives.1.name=shortcut", TVM)
    with pytest.raises(ValueError, match=r"different target_decay.*0\.999.*0\.99"):
        make_run(*both)
    assert make_run(*both, "objectives.1.options.target_decay=0.99").target is not None


def test_null_contexts_are_loaded_where_guidance_needs_them(make_run: MakeRun) -> None:
    assert not make_run(TVM).loader.null_contexts
    run = make_run(TVM, "objectives.2.options.guidance_range=[1.0,3.0]", "drop.all=0.5")
    assert run.loader.null_contexts
    metrics = loop.train_step(run, run.loader.next(0))
    assert metrics["loss/TerminalVelocity"] > 0

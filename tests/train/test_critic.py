"""Teacher and critic of an objective on rollouts: updates, what is frozen, checkpoints, exact resume, directories."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omni.config import load_toml
from omni.objectives.distribution_matching import DistributionMatching
from omni.objectives.next_token import NextToken
from omni.rng import Key
from train import loop
from train.build import build_run, publish_model
from train.loop import Run
from train.metrics import Tracker, read_metrics
from train.optim.critic import Critic, rollout_objective
from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
MakeRun = Callable[..., Run]
DMD = (
    "objectives.2.name=distribution_matching",
    "objectives.2.options.critic_steps=2",
    "objectives.2.options.steps=[2,4]",
    "batch.shapes=[{rows=2,budget=96,refine_budget=48}]",
    "batch.copies=1",
    *(f"data.{n}.{part}" for n in (0, 1) for part in ("name=moving_emoji", "options={num_frames=6}")),
)  # clips of three blocks


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def critic_of(run: Run) -> Critic:
    assert run.critic is not None
    return run.critic


def test_the_critic_is_updated_after_each_step_and_the_teacher_never(make_run: MakeRun) -> None:
    run = make_run(*DMD)
    critic, begin = critic_of(run), weights(run.model)
    assert equal(critic.model, begin) and equal(critic.teacher, begin) and critic.model.codec is run.model.codec
    for _ in range(2):
        metrics = loop.train_step(run, run.loader.next(run.progress.cursor))
    steps = {float(v) for name, v in critic.tensors().items() if name.endswith("/step")}
    assert steps == {4.0}  # two updates after each of two steps
    assert (
        equal(critic.teacher, begin) and not equal(critic.model, begin) and not equal(critic.model, weights(run.model))
    )
    assert not any(p.requires_grad for p in critic.teacher.parameters())
    assert math.isfinite(metrics["loss/critic"]) and metrics["loss/critic"] > 0
    assert metrics["unweighted/DistributionMatching"] > 0
    assert all(p.grad is None for one in (run.model, critic.model) for p in one.parameters())


def test_bf16_autocast_is_finite(make_run: MakeRun) -> None:
    run = make_run(*DMD, "autocast=bf16")
    for _ in range(2):
        metrics = loop.train_step(run, run.loader.next(run.progress.cursor))
    assert math.isfinite(metrics["loss/DistributionMatching"]) and math.isfinite(metrics["loss/critic"])
    assert run.guard.num_skipped == 0 and critic_of(run).guard.num_skipped == 0


def test_at_first_teacher_and_critic_agree(make_run: MakeRun) -> None:
    metrics = loop.train_step(make_run(*DMD), make_run().loader.next(0))
    assert metrics["loss/DistributionMatching"] == 0 < metrics["loss/critic"]


def test_a_skipped_step_does_not_change_the_critic(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(*DMD)
    loop.train_step(run, run.loader.next(0))
    before = {name: value.clone() for name, value in critic_of(run).tensors().items()}
    monkeypatch.setattr(run.guard, "accepts", lambda *arguments: False)
    loop.train_step(run, run.loader.next(run.progress.cursor))
    assert all(torch.equal(value, before[name]) for name, value in critic_of(run).tensors().items())


def test_an_update_that_is_not_finite_is_left_out(make_run: MakeRun) -> None:
    critic = critic_of(make_run(*DMD))
    before = weights(critic.model)
    for value, same in ((math.nan, True), (1.0, False)):
        loss = torch.stack([p.sum() for p in critic.model.parameters()]).sum() * value
        critic.update(loss, 1.0, 0, [])
        assert equal(critic.model, before) == same
    before = weights(critic.model)
    critic.update(torch.zeros(()), 1.0, 0, [])  # documents without pictures
    assert critic.guard.num_skipped == 1 and equal(critic.model, before)


def test_rates_are_a_share_of_the_recipes(make_run: MakeRun) -> None:
    run = make_run(*DMD, "objectives.2.options.critic_rate=0.2")
    for name, part in critic_of(run).optimiser.parts.items():
        for mine, theirs in zip(part.param_groups, run.optimiser.parts[name].param_groups, strict=True):
            assert mine["initial_lr"] == pytest.approx(0.2 * theirs["initial_lr"])


def test_no_critic_is_kept_by_default(make_run: MakeRun) -> None:
    assert make_run().critic is None
    assert rollout_objective([]) is None
    with pytest.raises(ValueError, match="a critic each, and a run has one"):
        rollout_objective([DistributionMatching(), DistributionMatching()])

    class Other(NextToken):
        @property
        def needs_critic(self) -> bool:
            return True

    with pytest.raises(ValueError, match="must be a RolloutObjective"):
        rollout_objective([Other()])


def go(run: Run, until: int) -> None:
    tracker = Tracker(run.out, run.progress.step, stream=io.StringIO())
    loop.train(run, tracker, lambda: run.progress.step >= until)
    tracker.close()


def test_resume_with_a_critic(make_run: MakeRun, tmp_path: Path) -> None:
    """Teacher, critic and its optimiser are restored, all files to the bit; without the critic the losses differ."""
    go(make_run(*DMD, out="straight"), 3)
    for out, forgets in (("broken", False), ("forgetful", True)):
        go(make_run(*DMD, out=out), 2)
        run = make_run(*DMD, out=out)
        critic_of(run).teacher.token.embedding.weight.zero_()  # as if init_from were another by now
        loop.resume(run, lambda line: None)
        if forgets:
            critic_of(run).model.load_state_dict(run.model.state_dict())
        go(run, 3)
        folders = [tmp_path / name / "state" / "step-00000003" for name in ("straight", out)]
        names = sorted(path.name for path in folders[0].glob("*.safetensors"))
        assert "critic.safetensors" in names
        same = [(folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names]
        assert all(same) != forgets, names
        assert (numbers(tmp_path / out) == numbers(tmp_path / "straight")) != forgets


def numbers(out: Path) -> list[dict[str, object]]:
    times = {"seconds", "load_seconds"}
    return [{k: v for k, v in row.items() if k not in times} for row in read_metrics(out / "metrics.jsonl")]


def test_a_checkpoint_without_a_critic_raises(make_run: MakeRun) -> None:
    critic = critic_of(make_run(*DMD))
    saved = critic.tensors()
    saved.pop("teacher/token.embedding.weight")
    with pytest.raises(ValueError, match=r"lacks 'teacher/token\.embedding\.weight'"):
        critic.load(saved)


def test_the_teacher_of_a_directory(make_run: MakeRun, tmp_path: Path) -> None:
    """Its weights; it may be of another size; another codec is an error."""
    other = make_run("model.width=48", "model.num_heads=3", "seed=5", out="other")
    directory = publish_model(other, tmp_path / "teacher")
    run = make_run(*DMD, f"objectives.2.options.teacher={directory}")
    teacher = critic_of(run).teacher
    assert teacher.config.transformer.width == 48 and run.model.config.transformer.width == 32
    name = "token.embedding.weight"
    assert torch.equal(dict(teacher.named_parameters())[name], other.ema.averages[name].bfloat16().float())
    teacher.flow.velocity.weight.add_(0.1)
    metrics = loop.train_step(run, run.loader.next(0))
    assert metrics["loss/DistributionMatching"] > 0
    with pytest.raises(ValueError, match=r"teacher .* has another codec; use codec="):
        make_run(*DMD, f"objectives.2.options.teacher={directory}", "codec.patch=8")


def test_guidance_loads_null_contexts(make_run: MakeRun) -> None:
    run = make_run(*DMD, "objectives.2.options.guidance_scale=2.0")
    assert run.loader.null_contexts
    with torch.no_grad():
        for model in (run.model, critic_of(run).model, critic_of(run).teacher):
            for name, parameter in model.named_parameters():
                if "modulation" in name or "velocity" in name:
                    parameter.copy_(Key(0).fold("alive", name).normal(tuple(parameter.shape)) * 0.2)
    metrics = loop.train_step(run, run.loader.next(0))
    assert metrics["loss/DistributionMatching"] > 0  # the guided teacher differs from the critic at once


def test_held_out_losses_use_the_critic(make_run: MakeRun) -> None:
    own = "validation.data=[{name='moving_emoji',options={num_clips=2,num_frames=4}}]"
    run = make_run(*DMD, own, "validation.documents=2")
    loop.train_step(run, run.loader.next(0))
    assert run.validation is not None
    assert run.validation(run)["loss/DistributionMatching"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "omni/bundled/manifest.json").is_file(), reason="there is no bundled model yet")
def test_the_example_builds_and_makes_two_steps(tmp_path: Path) -> None:
    recipe = load_toml(ROOT / "train/recipes/examples/on_policy.toml", ("batch.shapes.0.rows=1",), Recipe)
    run = build_run(recipe, tmp_path)
    begin = weights(run.model)
    for _ in range(2):
        metrics = loop.train_step(run, run.next())
    assert all(math.isfinite(metrics[f"loss/{name}"]) for name in ("DistributionMatching", "critic"))
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, begin[name])}
    assert "flow.velocity.weight" in changed and not any(".text." in name for name in changed)
    assert run.progress.step == 2 and run.model.config.sampler == "flow_map"

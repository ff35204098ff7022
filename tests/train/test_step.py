"""One training step: the guard, the optimisers' split, schedules, averages, and losses divided by global counts."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from omni.config import build
from omni.document import Document, Role, Text
from omni.media import load_image
from omni.objectives import Terms
from omni.sequence.layout import Shape, pack
from train import loop
from train.guard import Guard, TooManyNonFinite
from train.loop import Run
from train.metrics import Tracker
from train.optim.ema import Ema
from train.optim.optimiser import Optimiser, OptimiserConfig, build_optimiser, multiplier
from train.tools import curve

MakeRun = Callable[..., Run]


def everything(run: Run) -> dict[str, torch.Tensor]:
    weights = {f"w/{n}": p.detach().clone() for n, p in run.model.named_parameters()}
    averages = {f"e/{n}": v.clone() for n, v in run.ema.averages.items()}
    return weights | averages | {f"o/{n}": v.clone() for n, v in run.optimiser.state_tensors().items()}


def spoiled(run: Run, loss: torch.Tensor, how: str) -> torch.Tensor:
    """Make the loss, or its gradient alone (by adding the root of 0, whose slope is infinite), NaN or infinite."""
    part, value = how.split()
    if part == "loss":
        return loss * float(value)
    weight = run.model.token.embedding.weight
    zero = weight - weight.detach()
    return loss + (zero.abs().sum() if value == "nan" else zero.sum()).sqrt()


def poison(run: Run, steps: set[int], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.model.forward

    def loss(batch: Any, objectives: Any, key: Any, *rest: Any) -> dict[str, Terms]:
        terms = real(batch, objectives, key, *rest)
        if run.progress.step in steps:
            terms["NextToken"] = dataclasses.replace(terms["NextToken"], sum=spoiled(run, terms["NextToken"].sum, how))
        return terms

    monkeypatch.setattr(run.model, "forward", loss)


def test_the_injected_error_affects_loss_or_gradient_alone(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    poison(run, {0, 1}, "gradient nan", monkeypatch)
    metrics = loop.train_step(run, run.next())
    assert math.isfinite(metrics["loss"]) and math.isnan(metrics["grad_norm"])
    poison(run, {1}, "gradient inf", monkeypatch)
    assert math.isfinite(loop.train_step(run, run.next())["loss"])


@pytest.mark.parametrize("how", ["loss nan", "loss inf", "gradient nan", "gradient inf"])
def test_a_non_finite_step_never_reaches_the_weights(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    run = make_run("max_steps=4")
    poison(run, {2}, how, monkeypatch)
    seen: list[dict[str, torch.Tensor]] = []

    def watch() -> bool:
        seen.append(everything(run))
        return False

    tracker = Tracker(run.out, 0, stream=io.StringIO())
    loop.train(run, tracker, watch)
    tracker.close()
    before, after, later = seen[2], seen[3], everything(run)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert any(not torch.equal(after[n], later[n]) for n in after)
    assert run.guard.num_skipped == 1 and run.progress.step == 4
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    (event,) = [row for row in rows if row.get("event") == "not finite"]
    assert event["step"] == 2 and event["documents"]


def test_too_many_in_a_row_stop_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("max_nonfinite=3")
    poison(run, {2, 3, 4}, "gradient nan", monkeypatch)
    with pytest.raises(TooManyNonFinite, match="3 steps in a row"):
        loop.train(run, Tracker(run.out, 0, stream=io.StringIO()), lambda: False)
    again = make_run("max_nonfinite=3", "optimiser.rate=1e-4")  # a checkpoint is saved, and a lower rate may continue
    loop.resume(again, lambda line: None)
    before, after = everything(run), everything(again)
    assert again.progress.step == 4 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loop.train(again, Tracker(again.out, 4, stream=io.StringIO()), lambda: again.progress.step >= 6)
    assert again.progress.step == 6 and again.guard.num_skipped == 3


def test_finite_steps_between_reset_the_row() -> None:
    guard = Guard(limit=2)
    for step in range(10):
        assert guard.accepts(step, math.nan if step % 2 else 1.0, 1.0, []) == (step % 2 == 0)
    assert guard.num_skipped == 5


def test_muon_takes_the_hidden_matrices_and_nothing_else(make_run: MakeRun) -> None:
    members = make_run().optimiser.members()
    layer = "transformer.blocks.0.text"
    assert members["muon"] == [f"{layer}.{part}.weight" for part in ("down", "gate_up", "out", "qkv")]
    rest = set(members["adamw"])
    for name in ("token.embedding", "flow.velocity", "flow.noisy", "transformer.modulation"):
        assert f"{name}.weight" in rest
    assert "transformer.blocks.0.modulation_table" in rest and f"{layer}.attention_norm.weight" in rest
    assert "muon" not in make_run("optimiser.name=adamw").optimiser.members()


def test_optimiser_state_round_trip_is_exact() -> None:
    def fresh() -> tuple[nn.Module, Optimiser]:
        model = nn.ModuleDict({"transformer": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
        return model, build_optimiser(
            model.named_parameters(), build({}, OptimiserConfig, "test"), {"transformer.weight"}
        )

    def step(model: nn.Module, optimiser: Optimiser, n: int) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.sin(torch.arange(parameter.numel()).float() * n).reshape(parameter.shape)
        optimiser.step(0.5)

    (a, one), (b, two) = fresh(), fresh()
    step(a, one, 1)
    two.load_state_tensors(one.state_tensors())
    b.load_state_dict(a.state_dict())
    step(a, one, 2)
    step(b, two, 2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match="no parameter"):
        two.load_state_tensors({"adamw/unknown.weight/step": torch.tensor(1.0)})


@pytest.mark.parametrize(("decay", "middle"), [("linear", 0.5), ("cosine", 0.5), ("wsd", 1.0), ("none", 1.0)])
def test_schedules(decay: str, middle: float) -> None:
    config = build({"decay": decay, "warmup_steps": 10}, OptimiserConfig, "test")
    assert multiplier(config, 0, 0.0) == pytest.approx(0.1)
    assert multiplier(config, 500, 0.5) == pytest.approx(middle)
    assert multiplier(config, 999, 1.0) == pytest.approx(0.0 if decay != "none" else 1.0, abs=1e-9)


def test_clip_scales_to_the_norm_and_leaves_nan_alone() -> None:
    layer = nn.Linear(3, 3, bias=False)
    optimiser = build_optimiser(layer.named_parameters(), build({"clip": 1.0}, OptimiserConfig, "test"))
    layer.weight.grad = torch.full((3, 3), 2.0)
    assert float(optimiser.clip()) == pytest.approx(6.0)
    assert float(layer.weight.grad.norm()) == pytest.approx(1.0, abs=1e-5)
    layer.weight.grad = torch.full((3, 3), math.nan)
    assert math.isnan(optimiser.clip())


def test_ema_follows_its_formula_and_can_be_applied() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    ema = Ema(layer, decay=0.9)
    expected = 0.0
    for n in range(60):
        with torch.no_grad():
            layer.weight.fill_(float(n))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert ema.averages["weight"][0, 0].item() == pytest.approx(expected, rel=1e-5)
    with ema.applied():
        assert layer.weight[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert layer.weight[0, 0].item() == 59.0


def test_losses_are_divided_once_by_the_global_count() -> None:
    parts = [Terms(torch.tensor(6.0), 2.0), Terms(torch.tensor(3.0), 7.0), Terms(torch.tensor(0.0), 0.0)]
    assert float(loop.mean_of(parts)) == 1.0
    assert float(loop.mean_of(parts[2:])) == 0.0


def test_packing_changes_neither_noise_nor_losses(make_run: MakeRun) -> None:
    """The same documents in short rows, in one long row, and in two batches: equal noise, equal losses."""
    run = make_run("autocast=none")
    spans = [run.loader._read(index).pieces[0].spans for index in range(6)]
    means = []
    for shapes in ([Shape(6, 256, 192)], [Shape(1, 2000, 2000)], [Shape(2, 128, 128), Shape(6, 256, 192)]):
        batches, used = pack(spans, shapes, channels=768, pad_id=run.loader.pad_id, copies=2)
        assert used == 6
        parts = [run.model(batch, run.objectives, run.key) for batch in batches]
        means.append({name: float(loop.mean_of([part[name] for part in parts]).detach()) for name in parts[0]})
    for other in means[1:]:
        assert other == pytest.approx(means[0], rel=1e-5)


def test_the_curve_of_a_run_is_a_picture(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("max_steps=3")
    tracker = Tracker(run.out, 0, stream=io.StringIO())
    loop.train(run, tracker, lambda: False)
    tracker.close()
    assert curve.main([str(run.out / "metrics.jsonl"), str(tmp_path / "curve.png")]) == 0
    assert load_image(tmp_path / "curve.png").shape == (3 * curve.HEIGHT, curve.WIDTH, 3)
    assert curve.main([str(tmp_path / "none.jsonl"), str(tmp_path / "curve.png")]) == 2
    (tmp_path / "odd.jsonl").write_text('[1]\n{"step": 1}\n{"loss/a": 2}\n7\n{"step": 2, "loss/a": "nan"}\n')
    assert curve.main([str(tmp_path / "odd.jsonl"), str(tmp_path / "curve.png")]) == 2


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(make_run: MakeRun) -> None:
    plain, compiled = make_run("batch.fixed=true"), make_run("compile=true")
    for _ in range(2):
        one = loop.train_step(plain, plain.loader.next(plain.progress.cursor))
        two = loop.train_step(compiled, compiled.loader.next(compiled.progress.cursor))
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
    compiled.model.eval()
    with torch.no_grad():
        reply = compiled.model.generate("draw a star", steps=1, max_tokens=2, force_image=True, image_size=(32, 32))
    assert reply.images[0].size == (32, 32)


def test_train_only_leaves_every_bit_of_the_rest(make_run: MakeRun) -> None:
    head = {"heads.joint": '{ head = "product", length = 4 }', "objectives": '[{ name = "joint_tokens" }]'}
    overrides = [f"{name}={value}" for name, value in head.items()]
    run = make_run("max_steps=3", 'train_only=["joint."]', *overrides)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    loop.train(run, Tracker(run.out, 0, stream=io.StringIO()), lambda: False)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith("joint.")), name
        assert torch.equal(run.ema.averages[name], before[name]) == (not name.startswith("joint.")), name
    with pytest.raises(ValueError, match="train_only = 'jiont' matches no weight's name"):
        make_run('train_only=["jiont"]')


def test_a_run_without_supervision_stops(make_run: MakeRun, tmp_path: Path) -> None:
    """Documents without supervised segments."""
    lines = [Document((Text("hello"), Text("hi", Role.ASSISTANT))).to_json() for _ in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    run = make_run(f'data=[{{name="jsonl", options={{path="{tmp_path}/d.jsonl"}}}}]', "max_steps=3")
    with pytest.raises(ValueError, match="the first 3 steps had nothing to learn from: no segment of their documents"):
        loop.train(run, Tracker(run.out, 0, stream=io.StringIO()), lambda: False)

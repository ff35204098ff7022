"""The CIFAR-10 experiments at small size: data, judge, the two calls of the network, and the task."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.experiments.cifar import learner as learning
from eval.experiments.cifar.cifar10 import cifar10_rows
from eval.experiments.cifar.draw import Canvas, draw_pictures, velocity_of
from eval.experiments.cifar.judge import (
    Classifier,
    ClassifierOptions,
    Moments,
    frechet_distance,
    load_features,
    moments,
)
from eval.experiments.cifar.learner import Learner, Method, TrainOptions, train
from eval.experiments.cifar.patches import (
    CLASS_PLACE,
    FIRST_CLASS,
    NO_CLASS,
    Patches,
    lay_pictures,
    with_classes,
    with_latents,
)
from eval.experiments.cifar.pictures import SIDE, Order, Pictures, cropped, flipped, load_pictures
from eval.suite import load_suite, main
from omni.losses import BatchFlowCall
from omni.objectives import OBJECTIVES, FlowObjective, Terms
from omni.objectives.flow_matching import FlowMatching
from omni.rng import Key

ROOT = Path(__file__).parents[2]
SUITE = str(ROOT / "eval" / "suites" / "cifar10.toml")
FLOW_OBJECTIVES = [name for name in OBJECTIVES.names() if issubclass(OBJECTIVES.get(name), FlowObjective)]
SMALL = TrainOptions(width=16, depth=1, head_dim=8, batch=8, rate=1e-2)


def pictures(num: int, seed: int = 0) -> Pictures:
    """Two coarse stripes each, of keyed colours."""
    stripes = (Key(seed).fold("stripes").uniform((num, 2, 1, 1, 3)) * 256).to(torch.uint8)
    return Pictures(stripes.expand(-1, -1, SIDE // 2, SIDE, -1).flatten(1, 2), torch.arange(num) % 10)


def write_parquet(path: Path, chosen: Pictures) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def encoded(pixels: Tensor) -> bytes:
        Image.fromarray(pixels.numpy()).save(buffer := io.BytesIO(), format="PNG")
        return buffer.getvalue()

    images = [{"bytes": encoded(pixels), "path": None} for pixels in chosen.pixels]
    captions = ["a photo"] * len(chosen)
    parquet.write_table(arrow.table({"image": images, "label": chosen.labels.tolist(), "caption": captions}), path)


# ---- data ----------------------------------------------------------------------------------------------------------


def test_pictures_come_back_from_a_parquet_file(tmp_path: Path) -> None:
    paths, sets = [tmp_path / "train.parquet", tmp_path / "test.parquet"], [pictures(7), pictures(3, seed=1)]
    for path, chosen in zip(paths, sets, strict=True):
        write_parquet(path, chosen)
    for found, wanted in zip(load_pictures(paths, 5, workers=1, device="cpu"), sets, strict=True):
        assert torch.equal(found.pixels, wanted.pixels[:5]) and torch.equal(found.labels, wanted.labels[:5])
    (tmp_path / "other.parquet").write_bytes(b"no parquet")
    for name in ("other", "absent"):
        with pytest.raises(ValueError, match="no parquet file with columns image and label"):
            load_pictures([tmp_path / f"{name}.parquet"], None, workers=1, device="cpu")
    write_parquet(tmp_path / "small.parquet", Pictures(sets[0].pixels[:, :16], sets[0].labels))
    with pytest.raises(ValueError, match=r"shape \(16, 32, 3\)"):
        load_pictures([tmp_path / "small.parquet"], None, workers=1, device="cpu")


def test_an_epoch_takes_every_picture_once_and_is_keyed() -> None:
    order, other = (Order(10, 3, Key(seed), torch.device("cpu")) for seed in (0, 1))
    first = torch.cat([order.rows(step) for step in range(3)])
    assert len(set(first.tolist())) == 9 and not torch.equal(order.rows(3), first[:3])
    assert torch.equal(order.rows(0), first[:3]) and not torch.equal(other.rows(0), first[:3])
    with pytest.raises(ValueError, match="a batch of 11 is larger than the 10 pictures"):
        Order(10, 11, Key(0), torch.device("cpu"))


def test_crops_and_flips_move_pixels_and_change_none() -> None:
    place = torch.arange(SIDE).expand(SIDE, SIDE)
    pixels = torch.stack([place.T, place, place + 100], -1).to(torch.uint8).expand(40, -1, -1, -1)
    turned, moved = flipped(pixels, Key(0)), cropped(pixels, Key(0))
    mirrored = (turned != pixels).flatten(1).any(1)
    assert 5 < int(mirrored.sum()) < 35 and torch.equal(turned[mirrored], pixels[mirrored].flip(2))
    shifts = {(int(p[16, 16, 0]) - 16, int(p[16, 16, 1]) - 16) for p in moved}
    assert len(shifts) > 10 and max(abs(s) for pair in shifts for s in pair) == 4
    assert torch.equal(moved[..., 2] - moved[..., 1], torch.full((40, SIDE, SIDE), 100, dtype=torch.uint8))


def test_patches_are_normalised_and_exact() -> None:
    chosen = pictures(50)
    patches = Patches.of(chosen, 4)
    latents = patches.encode(chosen.pixels)
    assert latents.shape == (50, *patches.shape) == (50, 64, 48)
    assert float(latents.mean((0, 1)).abs().max()) < 1e-5 and float((latents.std((0, 1)) - 1).abs().max()) < 1e-3
    assert torch.equal(patches.decode(latents), chosen.pixels)


# ---- the network ---------------------------------------------------------------------------------------------------


def learner_of(method: Method, options: TrainOptions = SMALL) -> Learner:
    chosen = pictures(24)
    return Learner(method, options, chosen, Patches.of(chosen, 8), Key(0))


def awake(learner: Learner) -> Learner:
    """With nonzero weights where the initialisation is zero."""
    for name, parameter in learner.model.named_parameters():
        parameter.detach().add_(0.1 * Key(1).fold(name).normal(tuple(parameter.shape)))
    return learner


def test_a_step_changes_classes_and_latents_and_keeps_the_layout() -> None:
    learner = learner_of(Method(objective="flow_matching", copies=2))
    batch, other = learner.batch(0), learner.batch(1)
    assert batch.num_items == 8 and batch.refine is other.refine and batch.item is other.item
    assert batch.ids.shape == (4, 8) and batch.refine_latents.shape == (4, 2 * 16, 192)
    assert torch.equal(batch.refine_latents[:, :16], batch.refine_latents[:, 16:])
    rows = learner.order.rows(0)
    wanted = torch.where(batch.ids[:, CLASS_PLACE] == NO_CLASS, NO_CLASS, FIRST_CLASS + learner.pictures.labels[rows])
    assert torch.equal(batch.ids[:, CLASS_PLACE], wanted)
    dropped = with_classes(learner.blank, torch.arange(4), torch.tensor([True, False, False, True]))
    assert dropped.dropped == {0, 3} and dropped.ids[:, CLASS_PLACE].tolist() == [NO_CLASS, 9, 10, NO_CLASS]
    assert dropped.null is not None and set(dropped.null.ids[:, CLASS_PLACE].tolist()) == {NO_CLASS}


def test_sampling_and_training_compute_the_same_function() -> None:
    """Without a mask and with one copy, as in sampling, F equals the training forward's."""
    learner = awake(learner_of(Method(objective="flow_matching")))
    x, t, s = Key(3).normal((8, 16, 192)), Key(4).uniform((8,)).fill_(0.8), torch.full((8,), 0.3)
    labels = torch.arange(8)
    batch = with_latents(with_classes(learner.blank, labels), x)
    with torch.no_grad():
        call = BatchFlowCall(learner.model, batch, learner.model.context(batch)[1], torch.ones(8))
        plain, null = call(x, t, s), call.null()(x, t, s)
        for w in (1.0, 1.5):
            drawing = velocity_of(learner.model, Method(objective="flow_matching", guidance=w), batch)
            wanted = w * plain + (1 - w) * null
            assert float((drawing(x, 0.8, 0.3) - wanted).abs().max()) < 1e-5 < float((plain - null).abs().max())


def test_samples_do_not_depend_on_the_batch_and_start_at_start_time() -> None:
    learner = awake(learner_of(Method(objective="flow_matching")))
    noise, labels = Key(5).normal((11, *learner.patches.shape)), torch.arange(11) % 10
    model = learner.model.eval()

    def drawn(num: int, **options: Any) -> Tensor:
        canvas = Canvas(lay_pictures(4, learner.patches), learner.patches, noise[:num], labels[:num])
        return draw_pictures(model, Method(objective="flow_matching", **options), 2, canvas, Key(6))

    many = drawn(11)
    assert many.shape == (11, SIDE, SIDE, 3) and torch.equal(drawn(3), many[:3])
    for options in ({"start_time": 0.5}, {"sampler": "restart"}, {"guidance": 3.0}):
        assert not torch.equal(drawn(3, **options), many[:3])
    learner.model.flow.velocity.bias.detach().fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        drawn(3)


@pytest.mark.parametrize("name", FLOW_OBJECTIVES)
def test_every_objective_trains(name: str) -> None:
    """By the row of the table, where there is one."""
    methods = load_suite(SUITE, []).cifar10.methods  # type: ignore[attr-defined]
    [method] = [m for m in methods.values() if m.objective == name] or [Method(objective=name)]
    learner = awake(learner_of(method))
    before = [parameter.detach().clone() for parameter in learner.model.flow.parameters()]
    learner.step(0, 0.5)
    assert int(learner.guard.num_skipped) == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.model.flow.parameters(), strict=True))


def test_training_learns_and_the_rehearsal_changes_nothing() -> None:
    fresh, learner = learner_of(Method(objective="shortcut")), learner_of(Method(objective="shortcut"))
    learner.rehearse()
    assert fresh.target is not None and learner.target is not None
    for one, other in (
        (fresh.model, learner.model),
        (fresh.average.model, learner.average.model),
        (fresh.target.model, learner.target.model),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not learner.optimiser.state_tensors() and learner.average.num_updates == 0
    for each in (fresh, learner):
        each.step(0, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), learner.model.parameters(), strict=True))

    def loss(each: Learner) -> float:
        terms = [each.model(each.batch(step), [FlowMatching()], Key(7))["FlowMatching"] for step in range(3)]
        return sum(float(term.sum.detach()) for term in terms) / sum(term.count for term in terms)

    learner = learner_of(Method(objective="flow_matching"))
    start = loss(learner)
    found = train(learner, 1.0)
    assert found.steps > 5 and found.seconds >= 1.0 and found.num_items == 8 and loss(learner) < 0.8 * start


class Poisoned(FlowMatching):
    """Flow matching whose loss is not finite after half of the training."""

    def loss(self, call, draw) -> Terms:  # noqa: ANN001
        terms = super().loss(call, draw)
        return Terms(terms.sum * (torch.nan if draw.items.progress > 0.5 else 1.0), terms.count, terms.weight)


class Broken(FlowMatching):
    def loss(self, call, draw) -> Terms:  # noqa: ANN001
        raise RuntimeError("out of luck\nsecond line")


@pytest.fixture
def bad_objectives() -> object:
    for name, objective in (("poisoned", Poisoned), ("broken", Broken)):
        OBJECTIVES.register(name)(objective)
    yield
    for name in ("poisoned", "broken"):
        OBJECTIVES._items.pop(name)


def test_steps_that_are_not_finite_change_nothing_and_are_counted(bad_objectives: object) -> None:
    learner = learner_of(Method(objective="poisoned"))
    learner.step(0, 0.1)
    kept = [parameter.detach().clone() for parameter in learner.model.parameters()]
    for step in range(1, learner.options.nonfinite_steps + 2):
        assert not learner.guard.too_many
        learner.step(step, 0.9)
    assert learner.guard.too_many and int(learner.guard.num_skipped) == learner.options.nonfinite_steps + 1
    assert all(torch.equal(a, b) for a, b in zip(kept, learner.model.parameters(), strict=True))
    assert all(bool(parameter.isfinite().all()) for parameter in learner.average.model.parameters())


# ---- the judge -----------------------------------------------------------------------------------------------------


def test_frechet_distance_of_normal_distributions() -> None:
    """For commuting covariances it is |m - n|^2 + |sqrt(a) - sqrt(b)|^2; a common rotation does not change it."""
    a, b = torch.tensor([1.0, 4.0, 0.0]).double(), torch.tensor([9.0, 1.0, 2.0]).double()
    m, n = torch.tensor([1.0, 0.0, 2.0]).double(), torch.zeros(3).double()
    turn = torch.linalg.qr(Key(0).normal((3, 3), torch.float64)).Q
    wanted = 5 + 4 + 1 + 2

    def moved(mean: Tensor, variances: Tensor) -> Moments:
        return Moments(turn @ mean, turn @ variances.diag() @ turn.T)

    # The root of a zero that is rounded is 1e-8.
    assert frechet_distance(moved(m, a), moved(n, b)) == pytest.approx(wanted, rel=1e-7)
    assert frechet_distance(moved(m, a), moved(m, a)) == pytest.approx(0, abs=1e-7)
    x = Key(1).normal((2, 3, 3), torch.float64)
    one, two = (Moments(m, c @ c.T) for c in x)
    product = torch.linalg.eigvals(one.covariance @ two.covariance).real.sqrt().sum()
    trace = one.covariance.trace() + two.covariance.trace() - 2 * product
    assert frechet_distance(one, two) == pytest.approx(float(trace), rel=1e-9)
    assert frechet_distance(one, Moments(m * torch.nan, a.diag())) != frechet_distance(one, two)


def test_the_distance_grows_with_distortion() -> None:
    features = Classifier(ClassifierOptions(width=4, features=16), Key(0)).eval().features
    data, more = moments(features, pictures(200).pixels), moments(features, pictures(200, seed=1).pixels)
    noise = moments(features, (Key(2).uniform((200, SIDE, SIDE, 3)) * 256).to(torch.uint8))
    assert data.mean.dtype == torch.float64 and data.covariance.shape == (16, 16)
    assert 0 < 10 * frechet_distance(more, data) < frechet_distance(noise, data)


class Means(torch.nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x.float().mean((2, 3)) if return_features else x.float()


def test_features_of_a_torchscript_file(tmp_path: Path) -> None:
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    pixels = pictures(3).pixels
    assert torch.allclose(load_features(tmp_path / "means.pt", "cpu")(pixels), pixels.float().mean((1, 2)))
    (tmp_path / "other.pt").write_bytes(b"no module")
    with pytest.raises(ValueError, match="no TorchScript module"):
        load_features(tmp_path / "other.pt", "cpu")


# ---- the task ------------------------------------------------------------------------------------------------------

TINY = [
    "cifar10.workers=1", "cifar10.minutes_per_objective=0.003", "cifar10.num_samples=20", "cifar10.patch=8",
    "cifar10.train={width=16,depth=1,head_dim=8,batch=8}", "cifar10.classifier={width=2,features=8,epochs=1,batch=20}",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, dict]]]:
    """The suite on 40 pictures: exit code, and rows by their short names."""
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "train.parquet", pictures(40))
    write_parquet(tmp_path / "test.parquet", pictures(30, seed=1))

    def run(*changes: str) -> tuple[int, dict[str, dict]]:
        code = main([SUITE, "cifar10.data=.", *TINY, *changes, "--json", "rows.json"])
        rows = json.loads(Path("rows.json").read_text())
        return code, {row["name"].partition(".")[2]: row for row in rows}

    return run


def test_a_tiny_run_gives_all_rows_and_pictures(run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, rows = run("cifar10.seeds=2", "cifar10.evaluations=[1,2,4]")
    changes = [*TINY, "cifar10.seeds=2", "cifar10.evaluations=[1,2,4]"]
    assert set(rows) == set(cifar10_rows(load_suite(SUITE, changes).cifar10))  # type: ignore[attr-defined]
    assert code in (0, 1) and all(row["value"] is not None for row in rows.values())
    for n in (1, 2, 4):
        best = min(rows[f"{name}_{n}"]["value"] for name in ("mean_flow", "moment_matching", "terminal_velocity"))
        ratio = rows[f"best_to_flow_matching_{n}"]
        assert ratio["value"] == pytest.approx(best / rows[f"flow_matching_{n}"]["value"]) and ratio["bar"] == "< 1"
    assert {f"flow_matching_{n}" for n in (8, 32)} < set(rows) and "mean_flow_8" not in rows
    assert rows["mean_flow_images"]["value"] == 8 * rows["mean_flow_steps"]["value"]
    assert rows["mean_flow_minutes"]["value"] >= 0.003 and rows["mean_flow_failed"]["value"] == 0
    for name in ("cifar10.png", "cifar10_samples.png"):
        assert 500 < (tmp_path / "runs" / "eval" / name).stat().st_size < 400_000
    printed = capsys.readouterr().out.partition("\nname ")[0]  # rows are printed at once, not only at the end
    assert printed.index("    mean_flow_1 = ") < printed.index("    terminal_velocity_1 = ")


def test_a_failing_method_does_not_affect_the_others(run: Callable, bad_objectives: object) -> None:
    code, rows = run(
        'cifar10.only=["flow_matching","shortcut","first","second"]', "cifar10.methods.first.objective=poisoned",
        "cifar10.methods.second.objective=broken", "cifar10.evaluations=[1,2]", "cifar10.train.nonfinite_steps=0",
        'cifar10.bars={"first_1"="< 1"}',
    )  # fmt: skip
    assert code == 1 and rows["first_1"]["holds"] is False
    assert rows["second_failed"]["unit"] == "of 1 seeds (RuntimeError: out of luck)"
    assert "steps that were not finite" in rows["first_failed"]["unit"] and rows["first_failed"]["value"] == 1
    assert rows["second_1"]["value"] is None and rows["shortcut_failed"]["value"] == 0
    assert rows["best_to_flow_matching_1"]["value"] > 0 and rows["shortcut_1"]["value"] > 0


def test_mistakes_raise_before_anything_runs(tmp_path: Path) -> None:
    for change, message in (
        ('cifar10.only=["mean_flo"]', "did you mean 'mean_flow'"),
        ("cifar10.methods.mean_flow.objective=mean_flwo", "did you mean 'mean_flow'"),
        ("cifar10.methods.mean_flow.options={powr=1}", "did you mean 'power'|powr"),
        ("cifar10.methods.mean_flow.head={time_scal=1}", "time_scal"),
        ("cifar10.methods.mean_flow.head={channels=3}", "follow from the patches"),
        ("cifar10.methods.mean_flow.objective=next_token", "is not an objective on latents"),
        ("cifar10.train={width=100}", "no multiple of head_dim"),
        ("cifar10.device=abacus", "is not available"),
    ):
        with pytest.raises(ValueError, match=message):
            load_suite(SUITE, [change])
    with pytest.raises(ValueError, match="no multiple of copies"):
        learner_of(Method(objective="flow_matching", copies=3))
    assert learning.REHEARSALS > 0 and main([SUITE, "--html", str(tmp_path / "page.html")]) == 2

"""An encoder that is trained with the model: its features, gradients, averages, checkpoints, workers and files."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from encoder_runs import make, picture, tensors
from encoders_towers import pixels, write_checkpoint

import omni
from omni.document import Document, Image, Role
from omni.encoders import Encoder, encoders, load_encoder
from omni.model import TOWER
from omni.rng import Key
from omni.sequence.layout import Batch
from train import loop
from train.build import publish_model
from train.loop import Run
from train.metrics import Tracker
from train.optim.ema import copy_of
from train.tools.average import average

TUNED = "tune_encoder=true"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in bfloat16."""
    folder = tmp_path_factory.mktemp("tuned")
    write_checkpoint("siglip", folder / "checkpoint", torch.bfloat16)
    return load_encoder(folder / "checkpoint").save(folder / "saved")


def go(run: Run, until: int) -> None:
    loop.train(run, Tracker(run.out, run.progress.step, stream=io.StringIO()), lambda: run.progress.step >= until)


def values_of(run: Run, batch: Batch) -> torch.Tensor:
    return run.model.encoder.features_of(batch.features.pictures)


def saved(out: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "state" / f"step-{step:08d}").glob("*.safetensors")}


@pytest.mark.parametrize("kind", encoders.names())
def test_features_in_the_batch_are_those_of_the_frozen_path(tmp_path: Path, kind: str) -> None:
    """To 1e-10 in float64, of pictures of different sizes; and every weight that they depend on has a gradient."""
    write_checkpoint(kind, tmp_path)
    tower = load_encoder(tmp_path)
    tower.module.double()
    pictures = [pixels(24, 24, 1)[0], pixels(31, 38, 2)[0]]
    frozen = torch.cat([tower.encode(one[None])[0].flatten(0, 1) for one in pictures])
    assert not tower.features_of([tower.spec.prepared(pictures[0])]).requires_grad
    module = tower.trainable()
    found = tower.features_of([tower.spec.prepared(one) for one in pictures])
    assert found.dtype == torch.float64 and found.abs().max() > 0.1
    torch.testing.assert_close(found, frozen, atol=1e-10, rtol=0)
    found.square().sum().backward()
    unused = "deepstack_merger_list."  # deepstack = "leave"
    without = {n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max()}
    assert all(name.startswith(unused) or name.endswith(("k_proj.bias", "qkv.bias")) for name in without), without


@pytest.mark.parametrize("pictures", ["both", "features"])
def test_losses_and_gradients_equal_those_of_frozen_features(tmp_path: Path, encoder: Path, pictures: str) -> None:
    """The first losses are those of a frozen encoder; so is the layout, and what the batch holds is bounded."""
    frozen, tuned = make(tmp_path, encoder, pictures), make(tmp_path, encoder, pictures, TUNED)
    assert not any(name.startswith(TOWER) for name in frozen.model.state_dict())
    means = []
    for run in (frozen, tuned):
        packed = run.loader.next(0)
        [batch] = packed.batches
        parts = run.model(batch, run.objectives, Key(0), None, 0.5, None)
        means.append({name: loop.mean_of([term]) for name, term in parts.items()})
        if run is frozen:
            wanted = batch
        else:
            assert batch.features.values.shape[1] == 0 and len(batch.features.pictures) == 4
            assert all(one.dtype == torch.uint8 and one.shape == (24, 24, 3) for one in batch.features.pictures)
            assert torch.equal(values_of(run, batch), wanted.features.values)
            assert torch.equal(batch.features.at, wanted.features.at) and torch.equal(batch.ids, wanted.ids)
            assert all(len(one) == 1 for one in run.loader.memo._kept.values())  # latents alone
    assert means[0].keys() == means[1].keys()
    for name, mean in means[0].items():
        torch.testing.assert_close(means[1][name], mean, atol=1e-6, rtol=0)
    sum(means[1].values()).backward()
    tower = dict(tuned.model.tower.named_parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in tower.items() if "k_proj.bias" not in n)


def test_a_resumed_run_is_exact_and_the_tower_learns(tmp_path: Path, encoder: Path) -> None:
    """Three steps at once equal one and two; the identity is that of the frozen encoder."""
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    more = (encoder, "both", TUNED, "objectives.1.options.target_decay=0.5")
    straight, broken = make(tmp_path / "straight", *more), make(tmp_path / "broken", *more)
    start = {name: value.clone() for name, value in straight.model.tower.state_dict().items()}
    assert straight.identity["encoder"] == make(tmp_path, encoder).identity["encoder"]
    go(straight, 3)
    go(broken, 1)
    again = make(tmp_path / "broken", *more)
    loop.resume(again, lambda line: None)
    go(again, 3)
    files = saved(tmp_path / "straight/run", 3)
    assert files == saved(tmp_path / "broken/run", 3) and set(files) >= {"ema.safetensors", "target.safetensors"}
    assert all(not torch.equal(value, start[name]) for name, value in again.model.tower.state_dict().items())
    assert again.identity["encoder"] == straight.identity["encoder"]
    assert sum(name.startswith(f"adamw/{TOWER}") for name in again.optimiser.state_tensors()) > 20
    assert not any(name.startswith(TOWER) for name in again.optimiser.members().get("muon", []))


def test_the_published_encoder_has_the_averaged_weights(tmp_path: Path, encoder: Path) -> None:
    run = make(tmp_path, encoder, "both", TUNED, "optimiser.encoder_rate=1.0", "optimiser.warmup_steps=0")
    before = run.model.encoder.encode(picture(1)[None])
    go(run, 4)
    live = run.model.encoder.encode(picture(1)[None])
    with run.ema.applied():
        averaged = run.model.encoder.encode(picture(1)[None])
        expected = run.model.encoder.weights()
    model = omni.from_pretrained(publish_model(run, tmp_path / "model"))
    assert not any(name.startswith(TOWER) for name in model.state_dict()) and model.tower is None
    stored = model.encoder.weights()
    assert (
        all(torch.equal(value, expected[name]) for name, value in stored.items()) and stored.keys() == expected.keys()
    )
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}  # as it came
    own = model.encoder.encode(picture(1)[None])
    assert (own - averaged).abs().max() < 0.1 * (averaged - before).abs().max()
    assert (averaged - live).abs().max() > 1e-3
    assert model.generate(Document((Image(picture(1), Role.USER),)), max_tokens=2, max_images=0).stop_reason
    frozen = publish_model(make(tmp_path, encoder), tmp_path / "frozen")
    with pytest.raises(ValueError, match="has another encoder than"):
        average([(str(frozen), 0.5), (str(tmp_path / "model"), 0.5)])
    more = make(tmp_path, tmp_path / "model/encoder", "both", TUNED, f"init_from={tmp_path / 'model'}")
    assert torch.equal(more.model.encoder.encode(picture(1)[None]), own)
    checkpoint = next((run.out / "state").iterdir())
    with pytest.raises(ValueError, match="has a trained encoder; set tune_encoder"):
        make(tmp_path, encoder, "both", f"init_from={checkpoint}", "init_partial=true")
    started = make(tmp_path, encoder, "both", TUNED, f"init_from={checkpoint}")
    assert torch.equal(started.model.encoder.encode(picture(1)[None]), averaged)


def test_the_encoder_has_a_rate_of_its_own(tmp_path: Path, encoder: Path) -> None:
    run = make(tmp_path, encoder, "both", TUNED, "optimiser.encoder_rate=0.25", "optimiser.rate=0.004")
    names = run.optimiser.names
    groups = run.optimiser.parts["adamw"].param_groups
    rates = {names[p].startswith(TOWER): group["initial_lr"] for group in groups for p in group["params"]}
    assert rates == {True: 0.001, False: 0.004}
    assert len({group["initial_lr"] for group in make(tmp_path, encoder).optimiser.parts["adamw"].param_groups}) == 1


def test_copies_have_a_tower_of_their_own(tmp_path: Path, encoder: Path) -> None:
    model = make(tmp_path, encoder, "both", TUNED).model
    other = copy_of(model)
    assert other.tower is other.encoder.module and other.tower is not model.tower and other.codec is model.codec
    before = model.encoder.encode(picture(1)[None])
    with torch.no_grad():
        for parameter in other.tower.parameters():
            parameter.add_(0.1)
    assert torch.equal(model.encoder.encode(picture(1)[None]), before)
    assert (other.encoder.encode(picture(1)[None]) - before).abs().max() > 1e-3
    frozen = make(tmp_path, encoder).model
    assert copy_of(frozen).encoder is frozen.encoder


@pytest.mark.parametrize("pictures", ["both", "features"])
def test_workers_give_the_batches_of_one_loader(tmp_path: Path, encoder: Path, pictures: str) -> None:
    run = make(tmp_path, encoder, pictures, TUNED, "workers=1")
    plain, cursor = make(tmp_path, encoder, pictures, TUNED).loader, 0
    for _ in range(3):
        one, other = run.next(), plain.next(cursor)
        cursor = other.cursor
        for a, b in zip(one.batches, other.batches, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
            assert len(a.features.pictures) == len(b.features.pictures) > 0
            assert all(torch.equal(x, y) for x, y in zip(a.features.pictures, b.features.pictures, strict=True))


def test_validation_uses_the_averaged_tower(tmp_path: Path, encoder: Path) -> None:
    run = make(
        tmp_path,
        encoder,
        "features",
        TUNED,
        f'validation.data=[{{name="jsonl",options={{path="{tmp_path}/d.jsonl"}}}}]',
    )
    first = run.validation(run)["loss"]
    with torch.no_grad():
        for name, value in run.ema.averages.items():
            if name.startswith(TOWER):
                value.add_(0.5)
    assert abs(run.validation(run)["loss"] - first) > 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optimiser.encoder_rate=0.5"], "encoder_rate = 0.5 has no effect on a frozen encoder"),
        ([TUNED, 'train_only=["features."]'], "tune_encoder has no effect with train_only = .*; add 'tower.'"),
        (["codec_options.tile=8"], "codec_options have no effect on the table of a codec"),
        (["codec_precision=float16"], "codec_precision = 'float16' has no effect on codec 'pixels'"),
    ],
)
def test_recipes_that_cannot_run(tmp_path: Path, encoder: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, encoder, "both", *changes)


def test_an_encoder_without_a_network_is_refused(tmp_path: Path, encoder: Path) -> None:
    model = make(tmp_path, encoder).model
    model.encoder.trainable = partial(Encoder.trainable, model.encoder)
    with pytest.raises(ValueError, match="'siglip' has no network to train; leave out tune_encoder"):
        model.tune_encoder()
    only = make(tmp_path, encoder, "both", TUNED, 'train_only=["tower."]')
    assert {n for n, p in only.model.named_parameters() if p.requires_grad} == {
        n for n in only.model.state_dict() if n.startswith(TOWER)
    }

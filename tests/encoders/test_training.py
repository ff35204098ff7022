"""Training with an encoder: features are cached like latents, in workers too, and the projector learns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from encoder_runs import make, picture, recipe, tensors
from encoders_towers import write_checkpoint

import omni
from omni.document import Document, Image, Role
from omni.encoders import load_encoder
from train import loop
from train.build import build_run, publish_model
from train.metrics import Tracker
from train.recipe import Recipe


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    write_checkpoint("siglip", folder / "checkpoint")
    return load_encoder(folder / "checkpoint", select=-3).save(folder / "saved")


def test_each_picture_is_encoded_once(tmp_path: Path, encoder: Path) -> None:
    run = make(tmp_path, encoder)
    calls: list[int] = []
    encode = run.model.encoder._encode
    run.model.encoder._encode = lambda pixels: (calls.append(len(pixels)), encode(pixels))[1]
    first = run.loader.next(0)
    again = run.loader.next(first.cursor)
    later = run.loader.next(again.cursor)
    assert sum(calls) == 6 and min(b.features.at.numel() for p in (first, again, later) for b in p.batches) > 0
    run.loader._window.clear()
    repeated = run.loader.next(0)
    assert sum(calls) == 6  # from the memo
    for a, b in zip(first.batches, repeated.batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    values = run.model.encoder.encode(picture(0)[None])[0].flatten(0, 1)
    assert torch.equal(first.batches[0].features.values[:36], values)


@pytest.mark.parametrize("pictures", ["both", pytest.param("features", marks=pytest.mark.slow)])
def test_workers_give_the_batches_of_one_loader(tmp_path: Path, encoder: Path, pictures: str) -> None:
    """Null contexts too."""
    run, plain = make(tmp_path, encoder, pictures, "workers=1"), make(tmp_path, encoder, pictures).loader
    cursor = 0
    for _ in range(3):
        plain._window.clear()
        one, other = run.next(), plain.next(cursor)
        cursor = other.cursor
        assert one.documents == other.documents and other.batches[0].features is not None
        for a, b in zip(one.batches, other.batches, strict=True):
            pairs = list(zip(tensors(a), tensors(b), strict=True))
            assert len(pairs) > 12 and all(torch.equal(x, y) for x, y in pairs)
            assert bool(b.is_latent.any()) == (pictures == "both")


@pytest.mark.parametrize("pictures", ["both", "features"])
def test_a_run_trains_the_projector_and_publishes_the_encoder(tmp_path: Path, encoder: Path, pictures: str) -> None:
    run = make(tmp_path, encoder, pictures)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    tower = {name: value.clone() for name, value in run.model.encoder.weights().items()}
    loop.train(run, Tracker(run.out, 0, stream=io.StringIO()), lambda: False)
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"features.first.weight", "features.second.weight"} <= changed
    assert all(torch.equal(value, tower[name]) for name, value in run.model.encoder.weights().items())
    model = omni.from_pretrained(publish_model(run, tmp_path / "model"))
    assert model.config.encoder.width == 16 and model.config.encoder.pictures == pictures
    assert torch.equal(model.encoder.encode(picture(1)[None]), run.model.encoder.encode(picture(1)[None]))
    assert model.encoder.configuration.select == -3 and run.identity["encoder"]
    reply = model.generate(Document((Image(picture(1), Role.USER),)), max_tokens=2, max_images=0)
    assert reply.stop_reason in ("length", "end", "images")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["heads.encoder.width=16"], "'encoder.width' has no effect"),
        (["encoder_options.select=-2"], "select has no effect on a saved encoder"),
        (["encoder=nowhere"], "'nowhere' holds no config.json"),
    ],
)
def test_recipes_that_cannot_run(tmp_path: Path, encoder: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, encoder, "both", *changes)


def test_an_encoder_is_added_to_trained_weights(tmp_path: Path, encoder: Path) -> None:
    """init_from a model without an encoder, with init_partial: all weights but the projector's are its own."""
    plain = recipe(tmp_path, encoder, "both").model_dump(mode="json")
    plain |= {"encoder": None, "heads": {}}
    start = publish_model(build_run(Recipe(**plain), tmp_path / "plain"), tmp_path / "start")
    more: list[Any] = [f"init_from={start}", "init_partial=true", 'train_only=["features."]']
    run = make(tmp_path, encoder, "both", *more)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {name for name in run.model.state_dict() if name.startswith("features.")}
    with pytest.raises(ValueError, match="tune_encoder have no effect without encoder"):
        Recipe(**{**plain, "heads": {"encoder": {}}})
    own = publish_model(run, tmp_path / "own")
    other = load_encoder(encoder)
    other.load_weights({name: value + 1 for name, value in other.weights().items()}, "other")
    with pytest.raises(ValueError, match="has another encoder; use encoder="):
        make(tmp_path, other.save(tmp_path / "other"), "both", f"init_from={own}")

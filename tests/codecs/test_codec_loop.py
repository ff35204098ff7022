"""The codec trainer: exact resume, its files, and the effect of each key of the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from omni.checkpoint import load_tensors
from omni.codecs import AutoencoderCodec, FsqCodec, load_codec
from omni.config import build, load_toml
from omni.rng import Key
from tests.codecs.test_codec import CONFIGS
from train.__main__ import main
from train.codec import loop as codec_loop
from train.codec.loop import CodecRecipe, CodecRun, learning_rate_at, loss_terms
from train.guard import TooManyNonFinite

pytest.importorskip("diffusers")
RECIPES = Path(__file__).parents[2] / "train" / "recipes"
SMALL = {
    "steps": 4,
    "batch_size": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "latent_noise": 0.1,
    "latent_penalty": 0.01,
    "statistics_pictures": 6,
    "eval_every": 4,
    "eval_pictures": 4,
    "final_pictures": 4,
    "save_every": 2,
}


def recipe(kind: str = "autoencoder", **changes: object) -> CodecRecipe:
    return build({**SMALL, "codec": CONFIGS[kind], **changes}, CodecRecipe, "test")


@pytest.mark.parametrize("kind", ["autoencoder", "fsq"])
def test_stopped_and_resumed_is_bit_identical(kind: str, tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    straight = CodecRun(recipe(kind), tmp_path / "straight")
    losses = [straight.train_step()["loss"] for _ in range(4)]
    straight.save()

    (tmp_path / "halves").mkdir()
    first = CodecRun(recipe(kind), tmp_path / "halves")
    assert not first.resume()
    again = [first.train_step()["loss"] for _ in range(2)]
    first.save()
    second = CodecRun(recipe(kind), tmp_path / "halves")
    assert second.resume()
    again += [second.train_step()["loss"] for _ in range(2)]
    second.save()

    assert losses == again
    state = "state/step-00000004/state.safetensors"
    one, other = (load_tensors(tmp_path / name / state) for name in ("straight", "halves"))
    assert one.keys() == other.keys() and any("muon" in name for name in one) and any("adam" in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_writes_a_loadable_normalised_codec(tmp_path: Path) -> None:
    codec_loop.train(recipe(), tmp_path)
    codec = load_codec(tmp_path / "codec")
    assert isinstance(codec, AutoencoderCodec)
    source = codec_loop.SceneSource(0, "train")
    latents = codec.encode(source.pixels(0, 6)).flatten(0, 2)
    assert latents.mean(0).abs().max() < 0.1 and (latents.std(0) - 1).abs().max() < 0.1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["final"] and rows[-1]["step"] == 4 and (tmp_path / "samples.png").exists()
    with pytest.raises(ValueError, match="another recipe.*recipe.batch_size was 3, now 4"):
        codec_loop.train(recipe(batch_size=4), tmp_path)


def test_a_longer_run_with_a_lower_rate_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec_loop.train(recipe(), tmp_path)
    codec_loop.train(recipe(steps=6, learning_rate=1e-4), tmp_path)
    output = capsys.readouterr().err
    assert "changed: steps was 4, now 6" in output and "changed: learning_rate was 0.001, now 0.0001" in output
    assert "the learning rate of step 4 is 3.33e-05, by the saved recipe it was 0" in output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and {row["key"] for row in rows if "key" in row} == {"steps", "learning_rate"}


def spoil(run: CodecRun, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """At these steps the loss is finite and its gradient is not."""
    real = codec_loop.loss_terms

    def terms(codec: object, pictures: object, recipe: object, key: Key) -> dict[str, torch.Tensor]:
        found = real(codec, pictures, recipe, key)  # type: ignore[arg-type]
        if run.step in steps:
            weight = next(run.module.parameters())
            found["loss"] = found["loss"] + (weight - weight.detach()).abs().sum().sqrt()
        return found

    monkeypatch.setattr(codec_loop, "loss_terms", terms)


def test_a_non_finite_gradient_changes_nothing_and_many_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CodecRun(recipe(max_nonfinite=2), tmp_path)
    spoil(run, monkeypatch, {1, 3, 4})
    run.train_step()
    state = {
        name: p.detach().clone() for name, p in (*run.module.named_parameters(), *run.optimiser.state_tensors().items())
    }
    averages = {name: value.clone() for name, value in run.ema.averages.items()}
    run.train_step()
    now = dict((*run.module.named_parameters(), *run.optimiser.state_tensors().items()))
    assert all(torch.equal(now[name], value) for name, value in state.items())
    assert all(torch.equal(run.ema.averages[name], value) for name, value in averages.items())
    assert (run.step, run.guard.num_skipped) == (2, 1) and all(p.grad is None for p in run.module.parameters())
    run.train_step()
    run.train_step()
    with pytest.raises(TooManyNonFinite, match="2 steps in a row"):
        run.train_step()


def test_the_command_locks_saves_and_stops_as_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    settings = [f"{name}={value}" for name, value in SMALL.items()]
    codec = json.dumps(CONFIGS["autoencoder"])
    file = tmp_path / "small.toml"
    file.write_text('kind = "codec"\nsteps = 1\nbatch_size = 1\nlearning_rate = 1.0\n')
    overrides = [*settings, f"codec={_toml(json.loads(codec))}"]
    run = CodecRun(recipe(), out)
    stops = iter([False, False, True])
    assert codec_loop.train(recipe(), out, lambda: next(stops)) is None and run.resume() and run.step == 2
    newest = out / "state/step-00000002/state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    assert main([str(file), *overrides, "--out", str(out)]) == 4
    assert "no intact checkpoint" in capsys.readouterr().err
    (out / ".codec.tmp-01234567").mkdir()
    (out / "state/step-00000002").rename(tmp_path / "away")
    assert main([str(file), *overrides, "--out", str(out)]) == 0
    assert (out / "codec/manifest.json").is_file() and not (out / ".codec.tmp-01234567").exists()
    assert len(list((out / "state").iterdir())) == 2


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def test_quantised_variant_starts_from_a_plain_codec(tmp_path: Path) -> None:
    plain = AutoencoderCodec.initialised(CONFIGS["autoencoder"], "test", Key(7))
    plain.save(tmp_path / "plain")
    changes = {"init_from": str(tmp_path / "plain"), "train_encoder": False, "latent_noise": 0.0}
    run = CodecRun(recipe("fsq", **changes), tmp_path)
    assert isinstance(run.codec, FsqCodec)
    name = "autoencoder.encoder.conv_out.weight"
    before = run.module.state_dict()[name].clone()
    assert torch.equal(before, plain.weights()["encoder.conv_out.weight"].float())
    run.train_step()
    run.train_step()
    after = run.module.state_dict()
    assert torch.equal(after[name], before)
    moved = "decoder.conv_in.weight"
    assert not torch.equal(after[f"autoencoder.{moved}"], plain.weights()[moved].float())


def test_training_the_decoder_alone_keeps_the_latents_to_the_bit(tmp_path: Path) -> None:
    codec_loop.train(recipe(), tmp_path / "first")
    before = load_codec(tmp_path / "first" / "codec")
    changes = {"init_from": str(tmp_path / "first" / "codec"), "train_encoder": False}
    codec_loop.train(recipe(**changes), tmp_path / "second")
    after = load_codec(tmp_path / "second" / "codec")
    pixels = codec_loop.SceneSource(0, "heldout").pixels(0, 2)
    latents = before.encode(pixels)
    assert torch.equal(after.encode(pixels), latents) and not torch.equal(after.decode(latents), before.decode(latents))
    assert isinstance(before, AutoencoderCodec) and isinstance(after, AutoencoderCodec)
    assert torch.equal(before.mean, after.mean) and torch.equal(before.deviation, after.deviation)


def test_stop_step_cuts_the_schedule_short(tmp_path: Path) -> None:
    full, cut = CodecRun(recipe(), tmp_path / "x"), recipe(stop_step=2)
    expected = [full.train_step()["loss"] for _ in range(2)]
    codec_loop.train(cut, tmp_path / "cut")
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == expected[-1:] and rows[-1]["step"] == 2
    with pytest.raises(ValueError, match="stop_step = 9 is beyond steps = 4"):
        recipe(stop_step=9)
    with pytest.raises(ValueError, match="needs init_from"):
        recipe(train_encoder=False)


def test_muon_moves_the_kernels_in_place(tmp_path: Path) -> None:
    run = CodecRun(recipe(), tmp_path)
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    run.train_step()
    changed = {name for name, p in run.module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(before)


def test_schedule_and_noise() -> None:
    config = recipe(steps=100, warmup_steps=10)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == rates[9] and 0 < rates[-1] < 2e-5
    codec = AutoencoderCodec.initialised(CONFIGS["autoencoder"], "test", Key(0))
    pictures = Key(1).normal((2, 3, 16, 16)).clamp(-1, 1)
    one, same, other = (loss_terms(codec, pictures, config, Key(k))["loss"].item() for k in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*codec*.toml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path: Path) -> None:
    parsed = load_toml(path, [], CodecRecipe)
    assert parsed.kind == "codec" and parsed.codec["class_name"] == "AutoencoderDC"


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ValueError, match="unknown key 'batchsize'; did you mean 'batch_size'"):
        load_toml(RECIPES / "bundled/codec.toml", ["batchsize=3"], CodecRecipe)
    with pytest.raises(ValueError, match="has no weights to train"):
        CodecRun(recipe("pixels"), Path("unused"))

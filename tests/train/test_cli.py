"""python -m train: a mistake prints one line and exits 2, a dry run writes nothing, the smoke recipe runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from omni.config import load_toml
from omni.errors import RetiredKeyWarning
from train.__main__ import main
from train.lock import hold
from train.metrics import read_metrics
from train.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "train" / "recipes"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.rate=1", "unknown key 'optimizer'; did you mean 'optimiser'?"),
        ("optimiser.rat=1", "did you mean"),
        ("max_steps=0", "max_steps"),
        ("autocast=fp8", "autocast"),
        ("data.0.name=emoji_word", "unknown data source 'emoji_word'; did you mean 'emoji_world'?"),
        ("data.0.options.splt=train", "unknown key 'splt'; did you mean 'split'?"),
        ("data.0.options.font=/no/such/font.ttf", "/no/such/font.ttf"),
        ("objectives.1.name=flow_machting", "did you mean 'flow_matching'?"),
        ("objectives.1.options.powr=2", "unknown key 'powr'"),
        ("objectives.1.name=next_token", "different names"),
        ("codec=/no/such/codec", "/no/such/codec"),
        ("codec.kind=pixel", "did you mean 'pixels'?"),
        ("tokenizer=/no/such/tokenizer", "/no/such/tokenizer"),
        ("init_from=/no/such/model", "/no/such/model"),
        ("model.num_heads=3", "num_kv_heads"),
        ("heads.samplr=euler", "samplr"),
        ("drop.text=0.9", "drop"),
        ("generation.stpes=4", "did you mean 'steps'"),
        ("generation.sampler=flowmap", "did you mean 'flow_map'"),
        ("heads.vocab_size=9", "'vocab_size' has no effect here"),
        ("heads.flow.channels=9", "'flow.channels' has no effect here"),
        ("heads.flow=3", "flow must be a table"),
        ("device=gpu", "use cpu"),
        ("preparation.resize=crop", "resize = 'crop' needs size = [height, width]"),
        ('preparation={resize="crop", size=[60, 64]}', "a multiple of the codec's stride 16 x 16"),
        ("optimiser={name='adamw', muon_rate=0.1}", "muon_rate = 0.1 has no effect with name = 'adamw'; leave it out"),
        ("optimiser={name='adamw', momentum=0.9}", "momentum = 0.9 has no effect with name = 'adamw'"),
        ("optimiser.decay_fraction=0.5", "decay_fraction = 0.5 has no effect with decay = 'cosine'; leave it out"),
        ("model.tangent_step=0.1", "tangent_step = 0.1 has no effect with tangents = 'forward'; leave it out, or"),
        ("model.attention=foo", "model.attention = 'foo': Input should be 'math', 'sdpa', 'flex' or 'flash'"),
        ("compile=true", "compile=true does not support latent_weights = 'separate'; set compile=false"),
        ("model.block_markers=true", "model: block_markers = True is not implemented yet; implemented: False"),
        ("preparation.side=64", "unknown key 'preparation.side'; did you mean 'size'"),
    ],
)
def test_a_mistake_prints_one_line_and_writes_nothing(
    recipe_file: Path, tmp_path: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["drop.images=0.9"] if override.startswith("drop") else ["model.num_kv_heads=2"]
    more += ["model.latent_weights=separate"] if override == "compile=true" else []
    assert main([str(recipe_file), override, *more, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPES / "smok.toml")]) == 2
    assert "smoke.toml" in capsys.readouterr().err


def test_dry_run_prints_sizes_and_writes_nothing(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe_file), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown and "documents" in shown and "steps in an hour" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_retired_key_without_effect_is_accepted(recipe_file: Path) -> None:
    with pytest.warns(RetiredKeyWarning, match="coupling is no longer a key of recipes; remove it"):
        assert "coupling" not in load_toml(recipe_file, ["coupling=false"], Recipe).model_dump()
    with pytest.raises(ValueError, match="coupling = True is no longer supported; leave it out"):
        load_toml(recipe_file, ["coupling=true"], Recipe)


@pytest.mark.parametrize("given", ["generation = { steps = 4, guidance = 2.0 }", "[generation.picture]\nsteps = 4"])
@pytest.mark.parametrize(
    "override", ["generation.steps=3", "generation.picture.steps=3", "generation . picture.steps=3"]
)
def test_the_command_line_replaces_an_option_in_its_group_or_flat(recipe_file: Path, given: str, override: str) -> None:
    text = recipe_file.read_text()
    recipe_file.write_text(f"{given}\n{text}" if "=" in given.split("\n")[0] else f"{text}\n{given}\n")
    assert load_recipe(recipe_file).generation["steps"] == 4
    assert load_recipe(recipe_file, [override]).generation["steps"] == 3
    assert load_recipe(recipe_file, ["generation.picture.steps=5", override]).generation["steps"] == 3
    with pytest.raises(ValueError, match="override 'generation.steps=0'|steps = 0: must be a whole number from 1"):
        load_recipe(recipe_file, ["generation.picture.steps=0"])


def test_an_option_given_twice_in_a_recipe_is_an_error(recipe_file: Path) -> None:
    recipe_file.write_text("generation = { steps = 4, picture = { steps = 4 } }\n" + recipe_file.read_text())
    with pytest.raises(ValueError, match=r"^\[generation\]: steps is given twice, as steps and as picture.steps"):
        load_recipe(recipe_file)


def test_the_smoke_recipe_trains_samples_and_publishes(tmp_path: Path) -> None:
    import omni

    out = tmp_path / "smoke"
    assert main([str(RECIPES / "smoke.toml"), "report.sheet_steps=20", "--out", str(out)]) == 0
    losses = [float(row["loss"]) for row in read_metrics(out / "metrics.jsonl")]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1.0
    assert [p.name for p in (out / "sheets").iterdir()] == ["step-00000020.png"]
    model = omni.from_pretrained(out / "model")
    assert model.tokenizer is not None and model.codec is not None
    with hold(out):  # also while a run holds the lock
        assert main([str(RECIPES / "smoke.toml"), "--out", str(out), "--publish", str(tmp_path / "again")]) == 0
    again = omni.from_pretrained(tmp_path / "again")
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


def test_a_finished_run_continues_and_publishes_again(recipe_file: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main([str(recipe_file), "max_steps=1", *out]) == 0
    before = (tmp_path / "out/model/manifest.json").read_bytes()
    assert main([str(recipe_file), "max_steps=2", "--resume", *out]) == 0
    assert (tmp_path / "out/model/manifest.json").read_bytes() != before


def test_init_from_another_tokenizer_or_shape_is_reported(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from omni.text.bpe import BPETokenizer
    from train.build import build_run

    BPETokenizer.train(["a cat and a cat and a cat"], 257).save(tmp_path / "one")
    BPETokenizer.train(["the dog, the dog, the dog"], 257).save(tmp_path / "two")
    first = [f"tokenizer={tmp_path / 'one'}", "max_steps=1", "--out", str(tmp_path / "first")]
    assert main([str(recipe_file), *first]) == 0
    init = f"init_from={tmp_path / 'first/model'}"
    assert main([str(recipe_file), init, f"tokenizer={tmp_path / 'two'}"]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    same = [init, f"tokenizer={tmp_path / 'one'}"]
    build_run(load_toml(recipe_file, same, Recipe), tmp_path / "second")
    output = capsys.readouterr().err
    assert "as initialised" not in output and "this recipe has" not in output
    other = [*same, "heads.logit_cap=20.0", "model.rope_base=500.0", "preparation.tail=cut"]
    build_run(load_toml(recipe_file, other, Recipe), tmp_path / "x")
    output = capsys.readouterr().err
    assert "has logit_cap = null, this recipe has 20.0" in output
    assert "has transformer.rope_base = 10000.0, this recipe has 500.0" in output
    assert re.search('has preparation = {.*"tail": "repeat"}, this recipe has {.*"tail": "cut"}', output)
    build_run(load_toml(recipe_file, [*same, "model.depth=2", "init_partial=true"], Recipe), tmp_path / "third")
    assert "weights stay as initialised" in capsys.readouterr().err


def test_init_from_loads_the_published_weights(recipe_file: Path, tmp_path: Path) -> None:
    from train.build import build_run

    assert main([str(recipe_file), "max_steps=2", "--out", str(tmp_path / "first")]) == 0
    change = [f"init_from={tmp_path / 'first' / 'state' / 'step-00000002'}"]
    warm = build_run(load_toml(recipe_file, change, Recipe), tmp_path / "second")
    cold = build_run(load_toml(recipe_file, [], Recipe), tmp_path / "third")
    name = "token.embedding.weight"
    assert not torch.equal(warm.model.state_dict()[name], cold.model.state_dict()[name])
    with pytest.raises(ValueError, match="init_partial"):
        build_run(load_toml(recipe_file, [*change, "model.depth=2"], Recipe), tmp_path / "fourth")
    build_run(load_toml(recipe_file, [*change, "model.depth=2", "init_partial=true"], Recipe), tmp_path / "fifth")


def test_a_generation_expert_is_upcycled_and_trains_alone(recipe_file: Path, tmp_path: Path) -> None:
    """Separate latent weights start as copies of the text weights; `train_only` with "*" changes no other bit."""
    from train.build import build_run

    assert main([str(recipe_file), "max_steps=2", "--out", str(tmp_path / "first")]) == 0
    expert = [f"init_from={tmp_path / 'first/model'}", "model.latent_weights=refine"]
    only = 'train_only=["transformer.blocks.*.latent.", "flow.noisy"]'
    run = build_run(load_toml(recipe_file, [*expert, only], Recipe), tmp_path / "second")
    weights = run.model.state_dict()
    theirs = {name: value for name, value in weights.items() if ".latent." in name}
    assert theirs and all(torch.equal(v, weights[name.replace(".latent.", ".text.")]) for name, v in theirs.items())
    learning = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert learning == {*theirs, "flow.noisy.weight", "flow.noisy.bias"}
    with pytest.raises(ValueError, match="latent_weights"):
        saved = tmp_path / "saved"
        run.model.save_pretrained(saved)
        build_run(load_toml(recipe_file, [f"init_from={saved}", only, "model.latent_weights=separate"], Recipe), saved)

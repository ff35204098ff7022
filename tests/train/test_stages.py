"""A list of stages as one run: each starts from the last, a resume is exact, errors name stage and key."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import omni
from omni.config import load_toml, parse_toml
from train import runs, stages
from train.__main__ import main
from train.codec.loop import CodecRecipe
from train.recipe import Recipe
from train.signals import EXIT_STOPPED, StopRequest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "train" / "recipes"
TOKENIZER = 'backend = "bpe"\nvocab_size = 260\ncorpus = "{folder}/texts.txt"\nout = "unused"\n'
BASE = """
max_steps = 1
codec = { kind = "pixels", patch = 16, frames_per_chunk = 2 }
ema_decay = 0.5
model = { width = 16, depth = 1, num_heads = 1, num_kv_heads = 1, head_dim = 16 }
batch = { shapes = [{ rows = 1, budget = 64, refine_budget = 32 }] }
optimiser = { warmup_steps = 5 }
objectives = [{ name = "next_token" }, { name = "flow_matching" }]
data = [
  { name = "moving_emoji", options = { num_frames = 4 }, weight = 3.0 },
  { name = "moving_emoji", options = { num_frames = 2 } },
]
"""
LISTED = """
kind = "stages"
base = "{folder}/tiny.toml"
changes.max_steps = 2

[[stages]]
name = "words"
tokenizer = "{folder}/words.toml"

[[stages]]
name = "first"

[[stages]]
name = "second"
changes = {{ seed = 4, optimiser.rate = 1e-3, data.0.weight = 1.0 }}

[[stages]]
name = "mean"
average = {{ first = 0.25, second = 0.75 }}

[[stages]]
name = "more_words"
tokenizer = "{folder}/words.toml"
changes.vocab_size = 262

[[stages]]
name = "retold"
retokenize = {{}}

[[stages]]
name = "last"
changes.max_steps = 1
"""


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A file of seven stages beside a tiny base recipe."""
    folder = tmp_path
    (folder / "tiny.toml").write_text(BASE)
    (folder / "texts.txt").write_text("draw a cat, draw a dog, draw a cat and a dog\n" * 9)
    (folder / "words.toml").write_text(TOKENIZER.format(folder=folder))
    path = folder / "stages.toml"
    path.write_text(LISTED.format(folder=folder))
    return path


def planned(path: Path, *overrides: str) -> list[stages.Stage]:
    return stages.plan(load_toml(path, overrides, stages.StagesConfig), str(path), path.parent / "out")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return omni.from_pretrained(folder / "model").state_dict()


def recipe_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "recipe.json").read_text())


def test_each_stage_starts_from_the_last_one(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = listed.parent / "out"
    assert main([str(listed), "--out", str(out)]) == 0
    second, last = recipe_of(out / "second"), recipe_of(out / "last")
    assert second["init_from"] == str(out / "first/model") and last["init_from"] == str(out / "retold/model")
    assert second["tokenizer"] == str(out / "words/tokenizer")
    assert last["tokenizer"] == str(out / "more_words/tokenizer")
    assert (second["seed"], second["max_steps"], last["max_steps"]) == (4, 2, 1)
    assert (second["optimiser"]["rate"], second["optimiser"]["warmup_steps"]) == (1e-3, 5)  # merged, not replaced
    assert [source["weight"] for source in second["data"]] == [1.0, 1.0]
    one, two, mean = (weights(out / name) for name in ("first", "second", "mean"))
    name = "transformer.blocks.0.text.mlp_in.weight" if "transformer.blocks.0.text.mlp_in.weight" in one else max(one)
    assert torch.allclose(mean[name], 0.25 * one[name] + 0.75 * two[name], atol=1e-2)
    ids = [omni.from_pretrained(out / name / "model").config.vocab_size for name in ("mean", "last")]
    assert ids[1] == ids[0] + 2

    assert main([str(listed), "--out", str(out)]) == 2  # like a run: not without --resume
    assert "holds 'words' already; continue with --resume" in capsys.readouterr().err
    shutil.rmtree(out / "last")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert main([str(listed), "--out", str(out), "--resume"]) == 0
    output = capsys.readouterr().out
    assert output.count(": finished, ") == 6 and "stage 7 of 7, 'last': model" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check_that_others_are_refused(listed, out, capsys)


def check_that_others_are_refused(listed: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished stage with changed settings, or without its first stage, raises."""
    resume = ["--out", str(out), "--resume"]
    assert main([str(listed), "stages.2.changes.seed=5", *resume]) == 2
    assert re.search(r"error: stage 'second': .* recipe.seed was 4, now 5", capsys.readouterr().err)
    assert main([str(listed), "stages.3.average.first=0.5", "stages.3.average.second=0.5", *resume]) == 2
    assert "error: stage 'mean':" in capsys.readouterr().err
    assert main([str(listed), "changes.report.log_steps=7", "changes.threads=1", *resume]) == 0  # changes no weight
    shutil.rmtree(out / "first")
    assert main([str(listed), *resume]) == 2
    assert "stage 'second': it is finished, and 'first' before it is not; remove" in capsys.readouterr().err


def test_a_stopped_stage_resumes_to_the_bit(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ["stages.1.changes.max_steps=4", "stages.2.changes.max_steps=3"]
    text = listed.read_text()
    listed.write_text(text[: text.index('[[stages]]\nname = "mean"')])
    whole, parts = listed.parent / "whole", listed.parent / "parts"
    assert main([str(listed), *only, "--out", str(whole)]) == 0

    class AfterTwo(StopRequest):
        asked = 0

        def __call__(self) -> bool:
            AfterTwo.asked += 1
            return AfterTwo.asked > 2

    with monkeypatch.context() as patch:
        patch.setattr(runs, "StopRequest", AfterTwo)
        assert main([str(listed), *only, "--out", str(parts)]) == EXIT_STOPPED
    assert not (parts / "first/model").exists() and not (parts / "second").exists()
    assert main([str(listed), *only, "--out", str(parts), "--resume"]) == 0
    for name in ("first", "second"):
        one, two = weights(whole / name), weights(parts / name)
        assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.changes.optimizer.rate=1", "stage 'first': .* unknown key 'optimizer'; did you mean 'optimiser'?"),
        ("changes.drop.txt=1", "stage 'first': .* unknown key 'drop.txt'; did you mean 'text'?"),
        ("stages.2.changes.seed=x", "stage 'second': .* seed = 'x'"),
        ("stages.2.changes.data.2.weight=3", "stage 'second': changes.data.2: there is no such item in a list of 2"),
        ("stages.4.changes.vocab=3", "stage 'more_words': .* unknown key 'vocab'"),
        ("stages.1.nme=x", "unknown key 'stages.1.nme'; did you mean 'name'?"),
        ("stages.1.name=a/b", "stages.1.name = 'a/b'"),
        ("stages.2.name=first", "two stages are named 'first'"),
        ("stages.3.average.frist=0.25", "stage 'mean': average: 'frist' is no earlier stage .*; did you mean 'first'?"),
        ("stages.2.init=mean", "stage 'second': init: 'mean' is no earlier stage that makes a model; models .*: first"),
        ("stages.1.recipe={folder}/tiy.toml", "stage 'first': .*cannot read .*tiy.toml.*; did you mean 'tiny.toml'?"),
        ("stages.1.average.x=1", "stage 'first': average: 'x' is no earlier stage .*; models before it: none"),
        ("stages.3.changes.seed=1", "stage 'mean': changes has no effect on average"),
        ("stages.0.init=first", "stage 'words': init has no effect on tokenizer"),
        ("stages.0.recipe=x", "stage 'words' has recipe and tokenizer; give one"),
        ("base=", "stage 'first': .*cannot read"),
        ("kinds=stages", "unknown key 'kinds'; did you mean 'kind'?"),
    ],
)
def test_a_mistake_names_the_stage_and_the_key(
    listed: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = listed.parent / "out"
    assert main([str(listed), override.format(folder=listed.parent), "--out", str(out)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and re.match(f"error: .*{message}", errors), errors
    assert not out.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.6.changes.objectives.1.options.powr=2", "stage 'last': .*unknown key 'powr'"),
        ("stages.6.changes.data.0.options.sprit=9", "stage 'last': .*unknown key 'sprit'; did you mean 'sprite'"),
        ("stages.6.changes.heads.logit=1", "stage 'last': .*unknown key 'logit'"),
        ('stages.6.changes.train_only=["flw"]', "stage 'last': train_only = 'flw' matches no weight's"),
    ],
)
def test_options_of_the_last_stage_are_checked_before_the_first_begins(
    listed: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--dry-run"]):
        assert main([str(listed), override, "--out", str(listed.parent / "out"), *more]) == 2
        assert re.match(f"error: {message}", capsys.readouterr().err)
        assert not (listed.parent / "out").exists()


def test_a_dry_run_writes_nothing(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(listed.parent.rglob("*"))
    assert main([str(listed), "--dry-run", "--out", str(listed.parent / "out")]) == 0
    assert sorted(listed.parent.rglob("*")) == before
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 7 and output[2].startswith("second: model, to be made, checked without ")


def test_a_file_of_an_unknown_kind_raises(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed.write_text('kind = "stage"\n')
    assert main([str(listed)]) == 2
    assert "kind = 'stage'; did you mean 'stages'?" in capsys.readouterr().err
    listed.write_text('kind = "stages"\nstages = []\n')
    assert main([str(listed), "--publish", "x"]) == 2
    assert "--publish is for models" in capsys.readouterr().err


def test_init_none_and_init_of_another_stage(listed: Path) -> None:
    out = str(listed.parent / "out")
    fresh = planned(listed, "stages.2.init=none")[2].settings
    assert isinstance(fresh, Recipe) and fresh.init_from is None
    named = planned(listed, "stages.6.init=first")[6]
    assert isinstance(named.settings, Recipe) and str(named.settings.init_from) == f"{out}/first/model"
    assert named.inputs == (f"{out}/more_words/tokenizer", f"{out}/first/model")
    given = planned(listed, "stages.6.changes.init_from=elsewhere")[6]
    assert given.inputs == (f"{out}/more_words/tokenizer",)


def test_merged_by_hand() -> None:
    base = {"a": 1, "table": {"x": 1, "y": [1, {"z": 2}]}, "list": [1, 2]}
    changes = {"table": {"y": {"1": {"w": 3}}}, "list": [5], "new": {"0": "text"}}
    whole = {"a": 1, "table": {"x": 1, "y": [1, {"z": 2, "w": 3}]}, "list": [5], "new": {"0": "text"}}
    assert stages.merged(base, changes, "changes") == whole
    assert base["table"] == {"x": 1, "y": [1, {"z": 2}]}  # not modified
    assert stages.merged({"a": {"b": 1}}, {"a": 2}, "") == {"a": 2}
    assert stages.merged({"a": 2}, {"a": {"b": 1}}, "") == {"a": {"b": 1}}


def test_the_command_line_applies_last(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the changes of the file for all stages, and after a stage's own."""
    planned: list[list[stages.Stage]] = []
    monkeypatch.setattr(stages, "dry_run", lambda plan: planned.append(plan) or 0)
    for overrides in ([], ["changes.max_steps=7", "changes.seed=9"], ["stages.6.changes.max_steps=5"]):
        assert main([str(listed), *overrides, "--dry-run", "--out", str(listed.parent / "out")]) == 0
    steps = [[s.settings.max_steps for s in plan if s.kind == "model"] for plan in planned]  # type: ignore[union-attr]
    assert steps == [[2, 2, 1], [7, 7, 7], [2, 2, 5]]
    assert [s.settings.seed for s in planned[1] if s.kind == "model"] == [9, 9, 9]  # type: ignore[union-attr]


def test_options_of_a_stage_replace_those_of_the_base_in_their_group_or_flat(
    listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[list[stages.Stage]] = []
    monkeypatch.setattr(stages, "dry_run", lambda plan: planned.append(plan) or 0)
    flat, nested = "changes.generation.steps=4", "stages.6.changes.generation.picture.steps=3"
    assert main([str(listed), flat, nested, "--dry-run", "--out", str(listed.parent / "out")]) == 0
    assert main([str(listed), nested, "--dry-run", "--out", str(listed.parent / "out")]) == 0
    last = [plan[-1].settings.generation for plan in planned if plan[-1].kind == "model"]  # type: ignore[union-attr]
    assert last == [{"steps": 4}, {"steps": 3}]


# ------------------------------------------------------------------------------------------------ shipped recipes


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_opens_with_its_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    opening = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    assert f"python -m train {path.relative_to(ROOT)}" in opening
    if path.parent.name == "examples" and "codec" not in path.name:
        assert "device=cuda" in opening
    kind = parse_toml(text, path.name).get("kind", "model")
    given = []
    if re.search("^decoder = ", text, re.MULTILINE):  # for an imported model of any depth
        at = "base." if kind == "stages" else ""
        given = [f"{at}decoder=omni/bundled", f"{at}model.depth=30"]
    loaded = load_toml(path, given, {"model": Recipe, "codec": CodecRecipe, "stages": stages.StagesConfig}[kind])
    if isinstance(loaded, stages.StagesConfig) and not given:  # stages on a decoder have the sizes of that one
        assert stages.dry_run(stages.plan(loaded, path.name, path.parent / "not there")) == 0


SMALL = (
    *("model.width=32", "model.depth=1", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=32"),
    *("batch.shapes.0.rows=1", "threads=1"),
)


@pytest.mark.parametrize("name", ["own_pictures", "own_chats", "from_bundled", "moving_clips", "own_codec"])
def test_examples_run_on_tiny_data(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.train.test_data import write_messages, write_parquet

    data = {"own_pictures": write_parquet, "own_chats": write_messages, "from_bundled": write_messages}
    own = [f"data.0.options.path={data[name](tmp_path)['path']}"] if name in data else []
    if own:  # a share of three records is none
        own += ['validation={data=[{name="moving_emoji"}], documents=2}']
    if name == "from_bundled":  # the bundled sizes and weights
        monkeypatch.chdir(ROOT)
        assert main([str(RECIPES / "examples" / f"{name}.toml"), *own, "batch.shapes.0.rows=1", "--dry-run"]) == 0
        return
    changes = ["batch_size=2"] if name == "own_codec" else [*SMALL, *own]
    assert main([str(RECIPES / "examples" / f"{name}.toml"), *changes, "--dry-run"]) == 0
    assert "a step: " in capsys.readouterr().out

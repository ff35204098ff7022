"""Recipes on an imported language model: what they take from it, and a text path that stays, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import omni
from eval.experiments.imports.gguf_files import write
from eval.experiments.imports.tiny import write_decoder
from eval.experiments.imports.training import (
    WEIGHT_SETS,
    frozen_rows,
    imported,
    losses_of,
    recipe_of,
    run_of,
    text_logits,
)
from omni.importers.decoders import import_decoder
from omni.importers.places import find_checkpoint, origin_of
from omni.model import Omni
from omni.weights import is_text_path
from train import runs
from train.build import publish_model
from train.decoder import PublishBase, base_of
from train.recipe import Recipe


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("decoder"))


def test_a_frozen_text_path_stays_bit_for_bit_with_each_weight_set(tmp_path: Path) -> None:
    rows = frozen_rows(tmp_path, steps=8)
    assert rows.keys() == WEIGHT_SETS.keys()
    assert all(differ == 0 and fall > 0 for differ, fall in rows.values()), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_frozen_text_path_is_that_of_the_import(dtype: torch.dtype, tmp_path: Path) -> None:
    out = import_decoder(write_decoder(tmp_path / "p", "llama"), tmp_path / "d", dtype=dtype)
    run = run_of(recipe_of("frozen_expert", out, ["model.expert.width=32"], None), tmp_path / "run")
    losses_of(run, 1)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (out, publish_model(run, tmp_path / "m")))
    assert {value.dtype for value in found.values()} == {dtype}
    assert all(torch.equal(found[name], value) for name, value in wanted.items() if is_text_path(name))


def test_a_recipe_takes_what_it_leaves_out(decoder: Path, tmp_path: Path) -> None:
    recipe = recipe_of("frozen_expert", decoder, ["model.expert.width=32"], None)
    theirs = omni.from_pretrained(decoder).config
    assert recipe.model.depth == theirs.transformer.depth and recipe.model.qk_norm == "head"
    assert recipe.model.expert is not None and recipe.model.expert.width == 32
    assert recipe.tokenizer == f"{decoder}/tokenizer" and recipe.init_from == decoder
    assert (
        recipe.heads["new_rows"] == 73
        and recipe.heads["max_context"] == theirs.max_context
        and recipe.generation["temperature"] == 0
    )
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    run = run_of(recipe, tmp_path / "run")
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert not any(map(is_text_path, trained)) and "token.new_embedding.weight" in trained
    assert any(name.startswith("transformer.blocks.2.latent.") for name in trained)
    assert run.model.published.keys() >= {"config.json", "tokenizer.json"}


def test_a_lora_trains_and_requests_switch_it(decoder: Path, tmp_path: Path) -> None:
    table = recipe_of("frozen_expert", decoder, [], None).model_dump(mode="json")
    table["model"] |= {"expert": None, "loras": [{"name": "a", "rank": 2}, {"name": "b", "rank": 2}]}
    run = run_of(Recipe.model_validate({**table, "lora": "a"}), tmp_path / "run")
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad and "loras" in name}
    assert trained and all(name.startswith("transformer.loras.a.") for name in trained)
    off = text_logits(run.model.eval(), ["draw"])[0]
    losses_of(_training(run.model, run), 4)
    on = text_logits(run.model.eval(), ["draw"], "a")[0]
    assert torch.equal(text_logits(run.model, ["draw"])[0], off) and (on - off).abs().max() > 1e-4
    found = run.model.generate("draw", lora="a", max_tokens=3).record["options"]["lora"]
    assert found == "a"
    with pytest.raises(ValueError, match="this model has no LoRA 'c'; it has \\['a', 'b'\\]"):
        run.model.generate("draw", lora="c")


def _training(model: Omni, run: Any) -> Any:
    model.train()
    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decoder=nowhere", "decoder = 'nowhere' holds no config.json of a model; make it: omni import PATH"),
        ("lora=x", "lora = 'x' is not one of .model. loras; add it there"),
        ("model.width=32", "does not fit this model in"),
    ],
)
def test_what_does_not_fit_is_refused(decoder: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(recipe_of("frozen_expert", decoder, [override], None), tmp_path / "run")


def test_separate_weights_start_as_copies_unless_fresh(decoder: Path, tmp_path: Path) -> None:
    for upcycle in (True, False):
        table = recipe_of("frozen_expert", decoder, [], None).model_dump(mode="json")
        table["model"] |= {"expert": None, "latent_weights": "separate"}
        run = run_of(Recipe.model_validate({**table, "upcycle": upcycle}), tmp_path / "run")
        layer: Any = run.model.transformer.blocks[0]
        assert torch.equal(layer.latent.qkv.weight, layer.text.qkv.weight) == upcycle


def test_a_trained_expert_takes_a_pool_that_changes_nothing_at_first(decoder: Path, tmp_path: Path) -> None:
    before = run_of(recipe_of("frozen_expert", decoder, ["model.expert.width=32"], None), tmp_path / "run")
    losses_of(before, 2)
    own = ["model.expert.width=32", 'train_only=["transformer.blocks.*.latent.", "flow."]']
    changes = [*own, f"init_from={publish_model(before, tmp_path / 'm')}"]
    pooled = ["heads.flow.pool_layers=[0, 2]"]
    first = [losses_of(run_of(recipe_of("frozen_expert", decoder, more, None), tmp_path / "r"), 1) for more in
             (changes, [*changes, *pooled])]  # fmt: skip
    assert first[0] == first[1]
    with pytest.raises(ValueError, match="has transformer.rope_base = .*; frozen weights cannot adapt: use the same"):
        run_of(recipe_of("frozen_expert", decoder, [*changes, "model.rope_base=7.0"], None), tmp_path / "r")


@pytest.fixture(scope="module")
def published(decoder: Path) -> Path:
    """The published folder that `decoder` is the import of."""
    return decoder.parent / "qwen3"


SMALL = ["model.expert.width=32", "max_steps=2", "report.save_steps=1", "report.log_steps=1"]


def test_a_run_publishes_without_its_frozen_language_model(
    decoder: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its end, and with --publish. The directory is small, loads, and begins another run."""
    base = ["publish_base.source=" + str(published), "publish_base.name=Tiny", "publish_base.install=tiny-model==1"]
    recipe = recipe_of("frozen_expert", decoder, [*SMALL, *base], None)
    assert recipe.publish_base is not None and Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert runs.dry_run(recipe, tmp_path / "dry") == 0
    assert " MB in bf16, beside the language model" in capsys.readouterr().out
    assert runs.train_model(recipe, tmp_path / "run", resume=False) == 0
    assert runs.publish_state(recipe, tmp_path / "run", tmp_path / "again") == 0
    whole = recipe_of(
        "frozen_expert", decoder, SMALL, None
    )  # a run whose recipe did not have the key, published with it
    assert runs.train_model(whole, tmp_path / "other", resume=False) == 0
    assert runs.publish_state(recipe, tmp_path / "other", tmp_path / "later") == 0
    for folder in (tmp_path / "run/model", tmp_path / "again", tmp_path / "later"):
        stored = load_file(folder / "model.safetensors")
        assert not any(map(is_text_path, stored)) and {value.dtype for value in stored.values()} == {torch.bfloat16}
        found, wanted = omni.from_pretrained(folder, base=published), omni.from_pretrained(decoder)
        of_text = {name: value for name, value in wanted.state_dict().items() if is_text_path(name)}
        assert all(torch.equal(found.state_dict()[name], value) for name, value in of_text.items())
        assert found.base is not None and found.base.record.install == "tiny-model==1"  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as here:
        here.setenv("OMNI_TINY", str(published))
        more = recipe_of("frozen_expert", decoder, [*SMALL, f"init_from={tmp_path / 'again'}"], None)
        model = run_of(more, tmp_path / "more").model
    assert all(torch.equal(model.state_dict()[name].bfloat16(), value) for name, value in stored.items())
    with pytest.raises(ValueError, match=r"leaves its language model out \(base.json\); use the import that it was"):
        recipe_of("frozen_expert", tmp_path / "again", SMALL, None)


def test_a_base_that_cannot_be_left_out_is_refused_before_training(
    decoder: Path, published: Path, tmp_path: Path
) -> None:
    recipe = recipe_of("frozen_expert", decoder, [*SMALL, "publish_base=true"], None)
    with pytest.raises(
        ValueError, match=r"publish_base = true: .* was imported from a local file.*publish_base = \"llm"
    ):
        run_of(recipe, tmp_path / "run")
    other = write_decoder(tmp_path / "other", "qwen3", num_hidden_layers=2)
    recipe = recipe_of("frozen_expert", decoder, [*SMALL, f"publish_base={other}"], None)
    with pytest.raises(ValueError, match=r"other has no weight transformer.blocks.2"):
        run_of(recipe, tmp_path / "run")
    with pytest.raises(
        ValueError, match="publish_base leaves a frozen language model out; it needs decoder and text_p"
    ):
        recipe_of("frozen_expert", decoder, [*SMALL, f"publish_base={published}", "text_path=tuned"], None)
    assert recipe_of("frozen_expert", decoder, [*SMALL, "publish_base=false"], None).publish_base is None


def test_an_import_records_the_package(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`publish_base = true` finds it again."""
    from transformers import AutoModelForCausalLM

    (tmp_path / "some_model").mkdir()
    write(tmp_path / "some_model/tiny.gguf", AutoModelForCausalLM.from_pretrained(published), "F32")
    (tmp_path / "some_model/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = find_checkpoint("some_model")
    out = import_decoder(path, tmp_path / "out", with_tokenizer=False, origin=origin_of("some_model", path))
    base = base_of(out, PublishBase(), omni.from_pretrained(out))
    assert base.record.package == "some_model" and base.record.files.keys() == {"tiny.gguf"}
    assert base.record.name == "tiny" and base.path == path

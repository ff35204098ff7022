"""Recipes on an imported language model: what they take from it, and a text path that stays, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import omni
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
from omni.model import Omni
from omni.weights import is_text_path
from train.build import publish_model
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

"""Export: the text path as its published class, bit for bit; a whole model with a card, read by both loaders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import small_model
from safetensors.torch import load_file

import omni
from eval.experiments.imports.oracle import logits, published
from omni.cli.commands import main
from omni.hf.export import export_model, export_text
from omni.importers.decoders import import_decoder

IDS = [3, 17, 42, 5, 9, 88, 61, 2, 2, 30, 11, 64]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "gemma2": ("gemma2", {"sliding_window": 4}),
    "gemma3": ("gemma3_text", {}),
    "olmo2": ("olmo2", {}),
    "phi3, partial rotation": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 100.0}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_text_path_is_the_published_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family, settings = CASES[name]
    theirs = published(family, **settings)
    theirs.save_pretrained(tmp_path / "p")
    model = omni.from_pretrained(
        import_decoder(tmp_path / "p", tmp_path / "m", with_tokenizer=False), dtype=theirs.dtype
    )
    model.save_pretrained(tmp_path / "again", dtype=theirs.dtype)  # the published files stay with the model
    model = omni.from_pretrained(tmp_path / "again", dtype=theirs.dtype)
    export_text(model, tmp_path / "out")
    before, after = load_file(tmp_path / "p/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", attn_implementation="eager").eval()
    assert type(again) is type(theirs) and again.dtype == theirs.dtype
    assert torch.equal(logits(again, IDS, is_wide=False), logits(theirs, IDS, is_wide=False))
    with pytest.raises(ValueError, match="out' already exists"):
        export_text(model, tmp_path / "out")


def test_a_whole_model_has_a_card_and_both_loaders_read_it(tmp_path: Path) -> None:
    from transformers import AutoModel

    import omni.hf  # noqa: F401

    model = small_model()
    export_model(model, tmp_path / "hub", license="apache-2.0")
    card = (tmp_path / "hub/README.md").read_text()
    assert card.startswith(
        '---\nlibrary_name: "omni-flow"\npipeline_tag: "any-to-any"\nlicense: "apache-2.0"\n---\n\n# hub'
    )
    (tmp_path / "hub/README.md").write_text(card + "edited on the hub\n")
    one, other = omni.from_pretrained(tmp_path / "hub"), AutoModel.from_pretrained(tmp_path / "hub").omni
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="this model was not imported from a published language model"):
        export_text(model, tmp_path / "text")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published("llama").save_pretrained(tmp_path / "p")
    import_decoder(tmp_path / "p", tmp_path / "m", with_tokenizer=False)
    assert main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "text"), "--text"]) == 0
    assert json.loads((tmp_path / "text/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "whole"), "--license", "mit"]) == 0
    assert omni.from_pretrained(tmp_path / "whole").config.new_rows == 73
    assert main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "whole")]) == 2
    assert "already exists" in capsys.readouterr().err

"""Logits of imported decoders against the classes of transformers: uncached, cached and batched, in float64 (1e-10)
and float32 (1e-5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_config import changed

import omni
from eval.experiments.imports.decoders import CASES, IDS, cached, differences, far
from eval.experiments.imports.oracle import logits, published
from omni.importers.decoders import import_decoder, read_decoder


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    found = differences(CASES[case], tmp_path)
    assert found["float64"] < 1e-10 and found["float32"] < 1e-5


def older(data: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json as transformers 4 names them."""
    rope = data.pop("rope_parameters")
    data["torch_dtype"] = data.pop("dtype")
    if data["model_type"] == "gemma3_text":
        data.pop("layer_types")
        data["sliding_window_pattern"] = 2
        data["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    data["rope_theta"] = rope.pop("rope_theta")
    if (partial := rope.pop("partial_rotary_factor", None)) is not None:
        data["partial_rotary_factor"] = partial
    kind = rope.pop("rope_type")
    data["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return data


@pytest.mark.parametrize("case", CASES)
def test_older_configs_give_the_same_model(case: str, tmp_path: Path) -> None:
    published(CASES[case].family, **CASES[case].settings).save_pretrained(tmp_path)
    new = read_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(older(json.loads((tmp_path / "config.json").read_text()))))
    old = read_decoder(tmp_path)
    assert new.problems == old.problems == [] and new.config == old.config


@torch.no_grad()
def test_the_text_part_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """Gemma 3: its vision tower is skipped by name."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    inner = published("gemma3_text", sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=inner.config.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    theirs = Gemma3ForConditionalGeneration(config).eval()
    theirs.model.language_model.load_state_dict(inner.model.state_dict())
    theirs.save_pretrained(tmp_path / "published")
    found = read_decoder(tmp_path / "published")
    assert found.problems == [] and found.skipped
    assert set(found.skipped.values()) == {"no part of the text model"}
    out = import_decoder(tmp_path / "published", tmp_path / "model", with_tokenizer=False)
    model = omni.from_pretrained(out, dtype=torch.float64)
    assert far(cached(model)[0], logits(inner, IDS)) < 1e-10


def test_new_rows_are_near_the_mean_and_repeatable(tmp_path: Path) -> None:
    theirs = published("llama")
    theirs.save_pretrained(tmp_path / "published")
    one, two = (
        omni.from_pretrained(import_decoder(tmp_path / "published", tmp_path / name, with_tokenizer=False))
        for name in ("one", "two")
    )
    for own, weight in (
        (one.token.new_embedding, theirs.model.embed_tokens.weight),
        (one.token.new_unembedding, theirs.lm_head.weight),
    ):
        assert own is not None
        gap = own.weight.detach() - weight.mean(0)
        assert float(gap.std()) == pytest.approx(0.1 * float((weight - weight.mean(0)).std()), rel=0.1)
        assert len({tuple(row.tolist()) for row in own.weight}) == 73
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_the_dtype_of_stored_weights(dtype: torch.dtype | None, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    theirs = published("llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "published")
    out = import_decoder(tmp_path / "published", tmp_path / "model", with_tokenizer=False, dtype=dtype)
    stored = load_file(out / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype or torch.bfloat16}
    assert torch.equal(stored["transformer.norm.weight"].float(), theirs.model.norm.weight.float())


def test_an_output_matrix_beside_a_tied_embedding(tmp_path: Path) -> None:
    """A stored equal one is skipped by name; another is refused."""
    from safetensors.torch import load_file, save_file

    published("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    found = read_decoder(tmp_path)
    assert found.problems == [] and found.skipped == {"lm_head.weight": "equal to the tied embedding"}
    changed(tmp_path, tie_word_embeddings=False)
    assert read_decoder(tmp_path).problems == []
    changed(tmp_path, tie_word_embeddings=True)
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    assert "'lm_head.weight' differs from the embedding" in read_decoder(tmp_path).problems[0]

"""Logits of imported decoders against the classes of transformers: uncached, cached and batched, in float64 (1e-10)
and float32 (1e-5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from histories import text
from published_oracle import changed, logits, published
from torch import Tensor

import omni
from omni.generation.context import append_of, run_context
from omni.generation.contract import _training_prefix
from omni.importers.decoders import import_decoder, read_decoder
from omni.model import Omni
from omni.nn.cache import History

IDS = [3, 17, 42, 5, 9, 88, 61, 2, 2, 30, 11, 64, 7, 95, 1, 50, 23, 77, 8, 33]
DOCUMENTS = IDS, IDS[5:12], IDS[2:4]
VOCABULARY = 96
LONG = {"short_factor": [1.0, 1.2, 1.5, 1.5, 2.0, 2.0], "long_factor": [2.0, 3.0, 3.5, 5.0, 7.0, 9.0]}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, settings, arguments of the import
    "llama": ("llama", {}, {}),
    "llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, {}),
    "llama3 positions": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
        {},
    ),
    "linear positions": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 99.0, "factor": 4.0}}, {}),
    "yarn positions": (
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
                             "original_max_position_embeddings": 16}},
        {},
    ),
    "dynamic positions": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
         "max_position_embeddings": 16},
        {"context": len(IDS)},
    ),
    "mistral": ("mistral", {"sliding_window": None}, {}),
    "mistral, window": ("mistral", {"sliding_window": 4}, {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {}),
    "qwen3": ("qwen3", {"attention_bias": True}, {}),
    "gemma2": ("gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 24}, {}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {**LOCAL, "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}},
        {},
    ),
    "olmo2": ("olmo2", {}, {}),
    "phi3": ("phi3", {"sliding_window": 6}, {}),
    "phi3, longrope": (
        "phi3",
        {"hidden_size": 64, "original_max_position_embeddings": 16, "max_position_embeddings": 64,
         "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, **LONG}},
        {},
    ),
    "phi3, longrope, short": (
        "phi3",
        {"hidden_size": 64, "original_max_position_embeddings": 32, "max_position_embeddings": 64,
         "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, **LONG}},
        {"context": 32},
    ),
}  # fmt: skip


def cached(model: Omni, documents: Any) -> list[Tensor]:
    """Logits (n, V) of each document, of one id at a time, in passes that the documents share."""
    pool, found = model.transformer.new_pool(), [[] for _ in documents]
    histories = [History(pool) for _ in documents]
    for step in range(max(map(len, documents))):
        rows = [row for row, document in enumerate(documents) if step < len(document)]
        hidden, _ = run_context(model, [append_of(histories[r], [text([documents[r][step]])], 0) for r in rows])
        for row, states in zip(rows, hidden, strict=True):
            found[row].append(model.token.read(states[-1]))
    return [torch.stack(one) for one in found]


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of the published ids' logits, relative to the largest logit."""
    assert found.shape == (len(wanted), VOCABULARY + 73)
    return float((found[:, :VOCABULARY] - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, settings, arguments = CASES[case]
    theirs = published(family, **settings)
    theirs.save_pretrained(tmp_path / "published", max_shard_size="20KB")
    out = import_decoder(tmp_path / "published", tmp_path / "model", with_tokenizer=False, **arguments)
    model = omni.from_pretrained(out, dtype=torch.float64)
    for ids, found in zip(DOCUMENTS, cached(model, DOCUMENTS), strict=True):
        if "dynamic" in case and len(ids) != len(IDS):
            continue  # the published frequencies are those of a shorter pass
        if case == "phi3, longrope" and len(ids) <= 16:
            continue  # the same
        wanted = logits(theirs, list(ids))
        assert far(_training_prefix(model, [text(ids)]), wanted) < 1e-10
        assert far(found, wanted) < 1e-10
    wanted, model = logits(theirs, IDS, is_wide=False), model.float()
    assert far(_training_prefix(model, [text(IDS)]), wanted) < 1e-5
    assert far(cached(model, [IDS])[0], wanted) < 1e-5


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
    family, settings, _ = CASES[case]
    theirs = published(family, **settings)
    theirs.save_pretrained(tmp_path)
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
    assert far(cached(model, [IDS])[0], logits(inner, IDS)) < 1e-10


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

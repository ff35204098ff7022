"""GGUF files against transformers' own reader of them, and against the model that was written where it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import text
from published_oracle import logits, published

import omni
from omni.generation.contract import _training_prefix
from omni.importers.decoders import import_decoder, read_decoder

IDS = [3, 17, 42, 5, 9, 88, 61, 2, 2, 30, 11, 64, 7, 95]
NAMES = {"gemma3_text": "gemma3"}
GEMMA = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # family, settings, type of matrices
    "llama, F32": ("llama", {}, "F32"),
    "llama, Q8_0": ("llama", {"tie_word_embeddings": True}, "Q8_0"),
    "llama, Q4_1": ("llama", {}, "Q4_1"),
    "qwen2, F16": ("qwen2", {"head_dim": 8}, "F16"),
    "qwen3, Q8_0": ("qwen3", {"head_dim": 128}, "Q8_0"),
    "gemma2, Q8_0": ("gemma2", GEMMA, "Q8_0"),
    "gemma3, F32": ("gemma3_text", {**GEMMA, "num_hidden_layers": 6}, "F32"),
}


def write(path: Path, model: Any, kind: str, **more: Any) -> None:
    """The model as llama.cpp's converter writes it. more: further keys of the architecture, or tensors."""
    import gguf

    c, family = model.config, NAMES.get(model.config.model_type, model.config.model_type)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_rope_dimension_count(width)
    rope = c.rope_parameters
    writer.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    writer.add_token_list([f"t{number}" for number in range(c.vocab_size)])
    if family in ("gemma2", "gemma3"):
        writer.add_sliding_window(c.sliding_window)
    if family in ("gemma2", "gemma3", "qwen3"):
        writer.add_key_length(width)
    for key, value in more.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(f"{key}.weight", value)
        else:
            writer.add_float32(f"{family}.{key}", value)
    tied = c.tie_word_embeddings
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        data, matrix = value.float().numpy(), value.ndim > 1
        if family == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = c.num_attention_heads if ".q_proj" in name else c.num_key_value_heads
            data = data.reshape(heads, 2, len(data) // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if family.startswith("gemma") and "norm" in name:
            data = data + 1
        stored = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        data = np.ascontiguousarray(data)
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(own, gguf.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def far(folder: Path, theirs: Any) -> tuple[float, float]:
    """Relative difference of the logits in float64 and in float32."""
    found = []
    out = import_decoder(folder, folder / "model", with_tokenizer=False)
    for dtype, is_wide in ((torch.float64, True), (torch.float32, False)):
        model, wanted = omni.from_pretrained(out, dtype=dtype), logits(theirs, IDS, is_wide)
        with torch.no_grad():
            ours = _training_prefix(model, [text(IDS)])[:, : wanted.shape[1]]
        found.append(float((ours - wanted).abs().max() / wanted.abs().max()))
    return found[0], found[1]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family, settings, kind = CASES[case]
    write(tmp_path / "m.gguf", published(family, intermediate_size=64, **settings), kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", attn_implementation="eager", dtype=torch.float32
    )
    wide, narrow = far(tmp_path, theirs.eval())
    assert wide < 1e-10 and narrow < 1e-5


@pytest.mark.parametrize("family", ["olmo2", "phi3", "llama"])
def test_models_that_transformers_does_not_read(family: str, tmp_path: Path) -> None:
    """OLMo 2, Phi-3 with a small vocabulary, and the scaled frequencies of Llama 3, which its reader ignores."""
    rope = {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    settings: dict[str, Any] = {"rope_parameters": rope} if family == "llama" else {}
    model, more = published(family, intermediate_size=64, **settings), {}
    if family == "llama":
        plain = published("llama", rope_parameters={"rope_theta": 100.0}).model.rotary_emb.inv_freq
        more["rope_freqs"] = (plain / model.model.rotary_emb.inv_freq).numpy()
        assert more["rope_freqs"].max() > 2
    write(tmp_path / "m.gguf", model, "F32", **more)
    wide, narrow = far(tmp_path, model)
    assert wide < (1e-6 if family == "llama" else 1e-10) and narrow < 1e-5  # its factors are stored in float32


def test_unknown_keys_tensors_and_architectures_raise(tmp_path: Path) -> None:
    import gguf

    model = published("llama", intermediate_size=64)
    write(tmp_path / "a.gguf", model, "F32", **{"attention.clamp_kqv": 8.0})
    with pytest.raises(ValueError, match=r"key llama.attention.clamp_kqv = 8.0 is not implemented"):
        read_decoder(tmp_path / "a.gguf")
    for key, value, message in (
        ("rope.scaling.attn_factor", 2.0, "rope.scaling.attn_factor is not implemented with 'none'"),
        ("attention.key_length", 0.0, "heads of width 0.0, of which 16 rotate"),
    ):
        write(tmp_path / "a.gguf", model, "F32", **{key: value})
        with pytest.raises(ValueError, match=message):
            read_decoder(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf", model, "F32", odd=np.zeros((2, 2), np.float32))
    refused = read_decoder(tmp_path / "b.gguf").refused
    assert list(refused) == ["odd.weight"] and refused["odd.weight"].startswith("is not known for llama")
    with pytest.raises(ValueError, match="holds 2 GGUF files; name one"):
        read_decoder(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'mamba' is not implemented; implemented: llama"):
        read_decoder(tmp_path / "c.gguf")
    (tmp_path / "d.gguf").write_bytes((tmp_path / "b.gguf").read_bytes()[:300])
    with pytest.raises(ValueError, match="d.gguf is not a readable GGUF file"):
        read_decoder(tmp_path / "d.gguf")

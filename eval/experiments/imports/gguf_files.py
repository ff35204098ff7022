"""Published decoders as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eval.experiments.imports.decoders import differences_of
from eval.experiments.imports.oracle import published, read_gguf
from omni.importers.decoders import import_decoder

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


def write(path: Path, model: Any, kind: str, tokens: list[str] | None = None, **more: Any) -> None:
    """The model as llama.cpp's converter writes it. tokens: of the vocabulary, by id. more: further keys of the
    architecture, or tensors."""
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
    writer.add_token_list(tokens or [f"t{number}" for number in range(c.vocab_size)])
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


def gguf_differences(family: str, settings: dict[str, Any], kind: str, folder: Path) -> dict[str, float]:
    """{"float64", "float32"}: `differences` to the model that transformers reads from the file, which is written to the
    folder."""
    write(folder / "m.gguf", published(family, intermediate_size=64, **settings), kind)
    out = import_decoder(folder, folder / "model", with_tokenizer=False)
    return differences_of(out, read_gguf(folder / "m.gguf"))

"""GGUF files against transformers' own reader of them, and against the model that was written where it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.experiments.imports.decoders import differences_of
from eval.experiments.imports.gguf_files import CASES, gguf_differences, write
from eval.experiments.imports.oracle import published
from omni.importers.decoders import import_decoder, read_decoder
from omni.rng import Key
from omni.storage.gguf import GGUFReader
from omni.storage.quantised import FLOATS, SIZES, floats_of

SLOW = "llama, F32"  # two other types of llama are read by default


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case == SLOW else case for case in CASES]
)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    found = gguf_differences(*CASES[case], tmp_path)
    assert found["float64"] < 1e-10 and found["float32"] < 1e-5


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
    found = differences_of(import_decoder(tmp_path, tmp_path / "model", with_tokenizer=False), model)
    assert found["float64"] < (1e-6 if family == "llama" else 1e-10)  # its factors are stored in float32
    assert found["float32"] < 1e-5


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


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32"])
def test_numbers_are_those_of_the_package_gguf(kind: str) -> None:
    import gguf

    numbers, size = SIZES[kind]
    values = Key(0).fold(kind).normal((5, 64 * numbers)).numpy()
    of_package = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(values, of_package)
    rows = np.ascontiguousarray(stored).view(np.uint8).reshape(5, 64 * size)
    wanted = gguf.dequantize(stored, of_package)
    found = floats_of(rows, kind)
    assert found.dtype == FLOATS.get(kind, torch.float32)
    assert np.array_equal(found.to(torch.float64).numpy(), wanted.astype(np.float64))


def test_other_types_are_read_by_the_package(tmp_path: Path) -> None:
    import gguf

    model = published("llama", intermediate_size=64, tie_word_embeddings=True)
    write(tmp_path / "m.gguf", model, "Q5_0")
    source = read_decoder(tmp_path / "m.gguf").source
    wanted = model.state_dict()["model.embed_tokens.weight"].numpy()
    kind = gguf.GGMLQuantizationType.Q5_0
    found = source.rows("model.embed_tokens.weight", slice(2, 9)).numpy()
    assert np.array_equal(found, gguf.dequantize(gguf.quants.quantize(wanted, kind), kind)[2:9])


def test_damaged_files_raise_and_name_the_file(tmp_path: Path) -> None:
    """Every cut, and lengths that are absurd, are one error: nothing is allocated for them."""
    write(tmp_path / "m.gguf", published("llama", intermediate_size=64), "Q8_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    damaged = [whole[:size] for size in (0, 3, 20, 100, 1000, 2000)]
    damaged += [b"GGML" + whole[4:], whole[:4] + b"\x09" + whole[5:], whole[:16] + b"\xff" * 8 + whole[24:]]
    for data in damaged:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"cut.gguf is not a readable GGUF file"):
            GGUFReader(file)
    file.write_bytes(whole[:-64])
    with pytest.raises(ValueError, match=r"cut.gguf ends inside of "):
        import_decoder(file, tmp_path / "model", with_tokenizer=False)

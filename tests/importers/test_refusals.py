"""What an import does not know is refused by name before anything is written; memory and files are bounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_config import changed
from safetensors.torch import load_file, save_file

from eval.experiments.imports.oracle import published
from omni import checkpoint
from omni.cli.commands import main
from omni.importers import writing
from omni.importers.decoders import import_decoder, read_decoder
from omni.storage.pieces import Sink


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    published("llama").save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def refused(folder: Path, message: str) -> None:
    """The import raises and writes nothing."""
    with pytest.raises(ValueError, match=message):
        import_decoder(folder, folder / "out", with_tokenizer=False)
    assert not (folder / "out").exists()


def test_a_dtype_of_integers(folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype = torch.int8 is no type of weights; use one of torch.float64"):
        import_decoder(folder, folder / "out", with_tokenizer=False, dtype=torch.int8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_chunk_size": 512}, "key 'attention_chunk_size' = 512 is not known for llama"),
        ({"quantization_config": {"bits": 4}}, r"key 'quantization_config' = \{'bits': 4\} is not known"),
        ({"partial_rotary_factor": 0.5}, "key 'partial_rotary_factor' = 0.5 is not known"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu': .*other values are not implemented for llama"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_attention_heads": 3}, "num_heads 3 must be a multiple of num_kv_heads 2"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rope_type = 'axial' is not implemented; implemented: default"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, r"rope_type = \"\['linear'\]\" is not implemented"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "alpha": 1}},
            "unknown key 'alpha'",
        ),
        ({"rope_theta": 5.0}, "rope_theta = 5.0 and 10000.0 in rope_parameters; leave one of them out"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters and rope_scaling are both given"),
        ({"model_type": "mamba"}, "model_type = 'mamba' is not implemented; implemented: gemma2"),
        ({"model_type": ["llama"]}, r"model_type = \['llama'\] is not implemented"),
    ],
)
def test_keys_that_are_not_known(folder: Path, keys: dict[str, Any], message: str) -> None:
    changed(folder, **keys)
    refused(folder, message)


FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"layer_types": ["full_attention"] * 3, "sliding_window": 4}, "contradicts sliding_window"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "names sliding_attention, and sliding_window is null"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries; give 3 of"),
    ("qwen3", {"layer_types": ["linear_attention"] * 3}, "'linear_attention'; give 3 of full_attention"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type is unknown; give full"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_parameters.sliding_attention = .* is not implemented; implemented: rope_theta alone",
    ),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not part of phi3; it has long"),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factors has 1 values; the head has 4 frequencies",
    ),
]


@pytest.mark.parametrize(("family", "keys", "message"), FAMILIES)
def test_values_of_one_family(family: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    published(family).save_pretrained(tmp_path)
    assert read_decoder(tmp_path).problems == []
    changed(tmp_path, **keys)
    refused(tmp_path, message)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def with_value(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(GATE), f"tensor '{GATE}' is missing"),
        (without("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
        (with_value("model.layers.0.moe.router.weight", torch.ones(2)), "'model.layers.0.moe.router.weight' is not kn"),
        (with_value("model.layers.3.mlp.gate_proj.weight", torch.ones(48, 32)), "'model.layers.3.* is not known"),
        (with_value(GATE, torch.ones(32, 48)), r"has shape \(32, 48\), the config needs \(48, 32\)"),
        (with_value(GATE, torch.ones(48, 32, dtype=torch.int8)), "has type I8; use a checkpoint of floating-point"),
        (with_value(GATE, torch.ones(48, 32).to(torch.float8_e4m3fn)), "has type F8_E4M3"),
        (with_value(GATE, torch.full((48, 32), float("nan"))), f"{GATE} has a NaN or an infinity"),
        (with_value("model.norm.weight", torch.full((32,), float("inf"))), "model.norm.weight has a NaN or an infin"),
    ],
)
def test_tensors_that_are_not_known(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, message)


def test_buffers_are_skipped_by_name(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(8)}, folder / "model.safetensors")
    found = read_decoder(folder)
    assert found.problems == [] and found.skipped == {name: "a buffer that is computed"}


def test_an_index_that_is_wrong(tmp_path: Path) -> None:
    published("llama").save_pretrained(tmp_path / "p", max_shard_size="20KB")
    index = tmp_path / "p" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    name, file = next(iter(data["weight_map"].items()))
    for value, message in (
        ("../p/" + file, "outside of the folder"),
        ("/etc/passwd", "outside of the folder"),
        ("none.safetensors", "none.safetensors is missing"),
        (sorted(set(data["weight_map"].values()) - {file})[0], f"has no tensor '{name}'"),
        (7, "has no weight_map of names to files"),
    ):
        index.write_text(json.dumps({"weight_map": {**data["weight_map"], name: value}}))
        refused(tmp_path / "p", message)
    index.write_text(json.dumps(data))
    (tmp_path / "p" / file).write_bytes(b"\0" * 64)
    refused(tmp_path / "p", "is not a safetensors file")
    (tmp_path / "p" / "model.safetensors").mkdir()
    index.unlink()
    refused(tmp_path / "p", "holds no model.safetensors and no model.safetensors.index.json")


def test_a_file_in_pieces_is_the_library_s_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any size of the pieces gives the same bytes, whose digest is in the manifest; zeros are holes."""
    theirs = published("phi3", hidden_size=64, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.75})
    with torch.no_grad():
        theirs.lm_head.weight.zero_()
    theirs.save_pretrained(tmp_path / "p")
    monkeypatch.setattr(writing, "PIECE_NUMBERS", 100)
    one = import_decoder(tmp_path / "p", tmp_path / "one", with_tokenizer=False)
    monkeypatch.undo()
    two = import_decoder(tmp_path / "p", tmp_path / "two", with_tokenizer=False)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    tensors = checkpoint.load_tensors(one / "model.safetensors")
    assert not tensors["token.unembedding.weight"].any() and tensors["token.embedding.weight"].any()
    checkpoint.verify(one)
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    mapped = checkpoint.load_tensors(one / "model.safetensors")
    assert all(torch.equal(value, mapped[name]) for name, value in tensors.items())


def test_zeros_are_holes(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as stream:
        sink = Sink(stream)
        for piece in (b"ab", bytes(8 << 20), b"c", bytes(1 << 20)):
            sink.write(piece)
        entry = sink.finish()
    data = (tmp_path / "x").read_bytes()
    assert data == b"ab" + bytes(8 << 20) + b"c" + bytes(1 << 20)
    assert entry == {"bytes": len(data), "blake2b": checkpoint.digest_of(data)}
    assert (tmp_path / "x").stat().st_blocks * 512 < 1 << 20


def test_inspect_lists_every_tensor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "a published decoder, llama, " in out and "3 layers of width 32, 4 heads and 2 of keys" in out
    assert "refused" not in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("model.", "lm_head"))}
    assert rows.keys() == load_file(folder / "model.safetensors").keys()
    assert "fused into transformer.blocks.1.text.gate_up.weight" in rows[GATE]
    assert "taken as token.unembedding.weight" in rows["lm_head.weight"]
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.odd": torch.ones(3)}, folder / "model.safetensors")
    changed(folder, logit_scale=2.0)
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "key 'logit_scale' = 2.0 is not known" in out
    assert "refused: is not known for llama" in next(x for x in out.splitlines() if x.startswith("model.odd"))


def test_import_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "out"
    (folder.parent / "full").mkdir()
    assert main(["import", str(folder), "--out", str(folder.parent / "full")]) == 2
    assert "exists already; name another folder, or replace" in capsys.readouterr().err
    changed(folder, logit_scale=2.0)
    assert main(["import", str(folder), "--out", str(out)]) == 2
    assert "key 'logit_scale' = 2.0 is not known" in capsys.readouterr().err and not out.exists()
    assert main(["import", str(folder), "--out", str(out), "--context", "8"]) == 2
    assert not out.exists()

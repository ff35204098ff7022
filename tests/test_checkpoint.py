"""Published directories: atomic, complete; the digest check finds every flipped bit before weights are used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from omni import checkpoint
from omni.rng import Key


def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": Key(0).normal((7, 5)), "b": Key(1).normal((3,)).bfloat16(), "step": torch.tensor(4)}


def make(directory: Path) -> Path:
    return checkpoint.publish(
        directory, {"model.safetensors": tensors(), "config.json": '{"width": 8}', "codec/raw.bin": b"\x00\x01"}
    )


def test_round_trip_keeps_every_bit_and_dtype(tmp_path: Path) -> None:
    directory = make(tmp_path / "model")
    loaded = checkpoint.load_tensors(directory / "model.safetensors")
    assert set(loaded) == set(tensors())
    for name, value in tensors().items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)
    assert set(checkpoint.verify(directory)["files"]) == {"model.safetensors", "config.json", "codec/raw.bin"}
    assert not [p for p in tmp_path.iterdir() if p.name != "model"], "temporary directories are left"


def test_200_flipped_bits_are_all_detected(tmp_path: Path) -> None:
    directory = make(tmp_path / "model")
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    draw = Key(0).fold("flip").python()
    detected = 0
    for _ in range(200):
        path = draw.choices(files, weights=[p.stat().st_size for p in files])[0]
        data = path.read_bytes()
        bit = draw.randrange(8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :])
        with pytest.raises(ValueError, match="does not match its digest") as error:
            checkpoint.verify(directory)
        assert path.name in str(error.value)
        if path.suffix == ".safetensors":
            with pytest.raises(ValueError, match="does not match its digest"):
                checkpoint.load_tensors(path)
        path.write_bytes(data)
        detected += 1
    checkpoint.verify(directory)
    assert detected == 200


@pytest.mark.parametrize("damage", ["truncate", "delete", "swap", "manifest"])
def test_other_damage_raises(tmp_path: Path, damage: str) -> None:
    directory, weights = make(tmp_path / "model"), tmp_path / "model" / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "delete":
        weights.unlink()
    elif damage == "swap":
        shutil.copy(directory / "config.json", weights)
    else:
        (directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json" if damage == "manifest" else "model.safetensors"):
        checkpoint.verify(directory)
    with pytest.raises(ValueError):
        checkpoint.load_tensors(weights)


def test_a_failure_while_writing_leaves_the_previous_directory(tmp_path: Path) -> None:
    directory = make(tmp_path / "model")
    before = checkpoint.verify(directory)
    with pytest.raises(FileNotFoundError):
        checkpoint.publish(directory, {"a": b"new", "b": tmp_path / "absent"}, replace=True)
    assert checkpoint.verify(directory) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ValueError, match="already exists"):
        make(directory)
    checkpoint.publish(directory, {"a": b"new"}, replace=True)
    assert set(checkpoint.verify(directory)["files"]) == {"a"}


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "", "./a", "manifest.json"])
def test_unsafe_names_raise(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="unsafe file name"):
        checkpoint.publish(tmp_path / "model", {name: b""})
    assert not (tmp_path / "model").exists()


def test_nested_directories_keep_their_own_manifest(tmp_path: Path) -> None:
    codec = checkpoint.publish(tmp_path / "codec", {"model.safetensors": tensors()})
    model = checkpoint.publish(tmp_path / "model", {"codec": codec, "config.json": "{}"})
    assert torch.equal(checkpoint.load_tensors(model / "codec" / "model.safetensors")["b"], tensors()["b"])
    checkpoint.verify(model)
    checkpoint.verify(model / "codec")


def test_a_function_may_write_the_files(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text("{}")
        checkpoint.save_tensors(folder / "model.safetensors", tensors())

    model = checkpoint.publish(tmp_path / "model", write)
    assert set(checkpoint.verify(model)["files"]) == {"model.safetensors", "tokenizer/vocab.json"}
    assert torch.equal(checkpoint.load_tensors(model / "model.safetensors")["a.weight"], tensors()["a.weight"])

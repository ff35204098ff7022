"""A model directory is read by its manifest: each listed file once and whole, and no other file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import omni
from omni import checkpoint
from omni.cli.commands import main
from omni.errors import DamagedError
from omni.heads.joint import JOINT_HEADS, JointConfig
from omni.model import Omni
from omni.pretrained import BUNDLED
from omni.rng import Key
from omni.weights import load_weights, unallocated


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def listed(directory: Path, **changes: Any) -> None:
    """Write a manifest of the directory with changed values in its body."""
    names = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
    files = {
        name: {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=32).hexdigest()}
        for name in sorted(names)
        if name != "manifest.json"
        for data in [(directory / name).read_bytes()]
    }
    body = {"format": 1, "files": files, "info": {}} | changes
    (directory / "manifest.json").write_bytes(checkpoint._render_manifest({k: v for k, v in body.items() if v != "-"}))


def refused(model: Path, capsys: Any, *parts: str) -> None:
    """`omni` prints one line and exits with 4."""
    capsys.readouterr()
    for argv in (["verify", str(model)], ["generate", "hello", "--model", str(model), "--out", str(model / "out")]):
        assert main(argv) == 4
        error = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("loading ")]
        assert len(error) == 1 and error[0].startswith("omni: error: "), error
        assert all(part in error[0] for part in parts), error


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_raise(model: Path, capsys: Any, value: str) -> None:
    tensors = checkpoint.load_tensors(model / "model.safetensors")
    tensors["transformer.blocks.1.text.qkv.weight"][3, 4] = float(value)
    checkpoint.save_tensors(model / "model.safetensors", tensors)
    listed(model)
    refused(model, capsys, "model.safetensors: transformer.blocks.1.text.qkv.weight has 1 values that are NaN")


def test_huge_finite_weights_load(tmp_path: Path) -> None:
    """Their sum overflows; they are finite."""
    big = {
        "a": torch.full((8,), 3e38),
        "b": torch.full((8,), -6e4, dtype=torch.float16),
        "c": torch.tensor([], dtype=torch.float32),
    }
    checkpoint.publish(tmp_path / "m", {"model.safetensors": big})
    loaded = checkpoint.load_tensors(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in big.items())
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        checkpoint.publish(tmp_path / "n", {"w": {"x": torch.tensor([1.0, float("nan")], dtype=dtype)}}, replace=True)
        with pytest.raises(DamagedError, match="x has 1 values"):
            checkpoint.load_tensors(tmp_path / "n" / "w")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_of_other_dtypes_raise(model: Path, capsys: Any, dtype: torch.dtype) -> None:
    tensors = checkpoint.load_tensors(model / "model.safetensors")
    tensors["token.embedding.weight"] = tensors["token.embedding.weight"].to(dtype)
    checkpoint.save_tensors(model / "model.safetensors", tensors)
    listed(model)
    refused(model, capsys, "model.safetensors: token.embedding.weight has dtype torch.", "torch.float32")


@pytest.mark.parametrize("head", JOINT_HEADS.names())
def test_a_loaded_model_equals_the_saved_one(head: str, tmp_path: Path) -> None:
    """Every kind of head, built on the meta device and filled: equal weights, none unset, equal bytes when saved."""
    from layouts import small_model

    config = small_model().config
    first = Omni(config.model_copy(update={"joint": JointConfig(head=head, length=4, adapter_rank=2)}), Key(3))
    first.save_pretrained(tmp_path / "one", torch.float32)
    second = omni.from_pretrained(tmp_path / "one")
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [p.requires_grad for p in first.parameters()] == [p.requires_grad for p in second.parameters()]
    plain = [v for m in second.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert not any(v.is_meta for v in [*plain, *second.buffers()])
    second.save_pretrained(tmp_path / "two", torch.float32)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }


def test_the_bundled_model_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    omni.from_pretrained().save_pretrained(tmp_path / "m")
    for path in (p for p in BUNDLED.rglob("*") if p.is_file()):
        assert (tmp_path / "m" / path.relative_to(BUNDLED)).read_bytes() == path.read_bytes(), path


def test_a_module_is_filled_in_place_or_built() -> None:
    own = torch.nn.Linear(3, 2)
    weights = {"weight": Key(0).normal((2, 3)).bfloat16(), "bias": Key(1).normal((2,)).bfloat16()}
    before = own.weight
    load_weights(own, weights, "w")
    with unallocated():
        other = torch.nn.Linear(3, 2)
    load_weights(other, weights, "w")
    assert own.weight is before and torch.equal(own.weight, other.weight) and other.weight.dtype == torch.float32
    with pytest.raises(DamagedError, match=r"w: missing weights \['bias'\]"):
        load_weights(own, {"weight": weights["weight"]}, "w")
    with pytest.raises(DamagedError, match=r"w: bias has shape \(3,\), config.json needs \(2,\)"):
        load_weights(own, {**weights, "bias": torch.zeros(3)}, "w")


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation.json", '{"steps": 1}'),
        ("codec/config.json", '{"kind": "pixels", "patch": 4}'),
        ("codec/model.safetensors", "x"),
        ("tokenizer/tokenizer_config.json", "{}"),
        ("tokenizer/tokenizer.json", "{}"),
    ],
)
def test_files_that_the_manifest_does_not_list_are_not_read(model: Path, capsys: Any, name: str, content: str) -> None:
    files, folder = checkpoint.read_manifest(model)["files"], name.partition("/")[0]
    if name != "codec/model.safetensors":
        files = {listed: entry for listed, entry in files.items() if listed.partition("/")[0] != folder}
        if folder != name:
            shutil.rmtree(model / folder)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text(content)
    if name == "tokenizer/tokenizer.json":  # without its config no file reads it
        listed(model, files=files)
        assert omni.from_pretrained(model).tokenizer is None
        return
    listed(model, files=files)
    refused(model, capsys, f"{name} is not listed in manifest.json")


def test_unlisted_files_have_no_effect(model: Path) -> None:
    for name in (".DS_Store", "README.md", ".git/config", "codec/.DS_Store", "tokenizer/notes.txt", "empty/x"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{[")
    assert omni.from_pretrained(model).codec is not None


def test_every_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = checkpoint._read_checked
    monkeypatch.setattr(checkpoint, "_read_checked", lambda path, entry: read.append(path) or real(path, entry))
    omni.from_pretrained()
    files = {p for p in BUNDLED.rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert sorted(read) == sorted(files)


def test_unused_listed_files_are_checked(model: Path, capsys: Any) -> None:
    (model / "notes.txt").write_text("as published")
    listed(model)
    omni.from_pretrained(model)
    (model / "notes.txt").write_text("As published")
    refused(model, capsys, "notes.txt does not match its digest")


def test_a_link_to_the_same_bytes_is_a_file(model: Path, tmp_path: Path) -> None:
    """Like the cache of a hub."""
    before = omni.from_pretrained(model).state_dict()
    (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    after = omni.from_pretrained(model).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_values_that_a_dtype_cannot_hold_raise(model: Path) -> None:
    """A float64 file of 1e300 becomes infinite in float32, and 1e5 in float16."""
    name = "token.embedding.weight"
    weights = checkpoint.load_tensors(model / "model.safetensors")
    for value, dtype, wide in ((1e300, torch.float32, torch.float64), (1e5, torch.float16, torch.float32)):
        changed = torch.full_like(weights[name], value, dtype=wide)
        checkpoint.save_tensors(model / "model.safetensors", {**weights, name: changed})
        listed(model)
        with pytest.raises(ValueError, match=f"{name} has values out of the range of {dtype}"):
            omni.from_pretrained(model, dtype=dtype)


NESTED = '{"a":' * 100_000


@pytest.mark.parametrize("value", ["-", None, [], {"config.json": 3}, {"config.json": []}, "x", 7])
def test_a_manifest_of_another_form_raises(model: Path, capsys: Any, value: Any) -> None:
    listed(model, files=value)
    refused(model, capsys, "manifest.json")


@pytest.mark.parametrize(
    "entry",
    [{"bytes": -1}, {"bytes": 1.5}, {"bytes": True}, {"bytes": 10**400}, {"blake2b": 3}, {"blake2b": "x"}, {"a": 1}],
)
def test_an_entry_of_another_form_raises(model: Path, capsys: Any, entry: dict) -> None:
    files = checkpoint.read_manifest(model)["files"]
    files["config.json"] |= entry
    listed(model, files=files)
    refused(model, capsys, "manifest.json")


@pytest.mark.parametrize("text", [NESTED, "[]", "", "{", "\x00", "[" * 100_000])
def test_an_invalid_manifest_raises(model: Path, capsys: Any, text: str) -> None:
    (model / "manifest.json").write_text(text)
    refused(model, capsys, "manifest.json")


@pytest.mark.parametrize("name", ["a\0b", "../x", "/x"])
def test_a_manifest_with_unsafe_names_raises(model: Path, capsys: Any, name: str) -> None:
    listed(model, files={**checkpoint.read_manifest(model)["files"], name: {"bytes": 0, "blake2b": "0" * 64}})
    refused(model, capsys, "unsafe file name")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation.json",
        "codec/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
@pytest.mark.parametrize("text", [NESTED, "[]", "null", "{", "\x00", '{"a": NaN', "9" * 5000])
def test_every_invalid_json_file_raises_one_line(model: Path, capsys: Any, name: str, text: str) -> None:
    (model / name).write_text(text)
    if name == "tokenizer/tokenizer.json":
        config = model / "tokenizer/tokenizer_config.json"
        changed = json.loads(config.read_text()) | {
            "blake2b": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        }
        config.write_text(json.dumps(changed))
    listed(model)
    refused(model, capsys, Path(name).name)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("transformer", "width", -1), ("transformer", "width", 10**9), ("transformer", "depth", 10**9),
        ("transformer", "num_heads", 0), ("transformer", "num_kv_heads", 0), ("transformer", "head_dim", 10**18),
        ("transformer", "mlp_width", 10**30), ("transformer", "rope_base", 0), ("flow", "channels", -1),
        ("flow", "num_frequencies", 10**12), ("", "vocab_size", 10**12), ("", "vocab_size", -3), ("", "max_grid", 0),
        ("", "sampler", "x"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_named(model: Path, capsys: Any, table: str, key: str, value: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (config[table] if table else config)[key] = value
    (model / "config.json").write_text(json.dumps(config))
    listed(model)
    refused(model, capsys, "config.json", key)


@pytest.mark.parametrize(("key", "value"), [("width", 65536), ("mlp_width", 262144), ("depth", 512)])
def test_terabytes_are_not_allocated(model: Path, capsys: Any, key: str, value: int) -> None:
    """Sizes within bounds that differ from the weights: the shapes reveal it, and nothing is allocated."""
    config = json.loads((model / "config.json").read_text())
    config["transformer"][key] = value
    (model / "config.json").write_text(json.dumps(config))
    listed(model)
    refused(model, capsys, "model.safetensors", "config.json")


def test_parts_of_another_model_raise(model: Path, capsys: Any) -> None:
    (model / "codec/config.json").write_text('{"kind": "pixels", "patch": 8}')
    listed(model)
    refused(model, capsys, "the codec has 192 channels, flow.channels is 48")


@pytest.mark.parametrize(
    "config", ['{"kind": []}', '{"kind": "pixels", "patch": -1}', '{"kind": "pixels", "patch": 1e9}']
)
def test_an_invalid_codec_raises(model: Path, capsys: Any, config: str) -> None:
    (model / "codec/config.json").write_text(config)
    listed(model)
    refused(model, capsys, "codec")


def test_a_line_names_slow_loading(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import time

    from omni.cli import arguments as command

    monkeypatch.setattr(command, "ANNOUNCE_AFTER_SECONDS", 0.05)
    with command.announced("the model x"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "loading the model x ...\n"
    with command.announced("the model y"):
        pass
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_initialised_models_differ_from_unallocated_ones() -> None:
    from layouts import small_model

    config = small_model().config
    with unallocated():
        empty = Omni(config)
    assert all(p.is_meta for p in empty.parameters()) and not any(p.is_meta for p in Omni(config).parameters())

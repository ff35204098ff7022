"""Where a published model is found: paths, installed packages, the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

import omni
from omni.importers.decoders import read_decoder
from omni.importers.places import find_checkpoint
from omni.pretrained import BUNDLED


def test_a_package_with_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_model").mkdir()
    (tmp_path / "some_model/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "some_model/tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    lines: list[str] = []
    assert find_checkpoint("some_model", lines.append) == tmp_path / "some_model/tiny.gguf"
    assert lines == ["tiny.gguf, of the installed package some_model"]
    assert find_checkpoint(tmp_path / "some_model", lines.append) == tmp_path / "some_model" and len(lines) == 1
    (tmp_path / "some_model/other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="some_model holds 2 GGUF files; name one, such as .*other.gguf"):
        find_checkpoint("some_model")


def test_folders_that_need_another_command_say_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a published language model; import it: omni import .* --out DIR"):
        omni.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bundled is a model directory already; use it as it is"):
        read_decoder(BUNDLED)


def test_what_is_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match="nothing at 'no_such_package_here': give a folder with config.json"):
        find_checkpoint("no_such_package_here")
    with pytest.raises(ValueError, match="'some/model' is no local path, and the hub does not give it"):
        find_checkpoint("some/model")

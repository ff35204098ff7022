"""The tool that chooses the default way of decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import omni
from train.tools import decoding
from train.tools.decoding import Mode, main, measure


def test_every_mode_gives_the_same_texts_and_is_measured(tiny_model: Path) -> None:
    """Without a joint-token head there is one mode."""
    [mode] = measure(omni.from_pretrained(tiny_model), ["a", "b"])
    assert mode.tokens_per_pass == 1 and mode.milliseconds > 0


@pytest.mark.parametrize(("drafted", "wanted"), [(4.7, 4), (4.9, 1)])
def test_drafts_must_save_a_twentieth(
    drafted: float, wanted: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = [Mode(1, float("nan"), 5.0), Mode(4, 2.0, drafted)]
    monkeypatch.setattr(decoding, "measure", lambda *given: modes)
    omni.from_pretrained(tiny_model).save_pretrained(tmp_path / "m")
    (tmp_path / "prompts.txt").write_text("hello\n\nworld\n")
    assert main([str(tmp_path / "m"), "--prompts", str(tmp_path / "prompts.txt"), "--write"]) == 0
    assert json.loads((tmp_path / "m/generation.json").read_text())["tokens_per_pass"] == wanted
    assert omni.from_pretrained(tmp_path / "m").defaults["tokens_per_pass"] == wanted


def test_a_file_without_prompts_is_an_error(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert main([str(tiny_model), "--prompts", str(tmp_path / "empty.txt")]) == 2
    assert "has no prompts; give one per line" in capsys.readouterr().err

"""Weights of models that were trained apart, in one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import omni
from omni.model import Omni
from omni.rng import Key
from train.tools.combine import combine, main


@pytest.fixture
def pair(tiny_model: Path, tmp_path: Path) -> tuple[str, str]:
    first = omni.from_pretrained(tiny_model)
    other = Omni(first.config, Key(9))
    other.tokenizer, other.codec = first.tokenizer, first.codec
    return str(tiny_model), str(other.save_pretrained(tmp_path / "other", torch.float32))


def test_weights_by_prefix(pair: tuple[str, str], tmp_path: Path) -> None:
    first, other = pair
    assert main([str(tmp_path / "out"), first, f"{other}=flow.,transformer.blocks.0."]) == 0
    made, a, b = (omni.from_pretrained(path).state_dict() for path in (tmp_path / "out", first, other))
    for name, value in made.items():
        source = b if name.startswith(("flow.", "transformer.blocks.0.")) else a
        assert torch.equal(value, source[name]), name


def test_what_does_not_fit_is_refused(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    first, other = pair
    with pytest.raises(ValueError, match="'nothing.' matches no weight"):
        combine(first, {other: ["nothing."]})
    assert main(["out", first, other]) == 2
    assert "is not of the form MODEL=PREFIX" in capsys.readouterr().err

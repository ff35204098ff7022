"""The mean of two models: the mean of the weights, everything else from the first; mismatches raise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import omni
from omni.model import Omni
from omni.rng import Key
from train.tools.average import average, main


@pytest.fixture
def two(tiny_model, tmp_path: Path) -> tuple[str, str]:  # noqa: ANN001
    first = omni.from_pretrained(tiny_model)
    other = Omni(first.config, Key(5))
    other.tokenizer, other.codec = first.tokenizer, first.codec
    other.save_pretrained(tmp_path / "other", torch.float32)
    return str(tiny_model), str(tmp_path / "other")


def test_weights_are_the_mean(two: tuple[str, str], tmp_path: Path) -> None:
    a, b = (omni.from_pretrained(path) for path in two)
    mean = average([(two[0], 0.75), (two[1], 0.25)])
    for name, value in mean.state_dict().items():
        assert torch.allclose(value, 0.75 * a.state_dict()[name] + 0.25 * b.state_dict()[name], atol=1e-6)
    assert main([str(tmp_path / "out"), f"{two[0]}=0.5", f"{two[1]}=0.5"]) == 0
    assert omni.from_pretrained(tmp_path / "out").tokenizer is not None


@pytest.mark.parametrize(
    ("shares", "message"), [((0.5, 0.4), "add up to 1"), ((1.5, -0.5), "positive shares"), ((1.0,), "at least two")]
)
def test_shares_must_add_up(two: tuple[str, str], shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average(list(zip(two, shares, strict=False)))


def test_another_shape_raises(two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = omni.from_pretrained(two[0])
    transformer = odd.config.transformer.model_copy(update={"depth": odd.config.transformer.depth + 1})
    Omni(odd.config.model_copy(update={"transformer": transformer}), Key(0)).save_pretrained(tmp_path / "odd")
    assert main([str(tmp_path / "out"), f"{two[0]}=0.5", f"{tmp_path / 'odd'}=0.5"]) == 2
    assert "does not fit" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_damaged_input_prints_one_line_and_exits_4(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path(two[1]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert main([str(tmp_path / "out"), f"{two[0]}=0.5", f"{two[1]}=0.5"]) == 4
    output = capsys.readouterr().err
    assert "model.safetensors does not match its digest" in output and output.count("\n") == 1
    (Path(two[1]) / "manifest.json").unlink()
    assert main([str(tmp_path / "out"), f"{two[0]}=0.5", f"{two[1]}=0.5"]) == 4
    assert main([str(tmp_path / "out"), f"{two[0]}=0.5", f"{tmp_path / 'none'}=0.5"]) in (2, 4)
    assert not (tmp_path / "out").exists()


def test_a_model_without_an_expert_is_upcycled_first(two: tuple[str, str], tmp_path: Path) -> None:
    plain = omni.from_pretrained(two[0])

    def with_weights_of_latents(kind: str) -> str:
        transformer = plain.config.transformer.model_copy(update={"latent_weights": kind})
        other = Omni(plain.config.model_copy(update={"transformer": transformer}), Key(6))
        return str(other.save_pretrained(tmp_path / kind, torch.float32))

    expert = with_weights_of_latents("refine")
    mean, own, base = average([(expert, 0.5), (two[0], 0.5)]), omni.from_pretrained(expert), plain.state_dict()
    for name, value in mean.state_dict().items():
        half = (own.state_dict()[name] + base[name.replace(".latent.", ".text.")]) / 2
        assert torch.allclose(value, half, atol=1e-6), name
    with pytest.raises(ValueError, match="latent_weights = 'separate'"):
        average([(expert, 0.5), (with_weights_of_latents("separate"), 0.5)])
    with pytest.raises(ValueError, match="latent_weights = 'refine'"):
        average([(two[0], 0.5), (expert, 0.5)])

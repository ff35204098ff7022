"""An imported model as a model: the equality contract, a codec, and, slowly, a real one and a large one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from histories import text

import omni
from eval.experiments.imports.oracle import logits, published
from eval.experiments.imports.tiny import write_decoder
from omni.cli.commands import main
from omni.codecs.pixels import PixelCodec, PixelConfig
from omni.generation.contract import training_prefix, verify
from omni.importers.decoders import import_decoder

IDS = [3, 17, 42, 5, 9, 88, 61, 2, 2, 30, 11, 64]


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gemma3_text"])  # native code
def test_the_equality_contract_holds(family: str, tmp_path: Path) -> None:
    """Windows, caps and a rope base of the local layers included."""
    settings = {} if family == "llama" else {"sliding_window": 3, "num_hidden_layers": 6}
    published(family, **settings).save_pretrained(tmp_path / "p")
    checks = verify(omni.from_pretrained(import_decoder(tmp_path / "p", tmp_path / "m", with_tokenizer=False)))
    assert [check.name for check in checks if not check.holds] == []
    assert any(check.name == "float64, cached = uncached" for check in checks)


def test_with_a_codec_the_text_is_unchanged(tmp_path: Path) -> None:
    """The flow head has new weights; the text logits are those of the published model, and the contract holds."""
    theirs = published("qwen2", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "p")
    PixelCodec(PixelConfig(patch=4)).save(tmp_path / "codec")
    out = import_decoder(tmp_path / "p", tmp_path / "m", codec=tmp_path / "codec", with_tokenizer=False)
    model = omni.from_pretrained(out, dtype=torch.float64)
    assert model.codec is not None and model.config.channels == 48
    with torch.no_grad():
        found = training_prefix(model, [text(IDS)])[:, :96]
    wanted = logits(theirs, IDS)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-10
    assert all(check.holds for check in verify(model))


def test_inspect_describes_an_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published files in it, of a tokenizer too, are no tokenizer of this project."""
    out = import_decoder(write_decoder(tmp_path / "p", "llama"), tmp_path / "m")
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "published/tokenizer_config.json" in shown and "backend published: " in shown


@pytest.mark.slow
def test_a_real_model_answers_as_in_transformers(tmp_path: Path) -> None:
    from eval.experiments.imports.greedy import compare
    from eval.peers import load_gguf
    from eval.tasks.pretrained.smollm2 import real_gguf

    try:
        file = real_gguf()
    except ValueError as error:
        pytest.skip(str(error))
    found = compare(omni.from_pretrained(import_decoder(file, tmp_path / "model")), load_gguf(file))
    assert found.equal_prompt_ids == found.equal_reply_ids == found.equal_texts == found.prompts == 20
    assert found.equal_tokens == found.tokens > 400


@pytest.mark.slow
def test_a_model_of_7_billion_weights_needs_little_memory(tmp_path: Path) -> None:
    from eval.experiments.imports.memory import memory_of_import

    costs = memory_of_import(tmp_path)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 13e9
    assert costs["import"].anonymous < 2 << 30 and costs["load"].anonymous < 2 << 30


def test_memory_is_measured() -> None:
    """A step that holds 128 MiB is seen."""
    from eval.experiments.imports.memory import cost_of

    def step() -> None:
        held = bytearray(b"x" * (128 << 20))
        time.sleep(0.1)
        assert held[0]

    assert 120 << 20 <= cost_of(step).anonymous < 400 << 20

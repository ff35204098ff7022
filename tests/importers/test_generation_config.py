"""What an import takes of generation_config.json: the directory loads, and nothing is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import omni
from eval.experiments.imports.oracle import published
from omni.generation.options import GenerationOptions
from omni.importers.decoders import import_decoder
from omni.importers.generation_config import generation_defaults


def stored(folder: Path, config: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def test_an_import_keeps_temperature_and_top_p(tmp_path: Path) -> None:
    published("llama").save_pretrained(tmp_path)
    stored(tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    model = omni.from_pretrained(import_decoder(tmp_path, tmp_path / "out", with_tokenizer=False))
    assert model.defaults == {"temperature": 0.6, "top_p": 0.9}
    for given, wanted in (({}, (0.6, 0.9)), ({"temperature": 0.0}, (0.0, 1.0)), ({"top_p": 0.5}, (0.6, 0.5))):
        text = GenerationOptions(**given).resolved(model.defaults).text
        assert (text.temperature, text.top_p) == wanted


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, {"temperature": 0.0}),
        ({"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2]}, {"temperature": 0.0}),
        ({"do_sample": True, "top_k": None, "repetition_penalty": 1.0, "num_beams": 1}, {"temperature": 1.0}),
        ({"do_sample": True, "top_p": 1.0, "temperature": None}, {"temperature": 1.0, "top_p": 1.0}),
        ({"do_sample": True, "top_k": 20}, {"temperature": 1.0, "top_k": 20}),
    ],
)
def test_defaults_are_those_of_transformers(config: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    assert generation_defaults(stored(tmp_path, config)) == wanted  # a warning would be an error


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_sample": True, "min_p": 0.2}, "generation has no option for min_p = 0.2; replies are without it"),
        ({"repetition_penalty": 1.1}, "no option for repetition_penalty = 1.1"),
        ({"num_beams": 4, "unheard_of": "x"}, "no option for num_beams = 4, unheard_of = 'x'"),
    ],
)
def test_what_is_left_out_is_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=message):
        generation_defaults(stored(tmp_path, config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "holds a list, not a table"),
        ({"do_sample": True, "temperature": -1}, "generation_config.json: temperature = -1: must be"),
        ({"do_sample": True, "temperature": True}, "temperature = True: must be"),
        ({"do_sample": True, "top_p": 7}, "top_p = 7: must be"),
    ],
)
def test_values_out_of_bounds_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generation_defaults(stored(tmp_path, config))

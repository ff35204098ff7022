"""The codec of a recipe: options of a directory's configuration, and its precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omni.codecs import AutoencoderCodec
from omni.rng import Key
from train.attached import build_codec
from train.recipe import Recipe

pytest.importorskip("diffusers")

TINY = {
    "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1], "latent_channels": 4,
}  # fmt: skip


def recipe(codec: Any, **more: Any) -> Recipe:
    shape = {"rows": 1, "budget": 64, "refine_budget": 32}
    source, objective = {"name": "emoji_world"}, {"name": "next_token"}
    return Recipe(
        max_steps=1, codec=codec, model={}, batch={"shapes": [shape]}, data=[source], objectives=[objective], **more
    )


def test_options_of_a_codec_reach_it(tmp_path: Path) -> None:
    """Of a diffusers directory and of a saved codec."""
    config = {"kind": "autoencoder", "class_name": "AutoencoderTiny", "model": TINY}
    codec = AutoencoderCodec.initialised(config, "test", Key(0))
    codec.module.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "theirs", codec.save(tmp_path / "ours")):
        plain, packed = (build_codec(recipe(str(folder), **o)) for o in ({}, {"codec_options": {"patch": 2}}))
        assert packed.spec.channels == 4 * plain.spec.channels == 16
        half = build_codec(recipe(str(folder), codec_precision="float16"))
        assert (half.precision, plain.precision) == ("float16", "float32")
        with pytest.raises(ValueError, match="ptch"):
            build_codec(recipe(str(folder), codec_options={"ptch": 2}))


def test_options_without_effect_are_refused() -> None:
    pixels = {"kind": "pixels", "patch": 8}
    with pytest.raises(ValueError, match="codec_options have no effect on the table of a codec"):
        recipe(pixels, codec_options={"patch": 4})
    with pytest.raises(ValueError, match="codec_precision = 'float16' has no effect on codec 'pixels'"):
        build_codec(recipe(pixels, codec_precision="float16"))
    with pytest.raises(ValueError, match="codec_precision"):
        recipe(pixels, codec_precision="float64")

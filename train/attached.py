"""What is attached to the model of a run: tokenizer, codec and encoder, built of a recipe; their fingerprints."""

from __future__ import annotations

import hashlib
from pathlib import Path

from omni.checkpoint import tensor_bytes
from omni.codecs import Codec, codecs, load_codec, read_codec
from omni.config import digest
from omni.encoders import Encoder, load_encoder, read_encoder
from omni.importers.model_files import ModelFiles
from omni.pretrained import CODEC_CONFIG, ENCODER_CONFIG, TOKENIZER_CONFIG
from omni.text import Tokenizer, load_tokenizer
from train.recipe import NO_CODEC, Recipe


def build_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of a directory; "bytes" is one id per byte."""
    if recipe.tokenizer == "bytes":
        from omni.text.bpe import BPETokenizer

        return BPETokenizer.train([], 256)
    return load_tokenizer(recipe.tokenizer)


def build_codec(recipe: Recipe) -> Codec | None:
    """The codec of a directory, or of a table for one without weights, on the device; None for a model of text
    alone."""
    if recipe.codec == NO_CODEC:
        return None
    if isinstance(recipe.codec, str):
        codec = load_codec(recipe.codec, **recipe.codec_options)
    else:
        kind = str(recipe.codec.get("kind", ""))
        codec = codecs.get(kind).from_config(recipe.codec, "codec")
        if codec.weights():
            raise ValueError(f"codec kind {kind!r} has weights; give the directory of a trained one instead of a table")
    if hasattr(codec, "precision"):
        codec.precision = recipe.codec_precision  # type: ignore[attr-defined]
    elif recipe.codec_precision != "float32":
        raise ValueError(
            f"codec_precision = {recipe.codec_precision!r} has no effect on codec {codec.spec.name!r}; leave it out"
        )
    return codec.to(recipe.device)


def build_encoder(recipe: Recipe) -> Encoder | None:
    """The encoder of a directory, on the device; None without one."""
    if recipe.encoder is None:
        return None
    return load_encoder(recipe.encoder, **recipe.encoder_options).to(recipe.device)


def check_same_parts(
    directory: Path, tokenizer: Tokenizer, codec: Codec | None, what: str = "init_from", encoder: Encoder | None = None
) -> None:
    """ValueError where the weights of a model directory, `what`, were trained with another tokenizer, codec or
    encoder."""
    hint = ", or init_partial=true" if what == "init_from" else ""
    files = ModelFiles(directory)
    words, pictures, tower = (files.folder(name) for name in ("tokenizer", "codec", "encoder"))
    if TOKENIZER_CONFIG in words and load_tokenizer(words.root, words.read).describe() != tokenizer.describe():
        raise ValueError(f"{what} {str(directory)!r} has another tokenizer; use tokenizer={words.root}{hint}")
    if CODEC_CONFIG in pictures and (codec is None or fingerprint(read_codec(pictures)) != fingerprint(codec)):
        raise ValueError(f"{what} {str(directory)!r} has another codec; use codec={pictures.root}{hint}")
    if ENCODER_CONFIG in tower and (encoder is None or fingerprint(read_encoder(tower)) != fingerprint(encoder)):
        raise ValueError(f"{what} {str(directory)!r} has another encoder; use encoder={tower.root}{hint}")


def fingerprints(tokenizer: Tokenizer, codec: Codec | None, encoder: Encoder | None) -> dict[str, str]:
    """Of all that is attached to a model, by name."""
    found = {"tokenizer": digest(tokenizer.describe()), "codec": NO_CODEC if codec is None else fingerprint(codec)}
    return found if encoder is None else {**found, "encoder": fingerprint(encoder)}


def fingerprint(codec: Codec | Encoder) -> str:
    """Of a codec or an encoder: digest of configuration and weights. Checkpoints store it: never change it."""
    weights = codec.weights()
    data = digest(codec.config()).encode() + (tensor_bytes(weights) if weights else b"")
    return hashlib.blake2b(data, digest_size=16).hexdigest()

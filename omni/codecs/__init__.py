"""Codecs: pictures and clips to latent blocks and back. `load_codec(directory)` gives whichever a directory holds.

Families: `pixels` (exact, no weights), `autoencoder` (the classes of families.py, of pictures, or of pictures and
clips) and `fsq` (one of pictures with a finite scalar quantiser). A new family is a new file that registers itself in
`codecs`; a new class of diffusers is an entry of families.py.

    codec.py                the face, its registry and its files
    autoencoders.py         AutoencoderCodec: one adapter for all classes
    autoencoder_config.py   its configuration; mean and deviation of latents
    families.py             what the classes differ in
    networks.py             building and calling a class
    tiles.py                large pictures in tiles
    published.py            reading a diffusers directory
    upstream.py             importing one class of diffusers
"""

from omni.codecs.autoencoder_config import AutoencoderConfig
from omni.codecs.autoencoders import AutoencoderCodec
from omni.codecs.codec import MAX_GRID, Codec, CodecSpec, codecs, psnr
from omni.codecs.fsq import FiniteScalarQuantiser, FsqCodec, FsqConfig
from omni.codecs.loading import load_codec, read_codec
from omni.codecs.pixels import PixelCodec, PixelConfig

__all__ = [
    "MAX_GRID",
    "AutoencoderCodec",
    "AutoencoderConfig",
    "Codec",
    "CodecSpec",
    "FiniteScalarQuantiser",
    "FsqCodec",
    "FsqConfig",
    "PixelCodec",
    "PixelConfig",
    "codecs",
    "load_codec",
    "psnr",
    "read_codec",
]

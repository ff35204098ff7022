"""Codecs: pictures and clips to latent blocks and back. `load_codec(directory)` gives whichever a directory holds.

Families: `pixels` (exact, no weights), `autoencoder` (diffusers AutoencoderKL | AutoencoderTiny | AutoencoderDC) and
`fsq` (the same with a finite scalar quantiser). A new family is a new file that registers itself in `codecs`.
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

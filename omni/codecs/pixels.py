"""Exact pixel-patch codec: a latent is a patch of pixels, scaled to [-1, 1]. No weights, no loss; for tests and clips.

Shapes: B pictures, p patch side, h = H / p, w = W / p; a latent has p * p * 3 numbers (row, column, colour).
The order in a latent is that of trained models: never change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from einops import rearrange
from pydantic import Field
from torch import Tensor

from omni.codecs.codec import Codec, CodecSpec, codecs, to_bytes
from omni.config import Frozen, build


class PixelConfig(Frozen):
    """`patch`: side in pixels. `frames_per_chunk`: frames of a clip that form one block."""

    kind: str = "pixels"
    patch: int = Field(default=8, ge=1, le=64)
    frames_per_chunk: int = Field(default=1, ge=1, le=64)


@codecs.register("pixels")
class PixelCodec(Codec):
    """decode(encode(pixels)) == pixels, to the bit, on pictures and on clips.

    Example:
        >>> PixelCodec(PixelConfig(patch=4)).spec.channels
        48
    """

    def __init__(self, config: PixelConfig | None = None) -> None:
        self.configuration = config or PixelConfig()
        patch = self.configuration.patch
        self.spec = CodecSpec(
            name="pixels",
            channels=patch * patch * 3,
            stride=(1, patch, patch),
            frames_per_chunk=self.configuration.frames_per_chunk,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> Self:
        return cls(build(config, PixelConfig, source))

    def config(self) -> dict[str, Any]:
        return self.configuration.model_dump(mode="json")

    def _encode(self, pixels: Tensor) -> Tensor:
        p = self.configuration.patch
        return rearrange(pixels, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p).float() / 127.5 - 1

    def _decode(self, latents: Tensor) -> Tensor:
        p = self.configuration.patch
        return to_bytes(rearrange(latents, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p))

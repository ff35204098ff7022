"""Latents of media, remembered: every distinct picture goes through the codec once while it stays in memory.

The memo is keyed by a digest of the pixels and holds bfloat16; a latent is rounded to bfloat16 on the first use too, so
what the model sees never depends on whether it was remembered. Pictures of one size are encoded in batches of one fixed
shape (short ones are filled up), so it does not depend on which pictures shared a batch either.
Shapes: B batch, H W pixels, t h w latents, C channels.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from omni.document import Image, Video

ENCODE_BATCH = 16

Latents = list[torch.Tensor]
"""One media segment: a list of (t, h, w, C) blocks; a picture has one block with t = 1."""


class LatentMemo:
    """Least-recently-used latents of pictures and clips, at most `max_bytes` of them."""

    def __init__(self, codec: Any, max_bytes: int = 512 << 20, device: torch.device | str = "cpu") -> None:
        self.codec, self.max_bytes, self.device = codec, max_bytes, device
        self.num_bytes = self.num_hits = self.num_misses = 0
        self._kept: OrderedDict[bytes, Latents] = OrderedDict()

    def encode(self, segments: Sequence[Image | Video]) -> list[Latents]:
        """Latents of each segment, in order: lists of (t, h, w, C) float32 blocks on the CPU."""
        keys = [media_digest(segment) for segment in segments]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: s for key, s in zip(keys, segments, strict=True) if key not in found}
        self.num_misses += len(missing)
        self.num_hits += len(keys) - len(missing)
        pictures = {key: s for key, s in missing.items() if isinstance(s, Image)}
        found |= self._encode_pictures(pictures)
        found |= {key: self._encode_video(s) for key, s in missing.items() if isinstance(s, Video)}
        self._remember(keys, found)
        return [[block.float() for block in found[key]] for key in keys]

    @torch.no_grad()
    def _encode_pictures(self, pictures: dict[bytes, Image]) -> dict[bytes, Latents]:
        by_size: dict[tuple[int, ...], list[bytes]] = {}
        for key, picture in pictures.items():
            by_size.setdefault(tuple(picture.pixels.shape), []).append(key)
        result: dict[bytes, Latents] = {}
        for shape, keys in by_size.items():
            for start in range(0, len(keys), ENCODE_BATCH):
                part = keys[start : start + ENCODE_BATCH]
                pixels_BHWC = torch.zeros((ENCODE_BATCH, *shape), dtype=torch.uint8)
                for row, key in enumerate(part):
                    pixels_BHWC[row] = pictures[key].pixels
                latents_BhwC = self.codec.encode(pixels_BHWC.to(self.device)).to("cpu", torch.bfloat16)
                result |= {key: [latents_BhwC[row : row + 1].clone()] for row, key in enumerate(part)}
        return result

    @torch.no_grad()
    def _encode_video(self, video: Video) -> Latents:
        blocks = self.codec.encode_video(video.frames.to(self.device))
        return [block.to("cpu", torch.bfloat16).clone() for block in blocks]

    def _remember(self, keys: Iterable[bytes], found: dict[bytes, Latents]) -> None:
        for key in keys:
            if key not in self._kept:
                self._kept[key] = found[key]
                self.num_bytes += _bytes_of(found[key])
            self._kept.move_to_end(key)
        while self.num_bytes > self.max_bytes and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= _bytes_of(dropped)


def media_digest(segment: Image | Video) -> bytes:
    """16 bytes that identify the shape and the pixels."""
    values = segment.pixels if isinstance(segment, Image) else segment.frames
    digest = hashlib.blake2b(repr(tuple(values.shape)).encode(), digest_size=16)
    digest.update(memoryview(values.contiguous().numpy()).cast("B"))
    return digest.digest()


def _bytes_of(latents: Latents) -> int:
    return sum(block.numel() * block.element_size() for block in latents)

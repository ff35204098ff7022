"""A cache of latents and features: codec and encoder compute every distinct picture once while it stays in memory.
The pixels that an encoder reads, where it is trained, are not kept.

The key is a digest of the pixels. A latent does not depend on whether it was cached, nor on the rest of its batch
(Codec.encode).
Shapes: t h w latents, C channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch

from omni.data.digests import media_digest
from omni.document import Image, Video
from omni.sequence.features import Blocks, FeatureBlock

Latents = Blocks
"""One media segment: a list of (t, h, w, C) blocks; a picture has one block with t = 1, and features behind it in a
model with an encoder."""
Encode = Callable[[Sequence[Image | Video]], Sequence[Latents | list[torch.Tensor]]]


class LatentMemo:
    """Least-recently-used latents of pictures and clips, at most `max_bytes` of them. encode: Omni.encode_media.
    behind: of one segment, what stands behind its blocks and is made every time."""

    def __init__(
        self,
        encode: Encode,
        max_bytes: int = 512 << 20,
        behind: Callable[[Image | Video], list[FeatureBlock]] | None = None,
    ) -> None:
        self._encode, self._behind, self.max_bytes = encode, behind, max_bytes
        self.num_bytes = self.num_hits = self.num_misses = 0
        self._kept: OrderedDict[bytes, Latents] = OrderedDict()

    def encode(self, segments: Sequence[Image | Video]) -> list[Latents]:
        """Latents of each segment, in order: lists of (t, h, w, C) float32 blocks on the CPU."""
        keys = [media_digest(segment) for segment in segments]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: s for key, s in zip(keys, segments, strict=True) if key not in found}
        self.num_misses += len(missing)
        self.num_hits += len(keys) - len(missing)
        made = self._encode(list(missing.values()))
        found |= {key: [block.clone() for block in one] for key, one in zip(missing, made, strict=True)}
        self._remember(keys, found)
        if self._behind is None:
            return [found[key] for key in keys]
        return [[*found[key], *self._behind(s)] for key, s in zip(keys, segments, strict=True)]

    def _remember(self, keys: Iterable[bytes], found: dict[bytes, Latents]) -> None:
        """Keep the latents of `keys` as the most recent; forget the least recent beyond max_bytes."""
        for key in keys:
            if key not in self._kept:
                self._kept[key] = found[key]
                self.num_bytes += _bytes_of(found[key])
            self._kept.move_to_end(key)
        while self.num_bytes > self.max_bytes and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= _bytes_of(dropped)


def _bytes_of(latents: Latents) -> int:
    """The memory of latents and features, in bytes."""
    return sum(
        block.numel() * block.element_size() if isinstance(block, torch.Tensor) else block.num_bytes
        for block in latents
    )

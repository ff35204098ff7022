"""CIFAR-10 as bytes on one device: read from parquet once, batched in keyed shuffles, flipped and cropped.

Legend: N pictures, B pictures of a step, P side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.jobs import run_jobs
from omni.media import load_image
from omni.rng import Key

if TYPE_CHECKING:
    import numpy

SIDE = 32
NUM_CLASSES = 10


@dataclass(frozen=True, eq=False)
class Pictures:
    """`pixels` uint8 (N, P, P, 3) and `labels` int64 (N,), on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_pictures(paths: Sequence[Path], num: int | None, workers: int, device: str) -> list[Pictures]:
    """The first `num` rows (None: all) of parquet files with the columns image (bytes, or {"bytes": ...}) and label.

    Decoded by `workers` processes. Raises ValueError for a file, picture or label that is not of this kind.
    """
    tables = [_read(path, num) for path in paths]
    encoded = [data for images, _ in tables for data in images]
    size = -(-len(encoded) // workers)
    jobs = [(encoded[at : at + size],) for at in range(0, len(encoded), size)]
    parts = dict(run_jobs(decode, jobs, workers))
    pixels = torch.cat([torch.from_numpy(parts[number]) for number in range(len(jobs))])
    parted = pixels.split([len(labels) for _, labels in tables])
    pairs = zip(parted, (labels for _, labels in tables), strict=True)
    return [Pictures(part.to(device), torch.tensor(labels, device=device)) for part, labels in pairs]


def _read(path: Path, num: int | None) -> tuple[list[bytes], list[int]]:
    """Encoded pictures and labels of the first `num` rows."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("reading CIFAR-10 needs pyarrow: pip install 'omni-flow[data]'") from None
    try:
        table = parquet.read_table(path, columns=["image", "label"]).slice(0, num)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no parquet file with columns image and label: {error}") from None
    cells, labels = table["image"].to_pylist(), table["label"].to_pylist()
    encoded = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    if not labels or not all(isinstance(label, int) and 0 <= label < NUM_CLASSES for label in labels):
        raise ValueError(f"{str(path)!r} has no rows, or labels outside 0 to {NUM_CLASSES - 1}; is it CIFAR-10?")
    return encoded, labels


def decode(encoded: Sequence[bytes]) -> numpy.ndarray:
    """Encoded pictures -> uint8 (N, P, P, 3). A module-level function, so that other processes can import it."""
    pictures = [load_image(data) for data in encoded]
    wrong = next((tuple(picture.shape) for picture in pictures if picture.shape != (SIDE, SIDE, 3)), None)
    if wrong is not None:
        raise ValueError(f"a picture has the shape {wrong}, CIFAR-10's have {(SIDE, SIDE, 3)}")
    return torch.stack(pictures).numpy()


class Order:
    """The pictures of each step: a new keyed shuffle every epoch; an incomplete last batch is left out."""

    def __init__(self, num: int, batch: int, key: Key, device: torch.device) -> None:
        if batch > num:
            raise ValueError(f"a batch of {batch} is larger than the {num} pictures; make it smaller")
        self.num, self.batch, self.key, self.device = num, batch, key, device
        self._epoch, self._shuffled = -1, torch.empty(0)

    def rows(self, step: int) -> Tensor:
        """(B,) int64, on the device."""
        epoch, place = divmod(step, self.num // self.batch)
        if epoch != self._epoch:
            shuffled = torch.randperm(self.num, generator=self.key.fold("epoch", epoch).generator())
            self._epoch, self._shuffled = epoch, shuffled.to(self.device)
        return self._shuffled[place * self.batch : (place + 1) * self.batch]


def flipped(pixels_BPP3: Tensor, key: Key) -> Tensor:
    """Mirror a keyed half of the pictures."""
    flips = (key.fold("flip").uniform((len(pixels_BPP3),)) < 0.5).to(pixels_BPP3.device, non_blocking=True)
    return torch.where(flips[:, None, None, None], pixels_BPP3.flip(2), pixels_BPP3)


def cropped(pixels_BPP3: Tensor, key: Key, margin: int = 4) -> Tensor:
    """Shift by up to `margin` pixels in each direction; repeat the edge outside."""
    num, side = pixels_BPP3.shape[:2]
    shift = (key.fold("crop").uniform((2, num, 1)) * (2 * margin + 1)).floor().long() - margin
    place = torch.arange(side, device=pixels_BPP3.device) + shift.to(pixels_BPP3.device, non_blocking=True)
    down, across = place.clamp(0, side - 1)
    picture = torch.arange(num, device=pixels_BPP3.device)[:, None, None]
    return pixels_BPP3[picture, down[:, :, None], across[:, None, :]]

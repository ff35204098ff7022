"""Samples of clips from a trained model, and the distance of their distribution from that of the data.

The data are few clips, each with the same probability, so distances are to the exact distribution. Every clip has one
prompt, which does not depend on it.

Legend: N samples, M data clips, T frames, H height, W width, D numbers of a clip.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni.document import Text, Video
from omni.generation.engine import Engine
from omni.generation.events import VideoPart
from omni.generation.options import GenerationOptions
from omni.model import Omni
from omni.rng import Key
from train.build import build_mixture
from train.recipe import Recipe


@dataclass(frozen=True, eq=False)
class ClipData:
    """prompt: the text before every clip. frames: uint8 (M, T, H, W, 3), all clips, held-out ones too."""

    prompt: str
    frames: Tensor


@dataclass(frozen=True, eq=False)
class Sampled:
    """frames: uint8 (N, T, H, W, 3). passes: refine passes of one clip. seconds: of one clip alone, median."""

    frames: Tensor
    passes: int
    seconds: float


def clip_data(recipe: Recipe) -> ClipData:
    """The clips of a recipe. ValueError unless it has one source, moving_emoji, whose prompt is the same for all."""
    [source] = build_mixture(recipe, Key(recipe.seed)).sources
    num = getattr(source.options, "num_clips", 0)
    frames, prompts = [], set()
    for index in range(num):
        text, clip = source.document(index).segments
        assert isinstance(text, Text) and isinstance(clip, Video)
        frames.append(clip.frames)
        prompts.add(text.text)
    if len(prompts) != 1:
        raise ValueError(f"data.0 has {len(prompts)} prompts; give it one for all clips: prompt = 'a clip'")
    return ClipData(prompts.pop(), torch.stack(frames))


# ---- sampling --------------------------------------------------------------------------------------------------------


def sample_clips(engine: Engine, prompt: str, num: int, options: dict[str, Any], first_seed: int = 0) -> Tensor:
    """Clips of the seeds first_seed, ..., one for each; uint8 (num, T, H, W, 3). ValueError where a reply has none."""
    asked = GenerationOptions(max_images=1, max_tokens=8, **options)
    seeds = list(range(first_seed, first_seed + num))
    replies = engine.generate_batch([prompt] * num, asked, seeds=seeds)
    clips = [part.frames for reply in replies for part in reply.parts if isinstance(part, VideoPart)]
    if len(clips) < num:
        raise ValueError(f"{num - len(clips)} of {num} replies to {prompt!r} have no clip; train the text longer")
    return torch.stack(clips)


def measured(model: Omni, prompt: str, num: int, options: dict[str, Any], repeats: int) -> Sampled:
    """`num` samples; the passes and the time of one clip, the median of `repeats`."""
    with counted(model) as passes:
        sample_clips(Engine(model), prompt, 1, options)
    seconds = []
    for seed in range(repeats):
        start = time.perf_counter()
        sample_clips(Engine(model), prompt, 1, options, seed)
        seconds.append(time.perf_counter() - start)
    return Sampled(sample_clips(Engine(model), prompt, num, options), len(passes), statistics.median(seconds))


@contextmanager
def counted(model: Omni) -> Iterator[list[int]]:
    """A list with the number of refine positions of each pass that the model computes inside."""
    passes: list[int] = []
    refine = model.transformer.refine

    def watched(h: Tensor, *rest: Any) -> Tensor:
        passes.append(h.shape[1])
        return refine(h, *rest)

    model.transformer.refine = watched  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del model.transformer.refine


# ---- distances -------------------------------------------------------------------------------------------------------


def flat(frames: Tensor) -> Tensor:
    """uint8 (N, ...) -> (N, D) float64 in [0, 1]."""
    return frames.flatten(1).double() / 255


def energy_distance(samples: Tensor, data: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples x (N, D) and data y (M, D), Euclidean norms.

    It is 0 for the same distribution alone. y is uniform over the data, x' is another sample than x: no bias, so a
    value may be below 0. ValueError for fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"an energy distance needs at least two samples, got {len(samples)}")
    pairs = len(samples) * (len(samples) - 1)
    within = torch.cdist(samples, samples).sum() / pairs
    return float(2 * torch.cdist(samples, data).mean() - within - torch.cdist(data, data).mean())


def coherent(samples: Tensor, data: Tensor) -> float:
    """The percentage of samples (N, T, ...) whose frames are all of one clip: of clips (M, T, ...), the nearest one at
    each frame is the same. Frames that several clips have at one time count for all of them."""
    agree = torch.ones(len(samples), len(data), dtype=torch.bool)
    for x, y in zip(samples.unbind(1), data.unbind(1), strict=True):
        distance = torch.cdist(flat(x), flat(y))
        agree &= distance <= distance.min(1, keepdim=True).values + 1e-9
    return 100 * float(agree.any(1).double().mean())


def shuffled_blocks(data: Tensor, num: int, key: Key) -> Tensor:
    """`num` clips whose frames are each of a clip of its own: the distribution of frames without their dependence."""
    picks = (key.uniform((num, data.shape[1])) * len(data)).long()
    return torch.stack([data[picks[:, t], t] for t in range(data.shape[1])], 1)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation over seeds; 0 for one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

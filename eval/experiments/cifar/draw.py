"""Samples pictures from a trained network, many at once, and makes a sheet of them.

The contexts are encoded once for all evaluations; the noise is the same for all networks and numbers of steps.

Legend: M pictures to sample, R batch rows, N latents, C channels, P side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.experiments.cifar.learner import Method, in_half_precision
from eval.experiments.cifar.patches import Patches, with_classes
from eval.plots import INK, small_palette
from omni.model import Omni
from omni.nn.cache import Memory
from omni.rng import Key
from omni.samplers import SAMPLERS, run_sampler, time_grid
from omni.sequence.layout import Batch

if TYPE_CHECKING:
    from PIL import Image

SCALE, GAP, LABEL_WIDTH = 2, 2, 190  # of a sheet: enlargement; pixels between pictures and for a name


@dataclass(frozen=True, eq=False)
class Canvas:
    """Inputs of sampling: `blank`, R documents of one copy; `noise` (M, N, C) and `labels` (M,)."""

    blank: Batch
    patches: Patches
    noise: Tensor
    labels: Tensor


@torch.no_grad()
def draw_pictures(model: Omni, method: Method, steps: int, canvas: Canvas, key: Key) -> Tensor:
    """uint8 (M, P, P, 3) by the method's sampler, R pictures a batch. ValueError where they are not finite."""
    rows, num, device = len(canvas.blank.ids), len(canvas.labels), canvas.labels.device
    times, found = time_grid(steps, start=method.start_time), []
    for at in range(0, num, rows):
        where = torch.arange(at, at + rows, device=device) % num  # the last batch is as full as the others
        start = times[0] * canvas.noise[where]  # at t < 1 pure noise is t eps

        def renoise(jump: int, at: int = at, shape: tuple[int, ...] = tuple(start.shape)) -> Tensor:
            return key.fold("renoise", at, jump).normal(shape).to(device)

        with in_half_precision(device):
            call = velocity_of(model, method, with_classes(canvas.blank, canvas.labels[where]))
            sampler = SAMPLERS.get(method.sampler)
            *_, last = run_sampler(sampler, call, start, times, renoise, **method.sampler_options)
        found.append(last.x[: num - at])
    latents = torch.cat(found)
    if not bool(latents.isfinite().all()):
        raise ValueError(f"samples in {steps} steps are not finite")
    return canvas.patches.decode(latents)


def velocity_of(model: Omni, method: Method, batch: Batch) -> Callable[[Tensor, float, float], Tensor]:
    """F(x, t, s) of the rows of a batch with one copy each, with the method's guidance."""
    w, ones = method.guidance, torch.ones(len(batch.ids), device=batch.ids.device)
    memory, beta = _memory(model, batch), ones / method.guidance_embedding
    null = None if w == 1 or batch.null is None else _memory(model, batch.null)

    def call(x: Tensor, t: float, s: float) -> Tensor:
        full = model.velocity(x, ones * t, ones * s, beta, batch.refine, None, memory)
        if null is None:
            return full
        return w * full + (1 - w) * model.velocity(x, ones * t, ones * s, ones, batch.refine, None, null)

    return call


def _memory(model: Omni, batch: Batch) -> Memory:
    """The context; every position of the block attends to all of it (see eval.experiments.cifar.patches)."""
    return model.context(batch)[1]


def sheet(rows: Mapping[str, Tensor]) -> Image.Image:
    """Named rows of uint8 pictures (n, P, P, 3), the name before each."""
    from PIL import Image, ImageDraw, ImageFont

    from omni.media import to_pil

    num, side = max(len(pictures) for pictures in rows.values()), SCALE * next(iter(rows.values())).shape[1] + GAP
    picture = Image.new("RGB", (LABEL_WIDTH + num * side, len(rows) * side), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i, (name, pictures) in enumerate(rows.items()):
        draw.text((6, (i + 0.5) * side), name.replace("_", " "), fill=INK, font=font, anchor="lm")
        for j, pixels in enumerate(pictures):
            large = pixels.repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1)
            picture.paste(to_pil(large), (LABEL_WIDTH + j * side, i * side))
    return small_palette(picture, 256)
